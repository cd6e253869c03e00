"""How many rows of rollouts a model's samples of some data leave to compute, at several n, G and temperatures.

Rollouts are sampled once for each temperature, with the most samples and tokens that are asked for. Fewer samples are
the first ones of those, and fewer tokens their first ones: noise depends on neither number (`rollout/noise.py`).
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ebft_mega.apps.evaluated_networks import open_policy
from ebft_mega.apps.evaluation_inputs import EvaluationRequest, check_inputs, held_out_rows
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.cost_table import OPTION, aligned
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.held_out import EVALUATION_STEP
from ebft_mega.forest import Forest
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.progress_bar import track
from ebft_mega.io.standard_streams import print_line
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import continuations
from ebft_mega.types import TokenBatch

FILE_NAME = "distinct_rows.json"


@dataclass(frozen=True)
class Choices:
    """What is compared: every n with every G and temperature."""

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    temperatures: tuple[float, ...]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        samples: Sequence[int] | None,
        lengths: Sequence[int] | None,
        temperatures: Sequence[float] | None,
    ) -> "Choices":
        """Those that are given, each once; where none is given, the configuration's."""
        ebft = config.ebft
        return cls(
            tuple(sorted(set(samples or [ebft.n_samples_per_prompt]))),
            tuple(sorted(set(lengths or [ebft.generate_max_len]))),
            tuple(sorted(set(temperatures or [ebft.temperature]))),
        )


def measure_distinct_rows(request: EvaluationRequest, choices: Choices, config: RunConfig, output: Path) -> Path:
    """Sample, count, print a table and write it as `distinct_rows.json`.

    Args:
        request: whose feature network gives the cost alone; nothing is computed with it.
        config: geometry, sampling and objective, as in training; n, G and temperature are those of `choices`.
        output: directory for the file; made if needed.
    Raises:
        InputError: files are missing or do not fit together, or rows are too short.
    """
    groups = make_process_groups(connect())
    widest = with_geometry(config, choices.samples[-1], choices.lengths[-1], choices.lengths[-1])
    models, notes = check_inputs(request, widest)
    for note in notes:
        print_line(f"note: {note}", sys.stdout)
    policy = PipelinedModel.of(open_policy(request.model, models[0].architecture, widest, groups))
    batches = held_out_rows(request, widest).to(groups.device).split(config.train.micro_batch_size)
    found: list[dict[str, Any]] = []
    for temperature in choices.temperatures:
        started = time.perf_counter()
        counted: dict[tuple[int, int], list[RolloutNodes]] = {}
        for batch in track(batches, len(batches), f"sampling at temperature {temperature:g}"):
            _count(policy, batch, widest, choices, temperature, counted)
        seconds = time.perf_counter() - started
        print_line(f"temperature {temperature:g}: {request.rows} rows in {seconds:.1f} s", sys.stdout)
        for (samples, length), nodes in sorted(counted.items(), key=lambda item: (item[0][1], item[0][0])):
            of_length = with_geometry(config, samples, length, choices.lengths[-1])
            shape = StepShape.of(of_length, models[0].architecture, models[1].architecture)
            found.append({"temperature": temperature, "n": samples, "G": length, **_figures(shape, nodes)})
    for line in table_lines(found):
        print_line(line, sys.stdout)
    content = {
        "model": str(request.model),
        "data": str(request.data),
        "rows": request.rows,
        "skipped_rows": request.skip_rows,
        "sequence_length": widest.data.sequence_length,
        "stride": widest.ebft.stride,
        "blocks": widest.block_plan.num_blocks,
        "found": found,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / FILE_NAME
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def with_geometry(config: RunConfig, samples: int, length: int, longest: int) -> RunConfig:
    """The configuration with other n and G, and rows cut so that every G has the anchors of the longest one.

    Raises:
        InputError: the rows are too short for it.
    """
    ebft = config.ebft
    room = config.data.sequence_length - longest - ebft.context_length
    if room < 0:
        least = longest + ebft.context_length
        raise InputError([Problem("--lengths", str(longest), f"rows of {config.data.sequence_length}", f"of {least}")])
    sequence_length = config.data.sequence_length - room % ebft.stride - (longest - length)
    sections = {
        "data": config.data.model_copy(update={"sequence_length": sequence_length}),
        "ebft": ebft.model_copy(update={"n_samples_per_prompt": samples, "generate_max_len": length}),
    }
    return config.model_copy(update=sections)


@torch.no_grad()
def _count(
    policy: PipelinedModel,
    batch: TokenBatch,
    widest: RunConfig,
    choices: Choices,
    temperature: float,
    counted: dict[tuple[int, int], list[RolloutNodes]],
) -> None:
    """Sample a micro-batch once, and add every row's nodes for all n and G."""
    plan: BlockPlan = widest.block_plan
    sampling = SamplingSettings(widest.seed, temperature, widest.ebft.top_p)
    (sampled,) = generate_rollouts(policy, [batch], plan, sampling, EVALUATION_STEP)
    held = continuations(batch, plan, plan.document_length(widest.uses_targets))
    for samples in choices.samples:
        tokens = sampled.rollout.tokens[:, :samples]
        forest = Forest.of(tokens, merges=True, continuations=held)
        for length in choices.lengths:
            nodes = RolloutNodes.of_forest(forest.up_to(length).levels, plan.num_blocks)
            counted.setdefault((samples, length), []).extend(nodes)


def _figures(shape: StepShape, nodes: Sequence[RolloutNodes]) -> dict[str, float | None]:
    """Shares, and the work that a row needs with them and without merging, each matrix product once."""
    mean = RolloutNodes.mean(nodes)
    needed = [
        sum(phase.flops.total for phase in cost_of_step(each, "activations").phases.values())
        for each in (shape.with_nodes(mean), shape)
    ]
    return {**asdict(mean.shares(shape.plan)), "flops_per_row": needed[0], "flops_per_row_without_merging": needed[1]}


def table_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every temperature, G and n, and what to give the dry run."""
    head = ("T", "G", "n", "features", "policy", "head", "GFLOP/row", "/ nothing merged", OPTION)
    rows: list[tuple[str, ...]] = [head]
    for line in found:
        shares = [line[name] for name in ("features", "policy", "head") if line[name] is not None]
        with_merging, without = line["flops_per_row"], line["flops_per_row_without_merging"]
        rows.append(
            (
                f"{line['temperature']:g}",
                str(line["G"]),
                str(line["n"]),
                *("" if line[name] is None else f"{line[name]:.3f}" for name in ("features", "policy", "head")),
                f"{with_merging / 1e9:,.4g}",
                f"{with_merging / without:.3f}",
                " ".join(f"{share:.4f}" for share in shares),
            )
        )
    return aligned(rows)
