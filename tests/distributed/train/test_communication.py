"""Bytes that cross ranks in one optimizer step equal the formulas of docs/parallelism.md exactly."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import yaml
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape, split_layers, stage_parameters
from ebft_mega.block_plan import BlockPlan
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.step import train_step
from ebft_mega.types import TokenBatch
from tests.distinct_prefixes import prefixes_by_level
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import GLOBAL_BATCH, LEARNING_RATE, TEXT, Case, Layout, config_of, rows_of_step
from tests.distributed.traffic import PhaseNames, Traffic

FLOAT32, FLOAT64, INT64 = 4, 8, 8
B, P, N, K, G = 1, 24, 3, 5, 4  # of the tests' configuration: rows of a micro-batch, tokens, samples, blocks, generated
H, LAYERS, DEPTH, ANCHOR = 32, 5, 3, 20

PLAIN = Case("rollouts only", ("ebft.ce_coef=0",))
MEAN = Case("mean pooling", ("ebft.ce_coef=0", "ebft.embed_method=mean_pooling"))
PER_LAYER = Case("per layer, entropy", ("ebft.ce_coef=0", "ebft.entropy_coef=0.1", "ebft.feature_norm=per_layer"))
SEPARATE = Case("a separate forward pass", ("ebft.ce_coef=0", "learn.reuse_rollout=off"))
ACTIVATIONS = Case(
    "saved activations", ("ebft.ce_coef=0", "learn.reuse_rollout=activations", "zero.hold_parameters=step")
)
RANK = 7  # numbers of a token's vector
# Used in the second step, as the first one has fitted it.
CRITIC = Case(
    "token critic",
    (
        *("ebft.ce_coef=0", "ebft.advantage_estimator=token_critic", "ebft.use_whitening=false"),
        *("ebft.embed_method=mean_pooling", "ebft.alignment=inner_product"),
        *("options.token_critic.warmup_batches=1", f"options.token_critic.rank={RANK}"),
    ),
)


@dataclass(frozen=True)
class Nodes:
    """How much is distinct among a micro-batch's rollouts."""

    by_level: tuple[int, ...]  # nodes of 1, 2, ..., G tokens
    predicting: int  # prefixes of 1, 2, ..., G - 1 tokens, those too that the document holds

    @classmethod
    def of(cls, rollouts: Tensor, batch: TokenBatch, document: int) -> "Nodes":
        """Of rollouts [B, n, K, G], counted one prefix at a time."""
        levels = prefixes_by_level(rollouts, batch, BlockPlan(P, 4, 4, G, N), document)
        predicting = sum(len(level.prefixes) for level in levels[:-1])
        return cls(tuple(len(level.nodes) for level in levels), predicting)

    @property
    def fed_back(self) -> int:
        """All but the last tokens."""
        return sum(self.by_level[:-1])

    def read(self, tokens: int) -> int:
        """Rows that features of the last so many tokens of each window are made of; windows do not overlap."""
        return B * K * tokens + sum(self.by_level[G - tokens :])


