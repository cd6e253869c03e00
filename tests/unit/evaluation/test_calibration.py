"""Brier score and calibration error against loops over the full softmax."""

import math

import pytest
import torch

from ebft_mega.evaluation.calibration import (
    TokenCalibration,
    calibration_of,
    calibration_of_rows,
    expected_calibration_error,
    token_calibration,
)
from ebft_mega.evaluation.conditions import CONFIDENCE_BINS
from ebft_mega.parallel.vocabulary import VocabularySlice

ROWS, TARGETS, VOCABULARY = 3, 7, 67
TEMPERATURES = (0.4, 1.0, 1.7)


def case(groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(ROWS * TARGETS, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS * TARGETS,), generator=generator)
    targets[::2] = logits[::2].argmax(dim=-1)  # half of them are right
    return logits.to(dtype), targets, VocabularySlice.of(VOCABULARY, groups)


def naive(logits, target, temperature):
    """Brier score, confidence and whether the likeliest token is the target, of one token."""
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    shares = [weight / sum(weights) for weight in weights]
    brier = sum((share - (token == target)) ** 2 for token, share in enumerate(shares))
    return brier, max(shares), float(shares.index(max(shares)) == target)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_tokens_against_a_loop_over_the_softmax(groups, dtype, tolerance):
    logits, targets, own_slice = case(groups, dtype)
    before = logits.clone()
    found = token_calibration(logits, targets, TEMPERATURES, own_slice)
    assert torch.equal(logits, before) and found.dtype == dtype
    for index, temperature in enumerate(TEMPERATURES):
        tokens = calibration_of(found, index)
        for place in range(len(targets)):
            expected = naive(before[place].double(), int(targets[place]), temperature)
            got = tuple(float(part[place]) for part in (tokens.brier, tokens.confidence, tokens.is_right))
            assert got == pytest.approx(expected, abs=tolerance)


def test_of_equally_likely_tokens_the_first_is_the_answer(groups):
    logits = torch.zeros(3, VOCABULARY)
    logits[:, [5, 9]] = 1.0
    found = token_calibration(logits, torch.tensor([5, 9, 0]), (1.0,), VocabularySlice.of(VOCABULARY, groups))
    assert found[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_rows_and_the_error_against_a_loop_over_bins(groups):
    logits, targets, own_slice = case(groups)
    found = token_calibration(logits, targets, TEMPERATURES, own_slice).unflatten(0, (ROWS, TARGETS))
    for index, temperature in enumerate(TEMPERATURES):
        sums = calibration_of_rows(calibration_of(found, index))
        bins = [[] for _ in range(CONFIDENCE_BINS)]
        for row in range(ROWS):
            briers = []
            for place in range(row * TARGETS, (row + 1) * TARGETS):
                brier, confidence, is_right = naive(logits[place], int(targets[place]), temperature)
                briers.append(brier)
                bins[min(math.ceil(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS) - 1].append((confidence, is_right))
            assert float(sums["eval/brier"][row]) == pytest.approx(sum(briers) / TARGETS, abs=1e-12)
        tokens, confidence, correct = (
            sums[name].sum(dim=0).tolist() for name in ("eval/bin_tokens", "eval/bin_confidence", "eval/bin_correct")
        )
        assert tokens == [len(each) for each in bins] and len([each for each in bins if each]) > 3
        assert confidence == pytest.approx([sum(sure for sure, _ in each) for each in bins], abs=1e-12)
        assert correct == [sum(right for _, right in each) for each in bins]
        gaps = [
            len(each) * abs(sum(sure for sure, _ in each) / len(each) - sum(right for _, right in each) / len(each))
            for each in bins
            if each
        ]
        error = expected_calibration_error(tokens, confidence, correct)
        assert error == pytest.approx(sum(gaps) / (ROWS * TARGETS), abs=1e-12) and error > 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_logit_that_is_not_finite_is_in_no_bin(groups, value):
    logits, targets, own_slice = case(groups)
    logits[TARGETS + 2, 11] = value
    found = token_calibration(logits, targets, (1.0,), own_slice)
    assert found[TARGETS + 2].isnan().all() and found.isnan().any(dim=-1).sum() == 1
    sums = calibration_of_rows(calibration_of(found.unflatten(0, (ROWS, TARGETS)), 0))
    assert sums["eval/brier"].isnan().tolist() == [False, True, False]
    assert sums["eval/bin_tokens"].sum(dim=1).tolist() == [TARGETS, 0, TARGETS]
    assert all(sums[name].isfinite().all() for name in ("eval/bin_confidence", "eval/bin_correct"))


def test_confidences_at_the_ends_of_bins():
    """A bin takes its upper end; nothing is sure of less than 0 or more than 1."""
    confidence = torch.tensor([[1e-9, 1 / 15, 1 / 15 + 1e-9, 1.0, 1.0 + 1e-9]], dtype=torch.float64)
    tokens = TokenCalibration(torch.zeros_like(confidence), confidence, torch.zeros_like(confidence))
    counts = calibration_of_rows(tokens)["eval/bin_tokens"][0].tolist()
    assert counts == [2, 1, *[0] * 12, 2]
    assert expected_calibration_error([0] * 15, [0.0] * 15, [0.0] * 15) is None
