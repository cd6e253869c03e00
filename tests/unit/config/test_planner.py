"""The dry run's numbers against hand-made ones."""

import pytest

from ebft_mega.config import planner
from ebft_mega.config.load import load_config
from ebft_mega.config.validate import check_run

# The fixture's llama: V 100, H 16, I 24, L 4, 4 heads of 4, 2 key-value heads, tied.
LAYER = 16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
PARAMETERS = 100 * 16 + 4 * LAYER + 16


def plan_of(inputs, world_size=1, **changes):
    config = load_config(inputs.write(**changes))
    return config, check_run(config, world_size)


def test_parameters_by_hand(inputs):
    _, plan = plan_of(inputs)
    assert plan.architecture.num_parameters == PARAMETERS


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [("bfloat16", 2 + 4 + 8 + 4), ("float32", 4 + 4 + 8)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_states_are_divided_over_replicas(dtype, bytes_per_parameter, replicas):
    states = planner.zero3_state_bytes(1000, replicas, dtype)
    assert sum(states.values()) == bytes_per_parameter * 1000 // replicas


def test_feature_network_ends_at_its_deepest_tap(inputs):
    _, plan = plan_of(inputs)
    assert planner.feature_parameters(plan.architecture, (0.25, 0.75)) == 1600 + 3 * LAYER
    assert planner.feature_parameters(plan.architecture, (0.25, 1.0)) == 1600 + 4 * LAYER + 16


def test_rollout_phase_by_hand(inputs):
    config, plan = plan_of(inputs, train__dtype="float32")
    memory = planner.plan_memory(config, plan)
    # 3 blocks (anchors 8, 16, 24), 4 samples, 7 of 8 tokens cached; 2 rows; 2 kv heads of 4 in 4 layers
    tokens = 24 + 3 * 4 * 7
    assert memory.phases["rollout"] == {
        "gathered parameters": PARAMETERS * 4,
        "keys and values": 2 * tokens * (2 * 2 * 4) * 4 * 4,
        "logits of one token per rollout (float32)": 2 * 3 * 4 * 100 * 4,
    }
    assert memory.states["frozen feature network"] == (1600 + 3 * LAYER) * 4


def test_learn_phase_by_hand(inputs):
    config, plan = plan_of(inputs, train__dtype="float32")
    learn = planner.plan_memory(config, plan).phases["learn"]
    generated = 3 * 4 * 7
    assert learn["scored logits (float32)"] == 2 * (3 + generated) * 100 * 4
    per_token = 5 * 16 + 3 * 16 + 4 * 8 + 4 * 24
    layer = 2 * ((24 + generated) * per_token * 4 + generated * 4 * (24 + 7) * (4 + 4))
    assert learn["activations"] == 4 * layer
    full = plan_of(inputs, train__dtype="float32", train__activation_checkpointing="full")
    assert planner.plan_memory(*full).phases["learn"]["activations"] == (4 * 2 * (24 + generated) * 16 * 4 + layer)


def test_cross_entropy_scores_every_target(inputs):
    config, _ = plan_of(inputs, ebft__ce_coef=0.1)
    assert planner.scored_rows(config) == 31 + 3 * 4 * 7


def test_plain_pretraining_pays_for_no_rollouts(inputs):
    config, plan = plan_of(inputs, ebft__rl_coef=0, ebft__ce_coef=1)
    memory = planner.plan_memory(config, plan)
    assert set(memory.phases) == {"learn"} and "frozen feature network" not in memory.states
    assert planner.scored_rows(config) == 31


def test_rollouts_hold_all_parameters_and_learning_one_module(inputs):
    config, plan = plan_of(inputs)
    phases = planner.plan_memory(config, plan).phases
    assert phases["rollout"]["gathered parameters"] == plan.architecture.num_parameters * 2
    assert phases["learn"]["gathered parameters"] == max(1600, LAYER) * 2


def test_peak_is_the_states_and_the_largest_phase():
    memory = planner.MemoryPlan({"a": 5}, {"x": {"p": 1, "q": 2}, "y": {"p": 7}})
    assert memory.peak_bytes == 12


def test_text(inputs):
    text = planner.describe_run(*plan_of(inputs, world_size=2))
    lines = {" ".join(line.split()) for line in text.splitlines()}
    for expected in (
        "first and last anchor 8, 24",
        "blocks per row 3",
        "tokens generated per row 96",
        "tokens generated per step 768",
        "feature rows per row 128",
        "feature layers (1, 2, 3) of 4",
        "documents 4",
        "tokens 660",
        "rows per epoch 20",
        "tail tokens per epoch (no whole row) 20",
        "rows of the run 80",
        "epochs of the run 4.00",
        "held-out rows 4 of 8",
        "micro-batches per replica and step 2",
        f"parameters {PARAMETERS:,}",
        "sequence_length: 32",
    ):
        assert expected in lines, expected