def one_step(layout: Layout, case: Case, directory: str) -> tuple[dict, dict, list[Nodes]]:
    """Calls, bytes and nodes of the second step (the first has DeepSpeed's start-up in it), on this rank."""
    device = connect()
    if layout.sequence_parallel:
        torch.cuda.current_device = lambda: device  # as in `steps.run_cases`
    groups = make_process_groups(device, layout.tensor, layout.pipeline)
    config = config_of(case, directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    phases = PhaseNames()
    trainer = replace(build_trainer(config, architecture, architecture, groups), timers=phases)
    train_step(trainer, rows_of_step(0, groups), 0, LEARNING_RATE)
    with Traffic(groups, phases) as traffic:
        result = train_step(trainer, rows_of_step(1, groups), 1, LEARNING_RATE)
    nodes = [
        Nodes.of(experience.rollout.tokens, batch, P - 1 if case is PER_LAYER else ANCHOR)
        for experience, batch in zip(result.experiences, result.micro_batches, strict=True)
    ]
    return dict(traffic.calls), dict(traffic.bytes), nodes


@cache
def measured(layout: Layout, case: Case, directory: str) -> list[tuple[dict, dict, list[Nodes]]]:
    return run_ranks(layout.world_size, one_step, layout, case, directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("communication"))


def expected_bytes(layout: Layout, case: Case, stage: int, nodes: list[Nodes]) -> dict[tuple[str, str, str], int]:
    """The formulas for one rank of a stage, without the data-parallel group; zeros are left out."""
    assert len(nodes) == GLOBAL_BATCH // layout.data
    total: Counter[tuple[str, str, str]] = Counter()
    for of_rollouts in nodes:
        total.update(expected_bytes_of_micro_batch(layout, case, stage, of_rollouts))
    return {key: value for key, value in total.items() if value}


def expected_bytes_of_micro_batch(
    layout: Layout, case: Case, stage: int, nodes: Nodes
) -> dict[tuple[str, str, str], int]:
    layers = len(split_layers(LAYERS, layout.pipeline)[stage])
    feature_layers = split_layers(DEPTH, layout.pipeline)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    many_slices, many_stages = layout.tensor > 1, layout.pipeline > 1
    is_mean, is_per_layer = "mean_pooling" in str(case.overrides), "per_layer" in str(case.overrides)
    tokens_read = G if is_mean else 1
    # With entropies the document is read up to its end, and the head scores it.
    targets, document = (B * (P - 1), P - 1) if case is PER_LAYER else (0, ANCHOR)
    decoded, packed, read = B * document + nodes.fed_back, B * P + sum(nodes.by_level), nodes.read(tokens_read)
    head_rows, block_features = B * K + nodes.predicting, K * (N + 1)
    is_separate, has_graph, vector = case is SEPARATE, case is ACTIVATIONS, RANK * (case is CRITIC)
    # Two numbers for each row, and one for the choice of each sample of its anchor; with a critic a mean vector.
    scored = head_rows * (2 + N + vector)
    tokens = INT64 * B * N * K

    def hidden(positions: int) -> int:
        return positions * H * FLOAT32

    # After the attention of the deepest tapped layer only rows that are read are computed.
    features = 2 * (hidden(packed) * len(feature_layers) - last * (hidden(packed) - hidden(read)))
    # A layer has two all-reduces forward and two back; a graph that was saved has only those back.
    back_and_forth = 2 if has_graph else 4
    found = {
        ("rollout", "tensor_parallel", "all-reduce"): many_slices
        * (hidden(decoded) * (2 * layers + first) + last * (not is_separate) * FLOAT32 * scored),
        ("rollout", "tensor_parallel", "all-gather"): many_slices * last * 16 * layout.tensor * B * N * K * G,
        ("rollout", "pipeline_parallel", "send"): many_stages
        * (tokens * (G - 1) * (layout.pipeline - 1) if last else hidden(decoded)),
        ("rollout", "pipeline_parallel", "broadcast"): many_stages * (tokens + FLOAT32 * head_rows * vector),
        ("features", "tensor_parallel", "all-reduce"): many_slices
        * (
            features
            + first * hidden(packed)
            + is_per_layer * FLOAT64 * B * block_features * len(feature_layers)  # one tap after each of them
        ),
        ("features", "pipeline_parallel", "send"): many_stages * (not last) * hidden(packed),
        ("features", "model_parallel", "all-reduce"): (many_slices or many_stages)
        * FLOAT64
        * B
        * (K * (N + 1) ** 2 + is_mean * block_features * G + bool(vector) * N * K * G * (1 + vector)),
        ("learn", "tensor_parallel", "all-reduce"): many_slices
        * (
            hidden(decoded) * (back_and_forth * layers + first * (not has_graph))
            + last * (hidden(head_rows + targets) + FLOAT32 * (is_separate * scored + targets * (2 + N + 1)))
        ),
        ("learn", "pipeline_parallel", "send"): many_stages
        * hidden(decoded)
        * ((not last) * is_separate + (not first)),
        ("learn", "pipeline_parallel", "broadcast"): many_stages
        * FLOAT32
        * (B * N * K * G + 3 + bool(vector) + 2 * targets + bool(targets)),
    }
    return found


def expected_bytes_of_sequence_parallel_layers(
    layers: int, feature_layers: int, tokens_read: int, nodes: list[Nodes]
) -> dict:
    """Gathers and reduce-scatters inside the layers of a single stage, instead of all-reduces; each pass is padded."""

    def hidden(positions: int) -> int:
        return -(-positions // 2) * 2 * H * FLOAT32

    decoded = sum(hidden(B * ANCHOR) + sum(map(hidden, part.by_level[:-1])) for part in nodes)
    packed = sum(hidden(B * P + sum(part.by_level)) for part in nodes)
    read = sum(hidden(part.read(tokens_read)) for part in nodes)
    sampled = 16 * 2 * B * N * K * G * len(nodes)
    return {
        # Two of each per layer; one more where tokens are embedded, and one where the head reads whole sequences.
        ("rollout", "tensor_parallel", "reduce-scatter"): decoded * (2 * layers + 1),
        ("rollout", "tensor_parallel", "all-gather"): decoded * (2 * layers + 1) + sampled,
        # In the deepest tapped layer rows that are read are picked from a gathered sequence; only they are computed.
        ("features", "tensor_parallel", "reduce-scatter"): packed * (2 * feature_layers - 1) + 2 * read,
        ("features", "tensor_parallel", "all-gather"): packed * 2 * feature_layers + read,
        # Back: what was scattered is gathered and the other way round, and inputs are gathered again for the weights.
        ("learn", "tensor_parallel", "reduce-scatter"): decoded * (4 * layers + 1),
        ("learn", "tensor_parallel", "all-gather"): decoded * (6 * layers + 2),
    }


LAYOUTS = [Layout(1, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)]


@pytest.mark.parametrize("case", [PLAIN, MEAN, PER_LAYER, SEPARATE, ACTIVATIONS, CRITIC], ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(Layout(1, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_bytes_within_a_replica_follow_the_formulas(layout, case, directory):
    for rank, (_, found, nodes) in enumerate(measured(layout, case, directory)):
        shares = [sum(part.by_level) / (B * K * N * G) for part in nodes]
        assert min(shares) < 0.9 and len(set(shares)) > 1
        stage = rank // (layout.tensor * layout.data)
        within = {
            key: value
            for key, value in found.items()
            if key[1] in ("tensor_parallel", "pipeline_parallel", "model_parallel")
            and key[2] != "receive"
            and not is_of_the_optimizer(key, value)
        }
        assert within == expected_bytes(layout, case, stage, nodes)


def test_statistics_of_the_critic_are_summed_over_replicas_once(directory):
    """Of regressors and of the rank's feature channels, for every token: once a step, not once a micro-batch."""
    plain, fitted = (
        [found["update", "data_parallel", "all-reduce"] for _, found, _ in measured(Layout(2, 1, 1), case, directory)]
        for case in (PLAIN, CRITIC)
    )
    regressors = 4 * RANK + 1
    expected = FLOAT64 * G * regressors * (regressors + DEPTH * H)
    assert [more - before for more, before in zip(fitted, plain, strict=True)] == [expected, expected]


def is_of_the_optimizer(key: tuple[str, str, str], value: int) -> bool:
    """Norms and flags over the replica: a few numbers a step."""
    return key == ("update", "model_parallel", "all-reduce") and value <= 64


@pytest.mark.slow
@pytest.mark.parametrize("case", [PLAIN, MEAN], ids=lambda case: case.name)
def test_bytes_of_sequence_parallel_layers_follow_the_formulas(case, directory):
    layout = Layout(1, 2, 1, sequence_parallel=True)
    results = measured(layout, case, directory)
    by_rank, nodes = [found for _, found, _ in results], results[0][2]
    tokens_read = G if case is MEAN else 1
    expected = expected_bytes_of_sequence_parallel_layers(LAYERS, DEPTH, tokens_read, nodes)
    for found in by_rank:
        assert {key: found[key] for key in expected} == expected
        gram = FLOAT64 * B * (K * (N + 1) ** 2 + (case is MEAN) * K * (N + 1) * G) * GLOBAL_BATCH
        assert found["features", "model_parallel", "all-reduce"] == gram
    # Rows that are read change from slices of the sequence to slices of the hidden dimension once, for each tap.
    exchanged = sum(found["features", "tensor_parallel", "all-to-all"] for found in by_rank)
    assert exchanged == DEPTH * sum(part.read(tokens_read) for part in nodes) * H * FLOAT32


HELD = Case("held for a step", ("ebft.ce_coef=0", "zero.hold_parameters=step"))
SHARDED = Case("sharded features", ("ebft.ce_coef=0", "zero.feature_network=sharded"))


@pytest.mark.parametrize("case", [PLAIN, HELD, SHARDED, SEPARATE], ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [Layout(2, 1, 1), pytest.param(Layout(2, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_parameters_are_gathered_once_for_the_rollouts(layout, case, directory):
    """Not once per token, and not again for learning if they are held; reduced once per micro-batch."""
    architecture = Architecture.from_hf(model_config(), "test")
    micro_batches = GLOBAL_BATCH // layout.data
    for rank, (calls, found, _) in enumerate(measured(layout, case, directory)):
        stage = rank // layout.data
        own = stage_parameters(architecture, StageShape.of_policy(architecture, stage, layout.pipeline), 1) * FLOAT32
        gathered = ("rollout", "data_parallel", "all-gather")
        assert (calls[gathered], found[gathered]) == (1, own)
        assert found["learn", "data_parallel", "reduce-scatter"] == micro_batches * own
        # A layer is gathered for its recomputation and stays for its gradient.
        again = found.get(("learn", "data_parallel", "all-gather"), 0)
        if case is SEPARATE:  # where micro-batches overlap, forward and backward gather each for itself
            assert micro_batches * own <= again <= 2 * micro_batches * own
        else:
            assert again == (0 if case is HELD else micro_batches * own)
        frozen = StageShape.of_features(architecture, DEPTH, stage, layout.pipeline)
        expected = stage_parameters(architecture, frozen, 1) * FLOAT32 if case is SHARDED else 0
        assert found.get(("features", "data_parallel", "all-gather"), 0) == expected


BFLOAT16 = Case("bfloat16", ("ebft.ce_coef=0", "train.dtype=bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [PLAIN, BFLOAT16], ids=lambda case: case.name)
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_whole_parameters_are_reduced_in_float32_and_gathered_after_the_update(zero_stage, case, directory):
    layout = Layout(2, 1, 1, zero_stage=zero_stage)
    parameters = Architecture.from_hf(model_config(), "test").num_parameters
    for _, found, _ in measured(layout, case, directory):
        assert not any(phase == "rollout" and group == "data_parallel" for phase, group, _ in found)
        reductions = GLOBAL_BATCH // layout.data if zero_stage == 2 else 1
        # Stage 2 reduces while it goes back.
        reduced = sum(found.get((phase, "data_parallel", "all-reduce"), 0) for phase in ("learn", "update"))
        numbers = reduced - reductions * FLOAT32 * parameters
        assert 0 <= numbers <= 64  # norms and flags
        gathered = found.get(("update", "data_parallel", "all-gather"), 0)
        assert gathered == (0 if zero_stage == 0 else (2 if case is BFLOAT16 else FLOAT32) * parameters)


def model_config() -> dict:
    """The model of the tests' configuration."""
    return yaml.safe_load(TEXT % ("llama", "true"))["model"]["config"]
