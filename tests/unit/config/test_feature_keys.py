"""Keys of features: weights of layers, what a map chooses of the layers, and maps that do not keep their contract."""

import pytest

from ebft_mega.config.entries import feature_map, tapped_fractions
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.errors import ConfigError
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.registry.kinds import FEATURE_MAPS

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 100}
"""


class Own(FeatureMap):
    name = "own"
    answers = {}

    def layers(self, fractions):
        answer = self.answers.get("layers", lambda given: given[-1:])
        return answer(fractions)

    def positions(self, generate_length):
        answer = self.answers.get("positions", lambda length: range(length))
        return answer(generate_length)

    def vectors(self, generate_length):
        answer = self.answers.get("vectors", lambda length: 1)
        return answer(generate_length)


@pytest.fixture
def own(monkeypatch):
    """The map, and a way to let it answer something else."""
    monkeypatch.setitem(FEATURE_MAPS.added, "own", Own)
    monkeypatch.setattr(Own, "answers", {})
    return Own.answers


def test_weights_are_read_and_written(load, tmp_path):
    assert load().ebft.layer_weights is None
    config = load("ebft.layer_weights=[1, 0, 2.5]")
    assert config.ebft.layer_weights == (1.0, 0.0, 2.5)
    (tmp_path / "b.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "b.yaml").ebft == config.ebft


@pytest.mark.parametrize(
    ("overrides", "key", "found", "expected"),
    [
        (["ebft.layer_weights=[1, 2]"], "layer_weights", "2 weights", "3 weights, one for each layer that last_token"),
        (["ebft.layer_weights=[]"], "layer_weights", "0 weights", "3 weights, one for each layer"),
        (["ebft.layer_weights=[0, 0, 0]"], "layer_weights", "[0.0, 0.0, 0.0]", "at least one weight above 0"),
        (["ebft.layer_weights=[1, -1, 1]"], "layer_weights", "", "a list of numbers >= 0"),
        (["ebft.layer_weights=[1, .nan, 1]"], "layer_weights", "", "a list of numbers >= 0"),
        (["ebft.layer_weights=[1, 1e9, 1]"], "layer_weights", "", "a list of numbers >= 0 and <= 1e6"),
        (["ebft.layer_weights=3"], "layer_weights", "", "a list of numbers >= 0"),
        (
            ["ebft.layer_weights=[1, 2]", "ebft.feature_layers=[0.7, 0.2]"],
            "feature_layers",
            "[0.7, 0.2]",
            "ascending depths, with ebft.layer_weights",
        ),
    ],
)
def test_wrong_weights(load, overrides, key, found, expected):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == ("--set", f"ebft.{key}")
    assert problem.found.startswith(found) and problem.expected.startswith(expected)


def test_a_map_chooses_layers_and_weights_are_theirs(load, own):
    assert tapped_fractions(load("ebft.feature_layers=[0.7, 0.2]")) == (0.2, 0.7)
    config = load("ebft.embed_method=own", "ebft.feature_layers=[0.7, 0.2]")
    assert isinstance(feature_map(config), Own) and tapped_fractions(config) == (0.7,)
    assert load("ebft.embed_method=own", "ebft.layer_weights=[2]").ebft.layer_weights == (2.0,)
    with pytest.raises(ConfigError, match="found 3 weights; expected 1 weights, one for each layer that own reads"):
        load("ebft.embed_method=own", "ebft.layer_weights=[1, 1, 1]")


def of_nothing(length):
    raise LookupError("no such position")


LAYERS, LAST = "layers: a tuple of at least one number", "positions: a range of the last positions of 8, ending with 7"


@pytest.mark.parametrize(
    ("method", "answer", "found", "expected"),
    [
        ("layers", lambda given: (), "layers: ()", LAYERS),
        ("layers", lambda given: [0.5], "layers: [0.5]", LAYERS),
        ("layers", lambda given: (0.5, 1.5), "layers: (0.5, 1.5)", LAYERS),
        ("layers", lambda given: (0.5, 0.25), "layers: (0.5, 0.25)", LAYERS),
        ("layers", lambda given: ("a",), "layers: ('a',)", LAYERS),
        ("positions", lambda length: range(0), "positions: range(0, 0)", LAST),
        ("positions", lambda length: range(length - 1), "positions: range(0, 7)", LAST),
        ("positions", lambda length: range(1, length, 2), "positions: range(1, 8, 2)", LAST),
        ("positions", lambda length: range(-1, length), "positions: range(-1, 8)", LAST),
        ("positions", lambda length: [7], "positions: [7]", LAST),
        ("positions", of_nothing, "LookupError: no such position", LAST),
        ("vectors", lambda length: 0, "vectors: 0", "vectors: an integer >= 1"),
        ("vectors", lambda length: 1.0, "vectors: 1.0", "vectors: an integer >= 1"),
    ],
)
def test_a_map_that_does_not_keep_its_contract(load, own, method, answer, found, expected):
    own[method] = answer
    with pytest.raises(ConfigError) as caught:
        load("ebft.embed_method=own")
    (problem,) = caught.value.problems
    line = next(n for n, text in enumerate(open(__file__), 1) if text.startswith("class Own"))
    assert (problem.where, problem.key) == ("--set", "ebft.embed_method")
    assert problem.found == f"own, which says {found} ({__file__}:{line})"
    assert problem.expected.startswith(expected)
