"""The dry run's numbers against hand-made ones."""

import re

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.load import load_config
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.parallel import optimizer
from ebft_mega.parallel.deepspeed_adapter import deepspeed_setup, partitioned_parameters
from ebft_mega.parallel.pipeline import ring_slots
from ebft_mega.planning import activation_memory as activations
from ebft_mega.planning import dry_run as planner
from ebft_mega.planning import memory, zero_memory
from ebft_mega.planning import rank_layout as layout
from ebft_mega.planning.auto import choices
from ebft_mega.planning.memory import Choices, head_chunk_bytes
from ebft_mega.planning.run_plan import check_run
from ebft_mega.planning.short_plan import checkpoint_words
from ebft_mega.registry.kinds import OPTIMIZERS
from tests.other_optimizers import Momentum, Sgd
from tests.unit.reward.rewards import rewards_of

# The fixture's llama: V 100, H 16, I 24, L 4, 4 heads of 4, 2 key-value heads, tied.
LAYER = 16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
PARAMETERS = 100 * 16 + 4 * LAYER + 16
GENERATED = 3 * 4 * 7  # 3 blocks (anchors 8, 16, 24), 4 samples, 7 of 8 tokens
PACKED = 24 + GENERATED
# Values that a layer keeps per token: 6 of H, 4 of the queries' width 16 and 3 of the keys' 8, 5 of I.
KEEPS = 6 * 16 + 4 * 16 + 3 * 8 + 3 * 24
ROTARY = 4 * 4  # angles, per position of a pass

OFF, CHECKPOINTS, ACTIVATIONS = (Choices(reuse, False) for reuse in ("off", "checkpoints", "activations"))


def plan_of(inputs, world_size=1, **changes):
    config = load_config(inputs.write(**changes))
    return config, check_run(config, world_size)


def degrees(tensor=1, pipeline=1, sequence=False):
    return {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "sequence_parallel": sequence}


def planned(inputs, chosen=OFF, stage=0, **changes):
    return memory.plan_memory(*plan_of(inputs, **changes), chosen, stage)


def activations_saved(positions):
    """Of the same layer, recorded while sampling: 1 to 7 keys and values of 12 rollouts instead of their projection."""
    cached = 2 * 24 * 8 + 12 * sum(2 * t * 8 - (16 + 3 * 8) for t in range(1, 8))
    return layer_saved(positions) + 4 * 2 * cached


def layer_saved(positions):
    """Bytes of a layer of two rows of so many positions in float32, with a normaliser for each of 4 heads."""
    return 4 * 2 * positions * (KEEPS + ROTARY) + 4 * 2 * positions * 4


def test_parameters_by_hand(inputs):
    _, plan = plan_of(inputs)
    assert plan.architecture.num_parameters == PARAMETERS


