"""Evaluate Hugging Face model directories and checkpoint folders on held-out rows, without an optimizer.

On several ranks a model is cut as `parallel.*` says, and replicas have other rows; one process holds it whole.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_mega.apps.evaluated_networks import open_policy, viewed_features
from ebft_mega.apps.evaluation_content import evaluation_content
from ebft_mega.apps.evaluation_inputs import (
    EvaluationRequest,
    check_models,
    held_out_rows,
    main_documents,
    networks,
)
from ebft_mega.apps.evaluation_request import EvaluationGrid, anchor_notes
from ebft_mega.apps.written_evaluation import write_evaluation
from ebft_mega.config.schema import RunConfig
from ebft_mega.evaluation.condition_grid import (
    GridFigures,
    GridSettings,
    ViewedFeatures,
    evaluate_grid,
    gather_grid,
    merge_grid,
)
from ebft_mega.features.pool_check import check_pooling
from ebft_mega.io.progress_bar import track
from ebft_mega.io.standard_streams import print_line
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.planning.model_files import CheckedModel
from ebft_mega.planning.run_plan import check_world
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.types import TokenBatch

BATCHES_PER_STAGE = 4  # micro-batches under way at a time in a pipeline, for each of its stages


def evaluate_models(
    requests: Mapping[str, EvaluationRequest], grid: EvaluationGrid, output: Path
) -> dict[str, Path] | None:
    """Evaluate models one after another on the same rows with the same noise, and write `evaluation.json` of each.

    It holds the `eval/*` means and values per row of the configuration's own condition, and everything that
    `evaluation/conditions.py` lists. Where something is not finite, the file says null and how much was left out.

    Args:
        requests: by the model's name; they differ in the model alone. The files of one without a name lie in `output`
            itself, those of others in a directory of that name.
        output: directory for the files; made if needed.
    Returns:
        Files by name, on the first rank; None on the others, which write and print nothing.
    Raises:
        InputError: files are missing or do not fit together; all problems at once.
        ConfigError: the layout does not fit the models.
    Communication: on several ranks that of `evaluate_grid`, and one gathering of the figures of every row and model.
    """
    for choice in grid.maps:
        check_pooling(choice.config)
    request, world_size = next(iter(requests.values())), int(os.environ.get("WORLD_SIZE", "1"))
    checked, notes = check_models(requests, grid)
    # One process holds a model whole, whatever layout the configuration is for.
    config = grid.config if world_size > 1 else _whole(grid.config)
    _check_layout(config, world_size, requests, checked)
    parallel = config.parallel
    groups = make_process_groups(connect(), parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    for note in [*notes, *anchor_notes(grid)] * groups.is_world_first:
        print_line(f"note: {note}", sys.stdout)
    features = [viewed_features(directory, checked, request, grid, groups) for directory in networks(request, grid)]
    rows = held_out_rows(request, config)
    paths: dict[str, Path] = {}
    for name, each in requests.items():
        policy = open_policy(each.model, checked[each.model].architecture, config, groups, grid.lengths[-1])
        figures = _evaluated(PipelinedModel.of(policy), features, rows, grid, name)
        del policy
        if figures is not None and groups.is_world_first:
            content = evaluation_content(about(each, grid), grid, figures, main_documents(rows))
            paths[name] = write_evaluation(output / name / "evaluation.json", content)
    return paths if groups.is_world_first else None


def about(request: EvaluationRequest, grid: EvaluationGrid) -> dict[str, Any]:
    """What an evaluation is of, for its file."""
    config = grid.config
    return {
        "model": str(request.model),
        "feature_model": str(request.feature_model),
        "data": str(request.data),
        "sequence_length": config.data.sequence_length,
        "rows": request.rows,
        "skipped_rows": request.skip_rows,
        "temperature": config.ebft.temperature,
        "completion_length": config.ebft.generate_max_len,
        "samples": config.ebft.n_samples_per_prompt,
        "longest_completion": grid.lengths[-1],
        "document_masking": config.data.document_masking,
    }


def _evaluated(
    model: PipelinedModel, features: Sequence[ViewedFeatures], rows: TokenBatch, grid: EvaluationGrid, name: str
) -> GridFigures | None:
    """Figures of all rows on the first rank of each data-parallel group, None on the others."""
    config, groups = grid.config, model.groups
    settings = GridSettings(
        plan=grid.plan,
        text=config.block_plan,
        sampling=SamplingSettings.of(config),
        temperatures=grid.temperatures,
        calibration_temperatures=grid.temperatures,
        whitening=config.ebft.reward_whitening,
    )
    own = _own_rows(rows, groups).to(groups.device)
    stages, batches = groups.pipeline_size, own.split(config.train.micro_batch_size)
    together = 1 if stages == 1 else BATCHES_PER_STAGE * stages
    chunks = [batches[first : first + together] for first in range(0, len(batches), together)]
    shown = track(chunks, len(chunks), f"evaluation of {name}" if name else "evaluation")
    parts = [evaluate_grid(model, features, chunk, settings) for chunk in (shown if groups.is_world_first else chunks)]
    return gather_grid(merge_grid(parts), groups.data_parallel)


def _own_rows(rows: TokenBatch, groups: ProcessGroups) -> TokenBatch:
    """This replica's rows, equally many on all replicas: some have filler at their end."""
    each = -(-len(rows.tokens) // groups.data_parallel_size)
    return rows.filled_up(each * groups.data_parallel_size).split(each)[groups.data_parallel_rank]


def _whole(config: RunConfig) -> RunConfig:
    """The configuration of a model in one process."""
    alone = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=alone)})


def _check_layout(
    config: RunConfig,
    world_size: int,
    requests: Mapping[str, EvaluationRequest],
    checked: Mapping[Path, CheckedModel],
) -> None:
    """Check that processes and models can be divided; any number of rows can.

    Raises:
        ConfigError: they cannot.
    """
    train = config.train.model_copy(update={"global_batch_size": config.train.micro_batch_size * world_size})
    config = config.model_copy(update={"train": train})
    policies = dict.fromkeys(each.model for each in requests.values())
    for policy in policies:
        others = (directory for directory in checked if directory not in policies)
        check_world(config, world_size, [checked[directory].architecture for directory in (policy, *others)])
