"""Whether a model directory and a dataset can be benchmarked together."""

from collections.abc import Sequence
from pathlib import Path

from ebft_mega.apps.benchmark.case import BenchCase, BenchModel
from ebft_mega.apps.evaluation_inputs import EvaluationRequest, check_inputs


def check_directory(directory: Path, data: Path, cases: Sequence[BenchCase]) -> None:
    """Check a model and its data as those of an evaluation.

    Raises:
        InputError: everything that is wrong with them, at once.
    """
    longest = max(cases, key=lambda case: case.sequence_length)
    request = EvaluationRequest(directory, directory, data, rows=longest.rows, skip_rows=0)
    check_inputs(request, longest.config(BenchModel.of_directory(directory, data, "float32"), "off"))
