"""What is found out about a plugin's feature map before a run begins."""

import pytest
import torch

from ebft_mega.config.load import load_config
from ebft_mega.errors import ConfigError
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.features.pool_check import check_pooling
from ebft_mega.registry.kinds import FEATURE_MAPS
from tests.distributed.steps import TEXT


class Own(FeatureMap):
    """The mean of the rows, after what a test does to them and before what it does to that."""

    name = "own"
    first = staticmethod(lambda rows: rows)
    then = staticmethod(lambda vectors: vectors)

    def positions(self, generate_length):
        return range(generate_length - 2, generate_length)

    def pool(self, rows):
        return self.then(self.first(rows).mean(dim=-2))


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURE_MAPS.added, "own", Own)
    file = tmp_path / "run.yaml"
    file.write_text(TEXT % ("llama", "true"), encoding="utf-8")
    return lambda *overrides: load_config(file, ["ebft.embed_method=own", *overrides])


def to_length_one(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def raises(vectors):
    raise RuntimeError("no such rows")


AGAINST = {
    "shape": ("then", lambda vectors: vectors[..., :-1], "found a float64 tensor [2, 2, 4, 5] on cpu"),
    "dtype": ("then", lambda vectors: vectors.float(), "found a float32 tensor [2, 2, 4, 6] on cpu"),
    "finite": ("then", lambda vectors: vectors / 0, "found a vector that is not finite at row 0, block 0, feature 0"),
    "raises": ("then", raises, "found RuntimeError: no such rows"),
    "changes": ("first", lambda rows: rows.mul_(2), "found that pool changes the rows that it is given"),
    "channels": ("then", to_length_one, "found that some channels of the hidden dimension give something else"),
    "rows": ("then", lambda vectors: vectors - vectors.mean(dim=0), "found that some rows of the batch give"),
    "blocks": ("then", lambda vectors: vectors - vectors.mean(dim=1, keepdim=True), "found that some blocks give"),
    "features": ("then", lambda vectors: vectors.cumsum(dim=2), "found that some features of a block give"),
}


@pytest.mark.parametrize("name", AGAINST)
def test_what_breaks_the_contract_is_named_with_both_places(configuration, monkeypatch, name):
    which, change, words = AGAINST[name]
    monkeypatch.setattr(Own, which, staticmethod(change))
    with pytest.raises(ConfigError) as raised:
        check_pooling(configuration())
    (problem,) = raised.value.problems
    assert problem.key == "ebft.embed_method" and words in str(problem)
    assert problem.where.startswith(f"--set: {__file__}:")
    check_pooling(configuration("ebft.rl_coef=0"))  # nothing is pooled there


def test_what_keeps_the_contract_passes(configuration, monkeypatch):
    """Among it that tokens are weighted or chosen: it is the same for every channel."""
    check_pooling(configuration())
    monkeypatch.setattr(Own, "then", staticmethod(lambda vectors: vectors * 3))
    monkeypatch.setattr(Own, "first", staticmethod(lambda rows: rows * torch.tensor([[0.2], [0.8]]).double()))
    check_pooling(configuration())


@pytest.mark.parametrize("method", FEATURE_MAPS.own_names())
def test_the_package_s_own_maps_would_pass(configuration, monkeypatch, method):
    monkeypatch.setitem(FEATURE_MAPS.added, "own", type("Own", (FEATURE_MAPS.entry(method),), {"__module__": "mine"}))
    check_pooling(configuration())


def test_a_map_that_says_it_is_a_mean_of_tokens_is_one(configuration, monkeypatch):
    monkeypatch.setattr(Own, "is_mean_of_tokens", True)
    with pytest.raises(ConfigError, match="is_mean_of_tokens: normalises tokens, all positions, 1 vector"):
        configuration()
    monkeypatch.setattr(Own, "positions", lambda self, generate_length: range(generate_length))
    monkeypatch.setattr(Own, "normalises", "tokens")
    check_pooling(configuration())
    monkeypatch.setattr(Own, "then", staticmethod(lambda vectors: 2 * vectors))
    with pytest.raises(ConfigError, match="found another vector; expected the mean of all rows"):
        check_pooling(configuration())
