"""What `evaluation.json` says: the figures of a model under every condition, with their means."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebft_mega.apps.evaluation_request import EvaluationGrid
from ebft_mega.evaluation.calibration import expected_calibration_error
from ebft_mega.evaluation.condition_grid import Figures, GridFigures
from ebft_mega.evaluation.held_out import CROSS_ENTROPY, Evaluation

BINS = ("eval/bin_tokens", "eval/bin_confidence", "eval/bin_correct")


def evaluation_content(
    about: Mapping[str, Any], grid: EvaluationGrid, figures: GridFigures, row_groups: Sequence[str]
) -> dict[str, Any]:
    """The contents of the file, as `evaluation/conditions.py` lists them.

    Args:
        about: what was evaluated, under names of its own.
        row_groups: [R], the document or package of each row.
    """
    own = figures.conditions[grid.own]
    evaluation = Evaluation(figures.text.per_row | own.per_row, (), own.left_out)
    return {
        **about,
        **evaluation.means,
        "per_row": evaluation.per_row,
        "row_groups": list(row_groups),
        "conditions": [
            {
                "temperature": condition.temperature,
                "completion_length": condition.completion_length,
                "features": condition.features,
                "means": _means(found),
                "blocks_left_out": found.left_out,
                "per_row": found.per_row,
                "per_position": found.per_position,
            }
            for condition, found in sorted(figures.conditions.items())
        ],
        # The configuration's temperature and feature map, for whoever looks for a length alone.
        "by_completion_length": {
            str(condition.completion_length): _means(found)
            for condition, found in sorted(figures.conditions.items())
            if (condition.temperature, condition.features) == (grid.own.temperature, grid.own.features)
        },
        "feature_maps": {choice.name: choice.words for choice in grid.maps},
        "calibration": [
            {"temperature": temperature, "means": _calibration_means(found), "per_row": found.per_row}
            for temperature, found in zip(grid.temperatures, figures.calibration, strict=True)
        ],
        "ce_per_position": figures.text.per_position[CROSS_ENTROPY],
    }


def _means(found: Figures) -> dict[str, float | None]:
    """Means over the rows that have a figure; None where something was left out of all of them."""
    # The cross-entropy has a place of its own.
    means = Evaluation({CROSS_ENTROPY: [], **found.per_row}, (), found.left_out).means
    return {name: value if math.isfinite(value) else None for name, value in means.items() if name in found.per_row}


def _calibration_means(found: Figures) -> dict[str, float | None]:
    known = [value for value in found.per_row["eval/brier"] if value is not None]
    sums = [[sum(of_bin) for of_bin in zip(*found.per_row[name], strict=True)] for name in BINS]
    return {
        "eval/brier": sum(known) / len(known) if known else None,
        "eval/calibration_error": expected_calibration_error(*sums),
    }
