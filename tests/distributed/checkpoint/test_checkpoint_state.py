"""Policy and optimizer state saved at one parallel layout and restored at another are equal bit for bit."""

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape, stage_parameters
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.snapshot import StateShard, critic_shards, take_snapshot, write_state_shards
from ebft_mega.checkpoint.tensor_index import TensorIndex, coverage_problems, merge_indices
from ebft_mega.checkpoint.tensors import (
    CheckpointTensors,
    CheckpointWeights,
    SavedState,
    check_state,
    check_tensors,
    restore_critic,
    restore_engine,
)
from ebft_mega.critic.critic_record import CRITIC_STATE
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights, WeightSource
from ebft_mega.parallel.deepspeed_adapter.deepspeed_engine import DeepSpeedEngine
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.optimizers.adamw import AdamW
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine, make_engine
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.train.trainer import Trainer
from tests.conftest import tiny_config
from tests.distributed.parallel.test_engine_state import computed_with, same, same_state, state_of
from tests.distributed.parallel.test_zero_traps import replaced
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import CRITIC, LEARNING_RATE, Case, Layout, config_of, rows_of_step
from tests.distributed.traffic import PhaseNames, Traffic
from tests.memory import peak_tensor_bytes

FLOAT32 = Case("float32", ("train.micro_batch_size=2", "train.weight_decay=0.1"))
BFLOAT16 = replace(FLOAT32, name="bfloat16", overrides=(*FLOAT32.overrides, "train.dtype=bfloat16"))
MODELS = {
    "llama": Architecture.from_hf(tiny_config("llama"), "test"),
    "qwen2": Architecture.from_hf(tiny_config("qwen2", tied=False), "test"),
    "qwen3": Architecture.from_hf(tiny_config("qwen3", tied=False), "test"),
}
KINDS = ("weights", *AdamW.moments)


def engine_of(architecture: Architecture, groups: ProcessGroups, source: WeightSource, **options) -> ZeroEngine:
    dtype = options.pop("dtype", torch.float32)
    settings = OptimizerSettings((0.9, 0.95), 0.1, 0.5, dtype, 1, **{"rule": AdamW()} | options)
    shape = StageShape.of_policy(architecture, groups.pipeline_rank, groups.pipeline_size)
    return make_engine(
        partial(Stage, architecture, shape, groups, settings.dtype),
        lambda stage, gathered, is_reader: load_weights(stage, source, gathered, is_reader),
        Stage.parameter_roles,
        settings,
        groups,
    )


def written_by_all(folder: Path, shards: tuple[StateShard, ...]) -> TensorIndex:
    """Every rank's shards written; the index of all of them, on every rank."""
    written = write_state_shards(folder, dist.get_rank(), shards)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, written.index)
    index = merge_indices(parts)
    assert coverage_problems(index) == []
    (folder / "tensors.json").write_text(index.to_json())
    dist.barrier()
    return index


def read(folder: Path) -> CheckpointTensors:
    return CheckpointTensors(folder, TensorIndex.from_json((folder / "tensors.json").read_text()))


def whole_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    tensors = read(folder)
    return {
        kind: {
            name: tensors.part(kind, name, tuple(slice(0, size) for size in tensor.shape))
            for name, tensor in tensors.index.kinds[kind].items()
        }
        for kind in tensors.index.kinds
    }


# --- resuming at the same layout


def take(trainer: Trainer, case: Case, steps: range) -> list[dict[str, float]]:
    metrics = []
    for step in steps:
        result = train_step(trainer, rows_of_step(step, trainer.groups, case), step, LEARNING_RATE)
        found = step_metrics(trainer, result, LEARNING_RATE)
        metrics.append({key: found[key] for key in ("train/loss", "train/grad_norm", "ebft/alignment")})
    return metrics