@pytest.mark.parametrize(("dtype", "own_master"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    ("stage", "divided"),
    [
        (0, ()),
        (1, ("optimizer moments (float32)", "master parameters (float32)")),
        (2, ("optimizer moments (float32)", "master parameters (float32)", "gradients (float32)")),
        (3, ("optimizer moments (float32)", "master parameters (float32)", "gradients (float32)", "parameters")),
    ],
)
def test_what_each_zero_stage_divides_over_the_replicas(dtype, own_master, replicas, stage, divided):
    whole = {"parameters": 4 if own_master else 2, "gradients (float32)": 4, "optimizer moments (float32)": 8}
    if not own_master or stage < 3:
        whole["master parameters (float32)"] = 4
    states = zero_memory.zero_state_bytes(1000, replicas, dtype, stage, num_moments=2)
    if stage == 2:
        states["gradients (float32)"] = zero_memory.gradient_bytes(1000, replicas, stage)  # from learning to the update
    assert states == {name: 1000 * size // (replicas if name in divided else 1) for name, size in whole.items()}


def test_a_share_is_rounded_up():
    assert zero_memory.zero_state_bytes(7, 4, "bfloat16", 3, 2)["parameters"] == 2 * 2


@pytest.mark.parametrize(("fractions", "parameters"), [([0.25, 0.75], 3 * LAYER), ([0.25, 1.0], 4 * LAYER + 16)])
def test_feature_network_ends_at_its_deepest_tap(inputs, fractions, parameters):
    found = planned(inputs, ebft__feature_layers=fractions)
    assert found.states["frozen feature network"] == 2 * (1600 + parameters)


def test_sharded_feature_network_is_gathered_for_its_phase(inputs):
    frozen = 2 * (1600 + 3 * LAYER)
    resident = planned(inputs, Choices("checkpoints", False), world_size=4)
    sharded = planned(inputs, Choices("checkpoints", True), world_size=4)
    assert resident.states["frozen feature network"] == frozen
    assert sharded.states["frozen feature network"] == frozen // 4
    gathered = {"gathered feature network": frozen}
    assert sharded.phases["features"] == resident.phases["features"] | gathered


def test_rollout_phase_by_hand(inputs):
    """2 rows and 4 micro-batches, one in the ring at a time; 2 key-value heads of 4 in 4 layers."""
    cache = 2 * PACKED * (2 * 2 * 4) * 4 * 4
    logits = 2 * 3 * 4 * 100 * 12
    found = planned(inputs, train__dtype="float32").phases["rollout"]
    # One rank gathers nothing: its share of the parameters is all of them.
    documents = 2 * 24 * 16 * 4  # the last stage draws from them, too
    assert found == {
        "keys and values": cache,
        "hidden states of the documents": documents,
        "a chunk of logits": logits,
    }
    hidden = 2 * PACKED * 16 * 4
    found = planned(inputs, CHECKPOINTS, train__dtype="float32").phases["rollout"]
    assert found["saved checkpoints of the rollouts"] == 4 * 5 * hidden  # of four layers, and of the last one's output
    found = planned(inputs, ACTIVATIONS, train__dtype="float32").phases["rollout"]
    assert found["saved activations of the rollouts"] == 4 * 4 * activations_saved(PACKED)
    assert "keys and values" not in found


def test_the_document_may_be_the_largest_moment(inputs):
    """One anchor and no logits (a first stage): only the document's pass is long."""
    changes = {"ebft__context_length": 24, "ebft__stride": 8, "parallel": degrees(pipeline=2), "world_size": 2}
    found = planned(inputs, train__dtype="float32", zero__stage=0, ebft__n_samples_per_prompt=1, **changes)
    assert found.phases["rollout"] == {
        "keys and values": 4 // 2 * 2 * 24 * (2 * 2 * 4) * 2 * 4,
        "one layer": 2 * 24 * (3 * 16 + max(3 * 24, 8 * 16 + 2 * 8)) * 4,
    }


def test_a_nucleus_is_searched_in_sorted_logits(inputs):
    rollout = planned(inputs, ebft__top_p=0.9).phases["rollout"]
    assert rollout["a chunk of logits"] == 2 * 3 * 4 * 100 * 28


@pytest.mark.parametrize(("method", "read"), [("last_token", 1), ("mean_pooling", 8), ("concat", 8)])
def test_features_phase_by_hand(inputs, method, read):
    packed, values = 32 + 3 * 4 * 8, 2 * 3 * 5 * read * 16  # 2 rows, 3 blocks, 4 samples and a target
    pooled = {"last_token": 0, "mean_pooling": 1, "concat": 8}[method] * 2 * 3 * 5 * 16
    layer, gram = 2 * packed * (3 * 16 + 8 * 16 + 2 * 8) * 4, ((3 + 1) * values + pooled) * 8
    moment = {"one layer": layer} if layer > gram else {"Gram matrices (float64)": gram}
    found = planned(inputs, train__dtype="float32", ebft__embed_method=method).phases["features"]
    assert found == moment | {"rows of the tapped layers": 4 * 3 * values * 4}  # of 3 taps, of 4 micro-batches


def test_learn_phase_by_hand(inputs):
    hidden, layer = 2 * PACKED * 16 * 4, layer_saved(PACKED)
    # Of the MLP 3 of I, of the attention 7 of the queries and 5 of the keys when 3 of I are gone.
    gradients = 2 * PACKED * (2 * 16 + max(3 * 24, 7 * 16 + 5 * 8 - 3 * 24)) * 4 + 2 * 24 * 16 * 4
    matrix = 100 * 16 * 4
    # In float32, as they come and in the order of the ranks.
    reduced = {"gradients being reduced": 2 * PARAMETERS * 4}
    one_layer = {"gradients of one layer": gradients, "gradient of the head's matrix": matrix} | reduced
    found = planned(inputs, train__dtype="float32").phases["learn"]
    rows = 2 * (3 + GENERATED)
    head = {
        "scored rows and their gradient": 4 * rows * 16 * 4,
        "a chunk of logits": rows * 100 * (4 + 4),
        "gradient of the head's matrix": matrix,
    }
    assert sum(head.values()) > sum(one_layer.values())
    assert found == head | {"activations": 4 * layer}
    # Of one row at a time, both halve but for what is reduced.
    halves = {"gradients of one layer": (gradients - 2 * 24 * 16 * 4) // 2 + 2 * 24 * 16 * 4}
    found = planned(inputs, train__dtype="float32", train__micro_batch_size=1).phases["learn"]
    assert found == one_layer | halves | {"activations": 4 * layer // 2}
    undivided = planned(inputs, train__dtype="float32", zero__stage=0).phases["learn"]
    assert undivided == head | {"activations": 4 * layer}
    full = planned(inputs, train__dtype="float32", train__activation_checkpointing="full").phases["learn"]
    recomputed = {"one layer, recomputed": layer} | one_layer
    assert full == recomputed | {"activations": 4 * hidden}
    # All four micro-batches are kept of rollouts, one is in flight of a forward pass.
    kept = planned(inputs, CHECKPOINTS, train__dtype="float32").phases["learn"]
    assert kept == recomputed | {"saved checkpoints of the rollouts": 4 * 5 * hidden}
    kept = planned(inputs, ACTIVATIONS, train__dtype="float32", zero__hold_parameters="step").phases["learn"]
    assert kept == head | {"saved activations of the rollouts": 4 * 4 * activations_saved(PACKED)}


def test_a_chunk_of_the_head_is_limited(inputs):
    """With 100 samples two rows of one block are 200 rows of logits, and 512 rows hold two blocks of three."""
    found = planned(inputs, ebft__n_samples_per_prompt=100).phases
    assert found["rollout"]["a chunk of logits"] == 400 * 100 * 12
    # bfloat16: logits and two copies in float32; float32: logits and one copy.
    assert head_chunk_bytes(5000, "bfloat16") == 512 * (2 + 4 + 4)
    assert head_chunk_bytes(100, "float32") == 100 * (4 + 4)


def test_slices_by_hand(inputs):
    """Tensor parallel 4 on 2 key-value heads: every slice computes with a whole one, and the rest is a quarter."""
    changes = {"world_size": 4, "train__dtype": "float32"}
    found = planned(inputs, parallel=degrees(tensor=4), **changes)
    # 64 blocks of 2 ids: 128 rows, 32 per slice; norms are whole
    own = 32 * 16 + 4 * ((LAYER - 2 * 16) // 4 + 2 * 16) + 16
    assert found.states["parameters"] == 4 * own
    assert found.phases["rollout"]["keys and values"] == 2 * PACKED * (2 * 1 * 4) * 4 * 4
    assert found.phases["rollout"]["a chunk of logits"] == 2 * 3 * 4 * 32 * 12
    inside, normalisers = 4 * 4 + 3 * 4 + 3 * 6, 4 * 2 * PACKED * 1
    layer = 4 * 2 * PACKED * (6 * 16 + inside + ROTARY) + normalisers
    assert found.phases["learn"]["activations"] == 4 * layer
    found = planned(inputs, parallel=degrees(tensor=4, sequence=True), **changes)
    layer = 4 * (2 * PACKED // 4 * 6 * 16 + 2 * PACKED * (inside + ROTARY)) + normalisers
    assert found.phases["learn"]["activations"] == 4 * layer
    found = planned(inputs, CHECKPOINTS, parallel=degrees(tensor=4, sequence=True), **changes)
    assert found.phases["learn"]["saved checkpoints of the rollouts"] == 4 * 5 * 2 * PACKED // 4 * 16 * 4


def test_stages_by_hand(inputs):
    """Three stages of 2, 1 and 1 layers, with a tied embedding and 4 micro-batches."""
    config, plan = plan_of(inputs, world_size=3, train__dtype="float32", parallel=degrees(pipeline=3))
    stages = [memory.plan_memory(config, plan, OFF, stage) for stage in range(3)]
    # The last stage has a copy of the embedding.
    own = [1600 + 2 * LAYER, LAYER, LAYER + 16 + 1600]
    assert [stage.states["parameters"] for stage in stages] == [4 * size for size in own]
    # The feature network's three layers are one for each.
    features = [stage.states["frozen feature network"] for stage in stages]
    assert features == [4 * (1600 + LAYER), 4 * LAYER, 4 * LAYER]
    # 1F1B: 3, 2 and 1 micro-batches in flight. 4 micro-batches decode in one ring.
    layer = layer_saved(PACKED)
    assert [stage.phases["learn"]["activations"] for stage in stages] == [3 * 2 * layer, 2 * layer, layer]
    cache = 2 * PACKED * (2 * 2 * 4) * 4
    assert [stage.phases["rollout"]["keys and values"] for stage in stages] == [4 * 2 * cache, 4 * cache, 4 * cache]
    for phase in ("rollout", "learn"):
        assert ["a chunk of logits" in stage.phases[phase] for stage in stages] == [False, False, True]
    peaks = [stage.peak_bytes for stage in stages]
    assert memory.worst_stage(config, plan, OFF) == peaks.index(max(peaks))
    assert memory.peak_bytes(config, plan, OFF) == max(peaks)
    # What is kept of rollouts is kept of all micro-batches on every stage; the last one keeps its output, too.
    stages = [memory.plan_memory(config, plan, CHECKPOINTS, stage) for stage in range(3)]
    kept = [stage.phases["features"]["saved checkpoints of the rollouts"] for stage in stages]
    assert kept == [4 * layers * 2 * PACKED * 16 * 4 for layers in (2, 1, 2)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8, 11])
def test_micro_batches_that_decode_together(inputs, micro_batches, stages):
    """As many caches as the ring's own order of passes keeps alive at once."""
    changes = {"train__global_batch_size": micro_batches, "train__micro_batch_size": 1}
    _, plan = plan_of(inputs, stages, parallel=degrees(pipeline=stages), **changes)
    slots = ring_slots(micro_batches, 8, stages)
    times = [[tick for tick, slot in enumerate(slots) if slot and slot.micro_batch == m] for m in range(micro_batches)]
    alive = [sum(own[0] <= tick <= own[-1] for own in times) for tick in range(len(slots))]
    assert memory.micro_batches_decoding(plan) == max(alive)


def test_cross_entropy_scores_every_target(inputs):
    config, _ = plan_of(inputs, ebft__ce_coef=0.1)
    assert activations.scored_rows(config) == 31 + GENERATED


def test_plain_pretraining_pays_for_no_rollouts(inputs):
    config, plan = plan_of(inputs, ebft__rl_coef=0, ebft__ce_coef=1)
    found = memory.plan_memory(config, plan, choices(config, plan, None))
    assert set(found.phases) == {"learn", "update"} and "frozen feature network" not in found.states
    assert activations.scored_rows(config) == 31
    text = planner.describe_run(config, plan)
    assert "feature layers " not in text.partition("Each rank's part")[2] and "feature map" not in text


@pytest.mark.parametrize(
    ("zero", "phases"),
    [
        ({"hold_parameters": "rollout"}, {"rollout": "whole", "learn": "live"}),
        ({"hold_parameters": "step"}, {"rollout": "whole", "features": "whole", "learn": "whole"}),
        ({"hold_parameters": "none"}, {"rollout": "live", "learn": "live"}),
        ({"stage": 2}, {}),
        ({"stage": 0}, {}),
    ],
)
def test_when_parameters_are_gathered(inputs, monkeypatch, zero, phases):
    monkeypatch.setattr(zero_memory, "MAX_LIVE_PARAMETERS", 0)  # the fixture's model is smaller than any real limit
    found = planned(inputs, world_size=2, zero=zero).phases
    gathered = {phase: needs["gathered parameters"] for phase, needs in found.items() if "gathered parameters" in needs}
    sizes = {"whole": 2 * PARAMETERS, "live": 2 * max(1600, LAYER)}
    assert gathered == {phase: sizes[what] for phase, what in phases.items()}


def test_layer_by_layer_gathers_stay_within_the_engines_limit(inputs, monkeypatch):
    architecture = plan_of(inputs)[1].architecture
    monkeypatch.setattr(zero_memory, "MAX_LIVE_PARAMETERS", 3000)
    assert zero_memory.live_parameters(architecture, PARAMETERS, 1) == 3000
    monkeypatch.setattr(zero_memory, "MAX_LIVE_PARAMETERS", 10**9)
    assert zero_memory.live_parameters(architecture, PARAMETERS, 1) == PARAMETERS


def test_peak_is_the_states_and_the_largest_phase():
    found = memory.MemoryPlan({"a": 5}, {"x": {"p": 1, "q": 2}, "y": {"p": 7}})
    assert found.peak_bytes == 12


@pytest.mark.parametrize(("tensor", "pipeline", "world_size"), [(1, 1, 2), (2, 1, 4), (2, 2, 8), (4, 3, 12), (1, 4, 4)])
def test_every_rank_has_the_part_that_its_coordinates_name(inputs, tensor, pipeline, world_size):
    """The rank order of `parallel.groups`: tensor fastest, then data, then pipeline."""
    config, plan = plan_of(inputs, world_size, parallel=degrees(tensor, pipeline))
    data = world_size // (tensor * pipeline)
    part_of = {rank: part for part in layout.rank_parts(config, plan) for rank in part.ranks}
    assert sorted(part_of) == list(range(world_size))
    for rank, part in part_of.items():
        assert (rank % tensor, rank // (tensor * data)) == (part.tensor_slice, part.stage)
    for slices in (part_of[rank] for rank in range(0, world_size, tensor * data)):
        assert slices.tensor_slice == 0
    first, last = part_of[0], part_of[world_size - 1]
    assert first.policy.first_layer == 0 and first.policy.has_embedding
    assert last.policy.first_layer + last.policy.num_layers == 4 and last.policy.has_head


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_heads_and_tokens_are_all_held(inputs, tensor):
    fields = inputs.model_fields | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    architecture = Architecture.from_hf(fields, "")
    heads = [layout.head_slice(architecture, index, tensor) for index in range(tensor)]
    assert [head for part in heads for head in part.query] == list(range(8))
    assert {head for part in heads for head in part.key_value} == {0, 1}
    for part in heads:
        assert {head // 4 for head in part.query} == set(part.key_value)  # four query heads use one key-value head
        assert part.sharers == max(1, tensor // 2)
    slices = [layout.vocabulary_slice(100, index, tensor) for index in range(tensor)]
    assert [token for part in slices for token in part.tokens] == list(range(100))
    assert len({len(part.tokens) + part.padding for part in slices}) == 1
    assert sum(part.padding for part in slices) == (28 if tensor > 1 else 0)


def lines_of(text):
    return {" ".join(line.split()) for line in text.splitlines()}


def test_text(inputs):
    lines = lines_of(planner.describe_run(*plan_of(inputs, world_size=2)))
    for expected in (
        "first and last anchor 8, 24",
        "blocks per row 3",
        "tokens generated per row 96",
        "tokens generated per step 768",
        "feature rows per row 128",
        "feature layers (1, 2, 3) of 4",
        "feature map last_token, of the last 1 of 8 positions",
        "rows read per row and tapped layer 15",  # of three blocks the targets' and those of four samples
        "numbers of a feature 48",
        f"float64 operations of inner products per row {2 * 3 * 5 * 5 * 48:,}",
        "documents 4",
        "tokens 660",
        "rows there are endless",
        "rows of the run 80",
        "epochs of the run 3.88",
        "held-out rows 4 of 8",
        "micro-batches per replica and step 2",
        f"parameters {PARAMETERS:,}",
        "sequence_length: 32",
        f"0-1 0 0 0-3 embedding, norm, head {PARAMETERS:,} 0-3 0-1 0-99 0-2",
        "rows of a replica per step 4: replica r has rows 4 * r to 4 * r + 3",
    ):
        assert expected in lines, expected


def test_text_of_the_work_of_a_step(inputs):
    """Of all rows, with what learning computes again; merging leaves half of the rollouts' rows."""
    config, plan = plan_of(inputs)
    shape, reuse = StepShape.of(config, plan.architecture, plan.architecture), choices(config, plan, None).reuse_rollout
    nodes = RolloutNodes.of_shares(plan.block_plan, DistinctShares(0.5))
    totals = [8 * cost_of_step(each, reuse).total for each in (shape, shape.with_nodes(nodes))]
    lines = lines_of(planner.describe_run(config, plan, None, DistinctShares(0.5)))
    assert f"total {totals[0] / 1e12:.4g} {totals[1] / 1e12:.4g} {totals[1] / totals[0]:.3f}" in lines
    assert f"total {totals[0] / 1e12:.4g}" in lines_of(planner.describe_run(config, plan))


def test_text_of_a_map_that_reads_more(inputs):
    """Windows of 8 tokens from 8, 16 and 24 on do not overlap: 24 rows of the document and 96 of rollouts."""
    changes = {"ebft__embed_method": "concat", "ebft__layer_weights": [1, 0.5, 2]}
    lines = lines_of(planner.describe_run(*plan_of(inputs, **changes)))
    for expected in (
        "feature map concat, of the last 8 of 8 positions",
        "layer weights (1.0, 0.5, 2.0)",
        "rows read per row and tapped layer 120",
        "numbers of a feature 384",
    ):
        assert expected in lines, expected


def test_the_learning_rate_of_the_steps_that_show_it(inputs):
    changes = {"lr": 0.5, "min_lr": 0.1, "lr_scheduler": "linear", "warmup_share": 0.25, "max_steps": 8}
    lines = lines_of(planner.describe_run(*plan_of(inputs, train={**changes, "global_batch_size": 8})))
    assert {
        "learning-rate schedule linear: Falls in a straight line to `train.min_lr`.",
        "steps of warm-up 2",
        "learning rate of the first step 0.1667",
        "highest learning rate 0.5, in step 3",
        "learning rate of the last step 0.1667",
    } <= lines


def test_text_of_a_layout(inputs):
    """Sixteen ranks: two slices of two stages, four replicas."""
    config, plan = plan_of(inputs, 16, parallel=degrees(2, 2), train__micro_batch_size=1)
    text = planner.describe_run(config, plan)
    lines = lines_of(text)
    own = 64 * 16 + 2 * ((LAYER - 32) // 2 + 32)  # 64 blocks of 2 ids, 128 rows in two slices
    for expected in (
        "tensor x data x pipeline parallel 2 x 4 x 2",
        "rank slice + 2 * (replica + 4 * stage)",
        "data-parallel peers 4 ranks, 2 apart",
        "pipeline neighbours rank - 8 and rank + 8; the last stage returns tokens to rank - 8",
        "rows of a replica per step 2: replica r has rows 2 * r to 2 * r + 1",
        "ranks stage slice layers with parameters heads key-value heads token ids feature layers",
        f"0, 2, ... 6 0 0 0-1 embedding {own:,} 0-1 0 0-63 0-1",
        f"1, 3, ... 7 0 1 0-1 embedding {own:,} 2-3 1 64-99 + 28 padding 0-1",
        f"8, 10, ... 14 1 0 2-3 norm, head {own + 16:,} 0-1 0 0-63 2",
        f"9, 11, ... 15 1 1 2-3 norm, head {own + 16:,} 2-3 1 64-99 + 28 padding 2",
        "stage states rollout features learn update peak",
    ):
        assert expected in lines, expected
    chosen = choices(config, plan, None)
    worst = memory.worst_stage(config, plan, chosen)
    assert f"Ranks of stage {worst}, which need the most:" in lines
    for stage in (0, 1):
        peak = memory.plan_memory(config, plan, chosen, stage).peak_bytes / planner.GIB_BYTES
        assert re.search(rf"^{stage} .* {peak:.3f}$", text, re.MULTILINE)


def test_text_of_shared_heads(inputs):
    lines = lines_of(planner.describe_run(*plan_of(inputs, 4, parallel=degrees(4))))
    assert any(" 1 1/2 of 0 " in line and line.startswith("1 0 1 ") for line in lines)


def test_checkpoints_of_the_plan(inputs):
    config, plan = plan_of(inputs, checkpoint={"interval": 50, "keep_last": 2, "keep_every": 100})
    text = planner.describe_run(config, plan)
    root = config.output_dir / "checkpoints"
    size = f"{12 * PARAMETERS / 1e9:.3f} GB each, in {root}"
    assert plan.total_steps == 10 and re.search(r"taken +after the last step\n", text)
    assert re.search(rf"where +{root}\n", text)
    assert re.search(r"kept +the last 2, and those at multiples of 100 steps\n", text)
    assert re.search(rf"size of one on the disk, GB +{12 * PARAMETERS / 1e9:.3f}\n", text)
    for checkpoint, words in (
        ({}, "after the last step"),
        ({"interval": 4}, "every 4 optimizer steps and after the last step"),
        ({"interval": 5, "final": False}, "every 5 optimizer steps and after the last step"),
        ({"interval": 4, "final": False}, "every 4 optimizer steps, none after the last one"),
        ({"interval": 20, "final": False}, "none, unless the run is asked to save or to stop"),
        ({"final": False}, "none, unless the run is asked to save or to stop"),
    ):
        config, plan = plan_of(inputs, checkpoint=checkpoint)
        assert re.search(rf"taken +{words}\n", planner.describe_run(config, plan))
        assert checkpoint_words(config, plan) == f"{words}; {size}"


@pytest.mark.parametrize("whitening", ["sample", "feature"])
def test_what_diversity_is_worth_under_whitening(inputs, whitening):
    """The note's figures are those of the rewards; without whitening, or with no weight, there is none."""
    config, plan = plan_of(inputs, ebft__whitening=whitening)
    assert re.search(r"objective .* no function .whitened rewards.", planner.describe_run(config, plan))
    (note,) = [line for line in planner.describe_run(config, plan).splitlines() if "diversity term" in line]
    assert "is 0 for a rollout that no other one of its block equals" in note
    assert note.endswith("of m equal ones among 4 each has 2 (m - 1) / (m * 3).")
    features = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for equal in (1, 2, 3, 4):
        features[:equal] = features[0]
        rewards = rewards_of((features @ features.T)[None, None], whitening, 1.0, 1.0)
        expected = [2 * (equal - 1) / (equal * 3)] * equal + [0.0] * (4 - equal)
        assert rewards.terms["diversity"].values[0, :, 0].tolist() == pytest.approx(expected, abs=1e-9)
    for changes in (
        {"use_whitening": False},
        {"diversity_coef": 0},
        {"n_samples_per_prompt": 1},
        {"rl_coef": 0, "ce_coef": 1},
    ):
        config, plan = plan_of(inputs, ebft=changes)
        assert "diversity term is 0" not in planner.describe_run(config, plan)


def test_the_optimizer_says_what_its_state_and_its_update_need(inputs, monkeypatch):
    for kind in (Sgd, Momentum):
        monkeypatch.setitem(OPTIMIZERS.added, kind.name, kind)
    monkeypatch.setattr(Momentum, "temporaries", 40)
    adamw, momentum, sgd = (planned(inputs, train__optimizer=name) for name in ("adamw", "momentum", "sgd"))
    moments = "optimizer moments (float32)"
    assert (adamw.states[moments], momentum.states[moments]) == (8 * PARAMETERS, 4 * PARAMETERS)
    assert moments not in sgd.states and adamw.state_bytes - sgd.state_bytes == 8 * PARAMETERS
    assert momentum.phases["update"] == {"temporaries of the optimizer (float32)": 40 * 4 * PARAMETERS}
    assert "temporaries of the optimizer (float32)" not in sgd.phases["update"]
    config, plan = plan_of(inputs, train__optimizer="momentum")
    text = planner.describe_run(config, plan)
    assert re.search(rf"size of one on the disk, GB +{8 * PARAMETERS / 1e9:.3f}\n", text)
    assert re.search(r"\noptimizer +momentum: Gradient descent with momentum.*\nits moments +velocity\n", text)


def test_the_plan_counts_what_the_engines_take_at_a_time():
    assert zero_memory.REDUCE_ELEMENTS == deepspeed_setup.REDUCE_ELEMENTS
    assert zero_memory.GATHER_ELEMENTS == partitioned_parameters.GATHER_ELEMENTS
    assert zero_memory.UPDATE_ELEMENTS == optimizer.UPDATE_ELEMENTS
