"""Gram matrices of every feature map against explicit vectors and by hand, with and without weights of layers."""

import pytest
import torch

from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.features.gram import FeatureRecipe, block_grams
from ebft_mega.registry.kinds import FEATURE_MAPS
from tests.explicit_features import NORMS, explicit_gram

METHODS = FEATURE_MAPS.own_names()
LENGTH = 4  # G
WEIGHTS = (0.5, 0.0, 3.0)


def gram_of(groups, hidden, method, norm="joint", weights=None, faults=None):
    """Gram matrices of hidden states [B, K, n + 1, G, L, H] of all tokens, as a stage with all layers makes them."""
    entry = FEATURE_MAPS.entry(method)() if isinstance(method, str) else method
    recipe = FeatureRecipe(entry, hidden.shape[3], norm, weights)
    taps = [layer[..., recipe.window.start :, :] for layer in hidden.unbind(dim=4)]
    shape = tuple(taps[0].shape[:-1])
    return block_grams(taps, shape, recipe, groups, hidden.device, weights, faults)


def windows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([0.1, 1.0, 20.0])[:, None]  # of layers, as different as those of real models
    return (torch.randn(2, 3, 5, LENGTH, 3, 7, generator=generator, dtype=torch.float64) * lengths).to(dtype)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_those_of_explicit_vectors(groups, method, norm, weights):
    hidden = windows(torch.float32)
    found = gram_of(groups, hidden, method, norm, weights)
    assert found.dtype == torch.float64 and torch.equal(found, found.transpose(-1, -2))
    torch.testing.assert_close(found, explicit_gram(hidden, method, norm, weights), rtol=1e-12, atol=1e-12)


# Of a rollout with the tokens 3 e1 and 4 e2, and a target with 3 e1 twice: their inner product, and the rollout's own.
BY_HAND = {"last_token": (0.0, 1.0), "mean_pooling": (0.5, 0.5), "concat": (1.0, 2.0), "completion_mean": (0.6, 1.0)}


@pytest.mark.parametrize("method", METHODS)
def test_two_tokens_by_hand(groups, method):
    rollout, target = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    hidden = torch.stack((rollout, target)).view(1, 1, 2, 2, 1, 2)
    gram = gram_of(groups, hidden, method)[0, 0]
    assert (gram[0, 1].item(), gram[0, 0].item()) == pytest.approx(BY_HAND[method], abs=1e-15)


def test_lengths_of_features(groups):
    """One, or with layers by themselves the square root of their number; times G for all tokens."""
    hidden = windows()
    for norm, length in (("joint", 1.0), ("per_layer", 3.0)):
        for method, factor in (("last_token", 1), ("completion_mean", 1), ("concat", LENGTH)):
            squares = gram_of(groups, hidden, method, norm).diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(squares, torch.full_like(squares, factor * length), rtol=1e-12, atol=0)


def test_weights_by_hand(groups):
    """(3, 0) and (0, 4) in two layers against (3, 0) and (4, 0): both features have the length 5 together."""
    x, y = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    hidden = torch.stack((x, y)).view(1, 1, 2, 1, 2, 2)
    joint = gram_of(groups, hidden, "last_token", "joint", (2.0, 1.0))[0, 0]
    assert (joint[0, 1].item(), joint[0, 0].item()) == pytest.approx((18 / 25, 34 / 25))
    per_layer = gram_of(groups, hidden, "last_token", "per_layer", (2.0, 1.0))[0, 0]
    assert (per_layer[0, 1].item(), per_layer[0, 0].item()) == pytest.approx((2.0, 3.0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_one_change_nothing_and_are_linear(groups, method, norm):
    hidden = windows()
    plain = gram_of(groups, hidden, method, norm)
    torch.testing.assert_close(gram_of(groups, hidden, method, norm, (1.0, 1.0, 1.0)), plain, rtol=1e-13, atol=1e-14)
    alone = [gram_of(groups, hidden, method, norm, tuple(float(i == j) for j in range(3))) for i in range(3)]
    torch.testing.assert_close(sum(alone), plain, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_zero_features_give_zeros_and_what_is_not_finite_stays_in_its_block(groups, method, norm, weights):
    hidden = windows()
    hidden[0, 0, 1] = 0.0
    hidden[1, 2, 3, -1, 1] = torch.inf  # of the layer that has no weight, too
    gram = gram_of(groups, hidden, method, norm, weights)
    assert torch.equal(gram[0, 0, 1], torch.zeros(5, dtype=torch.float64))
    finite = gram.isfinite().flatten(2).all(dim=-1)
    assert not finite[1, 2] and finite.sum() == 5


class Own(FeatureMap):
    """As `mean_pooling`, and then what a test wants."""

    name = "own"
    normalises = "tokens"
    then = staticmethod(lambda vectors: vectors)

    def positions(self, generate_length):
        return range(generate_length)

    def pool(self, rows):
        return self.then(rows.mean(dim=-2))


def wrong(name):
    def raises(vectors):
        raise ValueError("no such row")

    return {
        "shape": (lambda vectors: vectors[..., :-1], "found a float64 tensor [2, 3, 5, 6] on cpu; expected a float64"),
        "dtype": (lambda vectors: vectors.float(), "found a float32 tensor [2, 3, 5, 7]"),
        "kind": (lambda vectors: vectors.tolist(), "found a list"),
        "finite": (
            lambda vectors: vectors.masked_fill(vectors > 0, torch.nan),
            "not finite at row 0, block 0, ",
        ),
        "raises": (raises, "ValueError: no such row"),
    }[name]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalises", ["tokens", "pooled"])
@pytest.mark.parametrize("name", ["shape", "dtype", "kind", "finite", "raises"])
def test_a_map_against_its_contract_is_noted_and_all_collectives_are_still_done(groups, name, normalises, norm):
    entry, faults = Own(), []
    entry.normalises = normalises
    entry.then, words = wrong(name)
    gram = gram_of(groups, windows(), entry, norm, faults=faults)
    assert not gram.any() and len(faults) == 3
    assert words in str(faults[0]) and faults[0].entry is entry
    with pytest.raises(EntryFaultError):
        gram_of(groups, windows(), entry, norm)


def test_rows_that_are_not_finite_are_no_fault_of_a_map(groups):
    hidden, faults = windows(), []
    hidden[0, 1, 2, 0, 0] = torch.nan
    gram = gram_of(groups, hidden, Own(), faults=faults)
    assert not faults and gram[0, 1, 2].isnan().all() and gram[0, 0].isfinite().all()
