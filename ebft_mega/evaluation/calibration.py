"""How far a policy's probabilities of the text's next tokens can be believed: Brier score and calibration error."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.evaluation.conditions import CONFIDENCE_BINS
from ebft_mega.model.head import own_columns
from ebft_mega.parallel.vocabulary import VocabularySlice


@dataclass(frozen=True)
class TokenCalibration:
    """Of every target at one temperature."""

    brier: Tensor  # [...], |p - onehot|^2; NaN where a logit was not finite
    confidence: Tensor  # [...], probability of the likeliest token
    is_right: Tensor  # [...], 1 where the target is that token, else 0


def token_calibration(
    logits: Tensor, targets: Tensor, temperatures: Sequence[float], own_slice: VocabularySlice
) -> Tensor:
    """Compare next-token distributions at several temperatures with the tokens that came.

    Args:
        logits: [N, width], this rank's columns, any float dtype, without gradient; targets: int64 [N], ids in [0, V).
    Returns:
        float32 [N, 1 + 2 * temperatures] (float64 for float64 logits), the same on all ranks: 1 where the target is
        the likeliest token (of equals that of the lowest id), else 0; then for each temperature Brier score and
        confidence. All of a row with a logit that is not finite on any rank is NaN. `TokenCalibration` by
        `calibration_of`.
    Communication: with several tensor-parallel ranks one all-gather of 16 bytes per row, and one all-reduce of
        4 * (1 + 2 * temperatures) bytes per row (8 a number for float64); none for one rank.
    Memory: three copies of the logits in float32.
    Source: Brier, Verification of forecasts expressed in terms of probability (1950).
    """
    values = own_slice.exclude_padding_(logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True))
    marked = own_slice.has_nan_or_minus_infinity(values)
    token = values.argmax(dim=-1, keepdim=True)
    best = torch.cat((values.gather(-1, token), own_slice.first + token), dim=-1).to(torch.float64)
    bests, tokens = own_slice.gather(best).unbind(dim=-1)  # [ranks, N]
    winner = bests.argmax(dim=0, keepdim=True)
    largest = bests.gather(0, winner)[0, :, None].to(values.dtype)
    marked = marked | ~largest[:, 0].isfinite()
    is_right = (tokens.gather(0, winner)[0] == targets).to(values.dtype)
    values -= largest
    column, is_own = own_columns(targets[:, None], own_slice)
    sums = [values.gather(-1, column).masked_fill(~is_own, 0.0)]
    for temperature in temperatures:
        exponentials = (values / temperature).exp_()
        sums += [exponentials.sum(dim=-1, keepdim=True), exponentials.square_().sum(dim=-1, keepdim=True)]
    chosen, *masses = own_slice.sum(torch.cat(sums, dim=-1).masked_fill(marked[:, None], torch.nan)).unbind(dim=-1)
    found = [is_right.masked_fill(chosen.isnan(), torch.nan)]
    for temperature, mass, squares in zip(temperatures, masses[::2], masses[1::2], strict=True):
        of_target = (chosen / temperature).exp() / mass
        found += [1.0 - 2.0 * of_target + squares / mass.square(), 1.0 / mass]
    return torch.stack(found, dim=-1)


def calibration_of(found: Tensor, index: int) -> TokenCalibration:
    """What `token_calibration` has found [..., 1 + 2 * temperatures] at one of its temperatures."""
    return TokenCalibration(found[..., 1 + 2 * index], found[..., 2 + 2 * index], found[..., 0])


def calibration_of_rows(tokens: TokenCalibration) -> dict[str, Tensor]:
    """Sums of rows by the names of `conditions.py`: `eval/brier` float64 [B], the others float64 [B, CONFIDENCE_BINS].

    Bin b takes confidences in (b / CONFIDENCE_BINS, (b + 1) / CONFIDENCE_BINS]. A row with a target that is NaN has
    NaN and no tokens in any bin.

    Args:
        tokens: of targets [B, X].
    Communication: none.
    Source: Guo et al. (arXiv 1706.04599), expected calibration error.
    """
    brier, confidence, is_right = (
        part.to(torch.float64) for part in (tokens.brier, tokens.confidence, tokens.is_right)
    )
    means = brier.mean(dim=1)
    counts = means.isfinite()[:, None]
    places = (confidence * CONFIDENCE_BINS).nan_to_num(nan=1.0).ceil().to(torch.int64).clamp(1, CONFIDENCE_BINS) - 1
    of_bins = F.one_hot(places, CONFIDENCE_BINS).to(torch.float64) * counts[..., None]  # [B, X, bins]

    def summed(values: Tensor) -> Tensor:
        return (values.masked_fill(~counts, 0.0)[:, None] @ of_bins)[:, 0]

    return {
        "eval/brier": means,
        "eval/bin_tokens": of_bins.sum(dim=1),
        "eval/bin_confidence": summed(confidence),
        "eval/bin_correct": summed(is_right),
    }


def expected_calibration_error(
    tokens: Sequence[float], confidence: Sequence[float], correct: Sequence[float]
) -> float | None:
    """The mean distance of confidence and accuracy over bins, weighted by their tokens.

    Args:
        tokens, confidence, correct: of each bin, as `calibration_of_rows` sums them up.
    Returns:
        In [0, 1]; None without any token.
    """
    total = sum(tokens)
    if not total:
        return None
    return sum(abs(sure - right) for sure, right in zip(confidence, correct, strict=True)) / total