def stop_and_resume(layout: Layout, case: Case, directory: str, num_steps: int) -> dict[str, bool]:
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    config = config_of(case, directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    take(trainer, case, range(num_steps))
    shards = take_snapshot(trainer.engine, trainer.stage)
    copies = [shard.tensor.clone() for shard in shards]
    folder = Path(directory) / f"{layout}-{case.name}"
    index = written_by_all(folder, shards)
    tensors = CheckpointTensors(folder, index)
    check_tensors(tensors, architecture, KINDS)
    twin = build_trainer(config, architecture, architecture, groups, policy_weights=CheckpointWeights(tensors))
    restore_engine(twin.engine, twin.stage, tensors, trainer.engine.applied_updates)
    checks = {
        "same state": same_state(state_of(twin.engine), state_of(trainer.engine)),
        "same parameters": same(computed_with(twin.engine), computed_with(trainer.engine)),
    }
    more = range(num_steps, 2 * num_steps)
    checks["same metrics"] = take(twin, case, more) == take(trainer, case, more)
    checks["same state after more steps"] = same_state(state_of(twin.engine), state_of(trainer.engine))
    checks["same parameters after more steps"] = same(computed_with(twin.engine), computed_with(trainer.engine))
    checks["something was learned"] = trainer.engine.applied_updates == twin.engine.applied_updates == 2 * num_steps
    unchanged = all(torch.equal(copy, shard.tensor) for copy, shard in zip(copies, shards, strict=True))
    return {**checks, "shards are copies": unchanged and read(folder).index == index}


Going = tuple[Layout, Case]


def run_all(goings: tuple[Going, ...], directory: str, num_steps: int) -> dict[str, dict[str, bool]]:
    return {f"{layout} {case.name}": stop_and_resume(layout, case, directory, num_steps) for layout, case in goings}


TWO_RANKS = (Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2))
BOTH = (FLOAT32, BFLOAT16)


def at_stages(layouts: tuple[Layout, ...], *stages: int) -> tuple[Going, ...]:
    return tuple((replace(layout, zero_stage=stage), case) for layout in layouts for stage in stages for case in BOTH)


SAME_LAYOUT = {
    "one rank": ((Layout(1, 1, 1, zero_stage=0), FLOAT32), (Layout(1, 1, 1), BFLOAT16)),
    "two ranks": ((TWO_RANKS[0], FLOAT32), *((layout, BFLOAT16) for layout in TWO_RANKS)),
    "one rank, all stages": at_stages((Layout(1, 1, 1),), 0, 1, 2, 3),
    "two ranks, all stages": at_stages(TWO_RANKS, 0, 1, 2, 3),
    "eight ranks": at_stages((Layout(2, 2, 2),), 3, 2, 1, 0),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "stages" in name or "eight" in name else [])
        for name in SAME_LAYOUT
    ],
)
def test_resuming_from_a_checkpoint_is_not_having_stopped(name, tmp_path):
    """Losses, norms, weights, moments and the parameters of passes, bit for bit."""
    goings, num_steps = SAME_LAYOUT[name], 1 if name in ("one rank", "two ranks") else 2
    for found in run_ranks(goings[0][0].world_size, run_all, goings, str(tmp_path), num_steps):
        for case, checks in found.items():
            assert all(checks.values()), (case, [check for check, passed in checks.items() if not passed])


# --- a token critic beside the policy

# Three vectors of each layer; used from the second step on.
WITH_CRITIC = Case("token-critic", (*CRITIC, "train.micro_batch_size=2", "ebft.embed_method=concat"))


def learned(trainer: Trainer) -> dict[str, Tensor]:
    """Numbers of this rank's critic."""
    state = trainer.critic.state
    return {
        **{"table": state.table, "squares": state.statistics.squares, "products": state.statistics.products},
        **{"prefix": state.weights.prefix, "token": state.weights.token, "batches": torch.tensor(state.batches)},
    }


def resumed(layout: Layout, saved: SavedState, directory: str) -> Trainer:
    """A trainer of a checkpoint at a layout."""
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    config = config_of(WITH_CRITIC, directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    check_state(saved.tensors, config, architecture, saved.critic)
    trainer = build_trainer(
        config, architecture, architecture, groups, policy_weights=saved.weights, token_table=saved.token_table()
    )
    restore_engine(trainer.engine, trainer.stage, saved.tensors, saved.applied_updates)
    restore_critic(trainer.critic, trainer.own_channels, saved)
    return trainer


def stop_and_resume_critic(layout: Layout, others: tuple[Layout, ...], directory: str) -> dict[str, bool]:
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    config = config_of(WITH_CRITIC, directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    take(trainer, WITH_CRITIC, range(2))

    def snapshot(found: Trainer) -> tuple[StateShard, ...]:
        shards = critic_shards(found.critic.state, found.own_channels, found.groups)
        return (*take_snapshot(found.engine, found.stage), *shards)

    folder = Path(directory) / "first"
    shards = snapshot(trainer)
    copies = [shard.tensor.clone() for shard in shards]
    saved = SavedState(CheckpointTensors(folder, written_by_all(folder, shards)), 2, trainer.critic_record)
    twin = resumed(layout, saved, directory)
    checks = {"same critic": same(learned(twin), learned(trainer)), "it was used": saved.critic.batches == 2}
    more = range(2, 4)
    checks["same metrics"] = take(twin, WITH_CRITIC, more) == take(trainer, WITH_CRITIC, more)
    checks["same critic after more steps"] = same(learned(twin), learned(trainer))
    checks["same parameters after more steps"] = same(computed_with(twin.engine), computed_with(trainer.engine))
    unchanged = all(torch.equal(copy, shard.tensor) for copy, shard in zip(copies, shards, strict=True))
    checks["shards stay as they are"] = unchanged and trainer.critic.state.batches == 4
    for number, other in enumerate(others):
        again = Path(directory) / f"again-{number}"
        index = written_by_all(again, snapshot(resumed(other, saved, directory)))
        checks[f"same tensors at {other}"] = index.kinds[CRITIC_STATE].keys() == saved.critic.shapes.keys() and all(
            torch.equal(saved.tensors.whole(kind, name), CheckpointTensors(again, index).whole(kind, name))
            for kind, tensors in index.kinds.items()
            for name in tensors
        )
    return checks


@pytest.mark.parametrize(
    ("layout", "others"),
    [
        (Layout(1, 1, 2), (Layout(1, 2, 1),)),
        pytest.param(Layout(1, 2, 1), (Layout(1, 1, 2),), marks=pytest.mark.slow),
        pytest.param(Layout(2, 1, 1, zero_stage=1), (Layout(1, 1, 2), Layout(1, 2, 1)), marks=pytest.mark.slow),
        # Three layers are read: the last of four stages has none of them.
        pytest.param(Layout(2, 2, 1), (Layout(1, 1, 4), Layout(4, 1, 1)), marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else "then " + " and ".join(map(str, value)),
)
def test_a_critic_is_what_it_was_and_the_same_at_another_layout(layout, others, tmp_path):
    """Statistics, weights, losses and parameters bit for bit; whole statistics at another layout, too."""
    for checks in run_ranks(layout.world_size, stop_and_resume_critic, layout, others, str(tmp_path)):
        assert all(checks.values()), [check for check, passed in checks.items() if not passed]


# --- from one layout to another


def made_up_state(folder: Path, architecture: Architecture, kinds: tuple[str, ...] = KINDS) -> None:
    """A checkpoint of random bits, zeros of both signs among them, in one file per kind."""
    generator = torch.Generator().manual_seed(5)
    shards = []
    for kind in kinds:
        for name, shape in hf_shapes(architecture).items():
            tensor = torch.randn(shape, generator=generator)
            tensor.view(-1)[:3] = torch.tensor([-0.0, 0.0, -1e-45])
            shards.append(StateShard(kind, name, (0,) * len(shape), shape, tensor))
    index = write_state_shards(folder, 0, shards).index
    (folder / "tensors.json").write_text(index.to_json())


@dataclass(frozen=True)
class Passage:
    """What a snapshot at one layout was, on one rank."""

    num_bytes: int  # of this rank's shards
    peak_bytes: int
    most_at_once: int  # parameters that were whole at once, here and while the state was read
    largest_bytes: int  # of the stage's parameters
    elements: int  # of the stage
    padded: int  # with the padding to partitions of equal length
    communicated: dict[tuple[str, str, str], int]
    coordinate: tuple[int, int]


def whole_at_once(engine: ZeroEngine, function: Callable[[], object]) -> int:
    """The most parameters whose state a function has whole at once; masters that are whole anyway do not count."""
    alive: list[weakref.ref] = []
    most = 0
    state_tensors, set_state = engine.state_tensors, engine.set_state

    def count(value: Tensor) -> None:
        nonlocal most
        deadline = time.monotonic() + 1.0  # a communication thread may let go of the last one a moment later
        while any(known() is not None for known in alive) and time.monotonic() < deadline:
            time.sleep(0.0005)
        alive[:] = [*(known for known in alive if known() is not None), weakref.ref(value)]
        most = max(most, len(alive))

    def counted_tensors(kind):
        for name, value in state_tensors(kind):
            if isinstance(engine, DeepSpeedEngine):
                count(value)
            yield name, value
            del value

    def counted_set(kind, parameter, value):
        count(value)
        set_state(kind, parameter, value)

    with replaced(engine, "state_tensors", counted_tensors), replaced(engine, "set_state", counted_set):
        function()
    return max(most, 1)


def pass_on(
    source: str, layouts: tuple[Layout, ...], dtypes: tuple[torch.dtype, ...], name: str, **options
) -> list[Passage]:
    """Read a checkpoint at a layout, write it, read that at the next one, and so on.

    Args:
        options: of the engine's settings.
    """
    device = connect()
    folder, passages = Path(source), []
    for number, (layout, dtype) in enumerate(zip(layouts, dtypes, strict=True)):
        groups = make_process_groups(device, layout.tensor, layout.pipeline)
        tensors = read(folder)
        options |= {"dtype": dtype, "zero_stage": layout.zero_stage}
        engine = engine_of(MODELS[name], groups, CheckpointWeights(tensors), **options)
        stage = engine.module
        most = whole_at_once(engine, partial(restore_engine, engine, stage, tensors, number + 1))
        assert engine.applied_updates == number + 1
        shards, peak = peak_tensor_bytes(lambda: take_snapshot(engine, stage))  # noqa: B023
        with Traffic(groups, PhaseNames()) as traffic:
            most = max(most, whole_at_once(engine, partial(take_snapshot, engine, stage)))
        folder = Path(f"{source}-{number}")
        written_by_all(folder, shards)
        sizes = [math.prod(shape) for shape in engine.parameter_shapes().values()]
        ranks = groups.data_parallel_size
        expected = stage_parameters(MODELS[name], stage.shape, groups.tensor_parallel_size)
        assert sum(sizes) == expected
        passages.append(
            Passage(
                num_bytes=sum(shard.tensor.nbytes for shard in shards),
                peak_bytes=peak,
                most_at_once=most,
                largest_bytes=4 * max(sizes),
                elements=sum(sizes),
                padded=sum(-(-size // ranks) * ranks for size in sizes),
                communicated=dict(traffic.bytes),
                coordinate=(groups.tensor_parallel_rank, groups.pipeline_rank),
            )
        )
    return passages


CHAINS = {
    "two ranks": (Layout(2, 1, 1), Layout(1, 2, 1, zero_stage=0), Layout(1, 1, 2, zero_stage=2)),
    "two ranks again": (Layout(1, 1, 2), Layout(2, 1, 1, zero_stage=1), Layout(1, 2, 1), Layout(2, 1, 1, zero_stage=0)),
    "four ranks": (Layout(1, 4, 1, zero_stage=1), Layout(2, 1, 2), Layout(2, 2, 1, zero_stage=2), Layout(4, 1, 1)),
    "eight ranks": (Layout(2, 2, 2), Layout(2, 4, 1, zero_stage=1), Layout(2, 2, 2, zero_stage=0), Layout(2, 1, 4)),
}
# Padded vocabulary wherever there is tensor parallelism: 131 tokens are no multiple of anything.
MOVES = [(chain, name) for chain in CHAINS for name in MODELS]


@cache
def moved(chain: str, name: str, directory: str) -> tuple[Path, list[list[Passage]]]:
    """The folder of the first checkpoint of a chain, and what each rank saw; run once for several tests."""
    source = Path(directory) / f"{chain}-{name}".replace(" ", "-")
    made_up_state(source, MODELS[name])
    layouts = CHAINS[chain]
    dtypes = tuple(torch.bfloat16 if number % 2 else torch.float32 for number in range(len(layouts)))
    return source, run_ranks(layouts[0].world_size, pass_on, str(source), layouts, dtypes, name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("moves"))


every_move = pytest.mark.parametrize(
    ("chain", "name"),
    [pytest.param(*move, marks=[] if move[0] == "two ranks" else [pytest.mark.slow]) for move in MOVES],
)


@every_move
def test_state_moves_between_layouts_stages_and_precisions_bit_for_bit(chain, name, directory):
    source, _ = moved(chain, name, directory)
    expected = whole_tensors(source)
    for number in range(len(CHAINS[chain])):
        assert same_state(whole_tensors(Path(f"{source}-{number}")), expected), CHAINS[chain][number]


@every_move
def test_a_snapshot_costs_what_its_docstring_says(chain, name, directory):
    _, by_rank = moved(chain, name, directory)
    for number, layout in enumerate(CHAINS[chain]):
        passages = [found[number] for found in by_rank]
        # Every element once, and shared fairly among the data-parallel ranks of a coordinate.
        assert sum(passage.num_bytes for passage in passages) == 12 * MODELS[name].num_parameters
        for passage in passages:
            peers = [other.num_bytes for other in passages if other.coordinate == passage.coordinate]
            assert len(peers) == layout.data
            assert passage.num_bytes <= sum(peers) / len(peers) + passage.largest_bytes
            if layout.data == 1 and layout.zero_stage == 0:  # what a communication thread gives back counts as held
                assert passage.peak_bytes <= passage.num_bytes + 2 * passage.largest_bytes + 4096, str(layout)
            assert passage.most_at_once == 1, str(layout)
            expected = {}
            if layout.zero_stage in (1, 2):
                expected = {("outside", "data_parallel", "all-reduce"): 12 * passage.elements}
            if layout.zero_stage == 3:
                expected = {("outside", "data_parallel", "all-gather"): 12 * passage.padded}
            assert passage.communicated == expected, str(layout)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_move
def test_torch_reads_the_weights_as_a_distributed_checkpoint(chain, name, directory):
    source, _ = moved(chain, name, directory)
    expected = whole_tensors(source)["weights"]
    for number in range(len(CHAINS[chain])):
        found = {tensor: torch.zeros(shape) for tensor, shape in hf_shapes(MODELS[name]).items()}
        reader = HuggingFaceStorageReader(f"{source}-{number}/weights")
        dcp.load(found, storage_reader=reader, no_dist=True)
        assert same(found, expected), CHAINS[chain][number]


# --- a fresh engine


def fresh_snapshot(directory: str) -> bool:
    """Before the first update moments are zeros, and resuming from them is beginning."""
    groups = make_process_groups(connect())
    architecture = MODELS["llama"]
    engine = engine_of(architecture, groups, RandomWeights(architecture, 1), zero_stage=1)
    shards = take_snapshot(engine, engine.module)
    index = written_by_all(Path(directory), shards)
    tensors = CheckpointTensors(Path(directory), index)
    check_tensors(tensors, architecture, KINDS)
    restore_engine(engine, engine.module, tensors, 0)
    assert engine.applied_updates == 0
    return not any(shard.tensor.any() for shard in shards if shard.kind != "weights")


def test_a_snapshot_before_the_first_update(tmp_path):
    assert all(run_ranks(1, fresh_snapshot, str(tmp_path)))
