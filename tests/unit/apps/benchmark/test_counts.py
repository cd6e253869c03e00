"""Real steps of small models do exactly the work that the formulas count, on both sides and in every phase."""

import dataclasses

import pytest
import torch
from torch import nn

from ebft_mega.apps.benchmark.case import BenchCase
from ebft_mega.apps.benchmark.counting import LabelledTimers, ProductCounter, count_phase
from ebft_mega.apps.benchmark.measurement import PHASES, check_counts
from ebft_mega.apps.benchmark.sides import OUR_SIDES, Ours, StepDone, build_sides, random_rows, sum_of_rows
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.cost.step_cost import StepShape, cost_of_step, least_cost_of_step
from ebft_mega.cost.work import Flops
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.train.step import train_step
from tests.unit.apps.benchmark.benchmark_models import TINY_CASES, TINY_MODEL

VOCABULARY = TINY_MODEL.architecture.vocab_size
ARCHITECTURE = TINY_MODEL.architecture


def products_of(trainer, rows):
    """Matrix products of one of our steps, and the nodes of its rollouts."""
    timers = LabelledTimers()
    with ProductCounter(timers) as counter:
        result = train_step(dataclasses.replace(trainer, timers=timers), rows, 0, 0.0)
    return counter.products, StepDone.of(0.0, result.experiences).nodes


def assert_counts(products, cost):
    for phase, parts in PHASES.items():
        counted = count_phase(products, phase, ARCHITECTURE)
        expected = [cost.phases[part] for part in parts]
        flops = sum((part.flops + part.recomputed for part in expected), Flops())
        assert (counted.linear_flops, counted.head_flops) == (flops.linear, flops.head), phase
    generated = count_phase(products, "rollout", ARCHITECTURE)
    assert generated.layer_rows == cost.generate.rows * cost.generate.layers
    assert generated.head_rows == cost.generate.head_rows
    features = count_phase(products, "features", ARCHITECTURE)
    assert features.layer_rows == cost.features.rows * cost.features.layers
    assert features.head_rows == 0


@pytest.mark.parametrize("case", TINY_CASES.values(), ids=TINY_CASES.keys())
@pytest.mark.parametrize("name", ["naive", "naive_checkpointing", *OUR_SIDES])
def test_every_side_does_what_its_formulas_say(name, case, groups):
    side = build_sides([name], case, TINY_MODEL, groups)[name]
    check_counts(side, ARCHITECTURE)

    # A check that cannot fail checks nothing.
    def wrong(shape):
        cost = side.cost_of_row(shape)
        generate = dataclasses.replace(cost.generate, flops=cost.generate.flops + Flops(linear=2))
        return dataclasses.replace(cost, generate=generate)

    with pytest.raises(RuntimeError, match="the formulas say"):
        check_counts(dataclasses.replace(side, cost_of_row=wrong), ARCHITECTURE)


@pytest.mark.parametrize("temperature", [1e-3, 0.2, 0.6])
@pytest.mark.parametrize("name", ["ours", "ours_activations", "ours_off"])
def test_several_rows_whose_rollouts_begin_alike(name, temperature, groups):
    """From forests in which all rollouts of an anchor are one, to some; rows have different numbers of nodes."""
    case = dataclasses.replace(TINY_CASES["stride<G"], samples=5, rows=3, temperature=temperature)
    side = build_sides([name], case, TINY_MODEL, groups)[name]
    done = check_counts(side, ARCHITECTURE)
    plan = side.shape.plan
    shares = [nodes.shares(plan).policy for nodes in done.nodes]
    assert len(shares) == 3 and all(1 / 5 - 1e-9 <= share < 1 for share in shares)
    if temperature == 1e-3:
        assert shares == pytest.approx([1 / 5] * 3)
    else:
        assert len(set(shares)) > 1
    # Nodes of which one is left out are not those that were computed.
    fewer = dataclasses.replace(done.nodes[0], nodes=((0,) * plan.num_blocks, *done.nodes[0].nodes[1:]))
    run = dataclasses.replace(done, nodes=(fewer, *done.nodes[1:]))
    wrong = dataclasses.replace(side, run=lambda step: (side.run(step), run)[1])
    with pytest.raises(RuntimeError, match="the formulas say"):
        check_counts(wrong, ARCHITECTURE)


CRITIC_CASES = {
    "a mean of tokens": (Ours("checkpoints", estimator="token_critic"), {"embed_method": "mean_pooling", "rows": 3}),
    "the last token, a forward pass of its own": (Ours("off", estimator="token_critic"), {"rows": 2}),
    "concat, saved activations": (Ours("activations", estimator="token_critic"), {"embed_method": "concat"}),
    "nothing merged": (Ours("checkpoints", False, "token_critic"), {"embed_method": "mean_pooling", "rows": 2}),
    "cross-entropy, two samples": (Ours("off", estimator="token_critic"), {"ce_coef": 0.3, "samples": 2}),
    "one token": (
        Ours("checkpoints", estimator="token_critic"),
        {"embed_method": "mean_pooling", "generate_length": 1, "sequence_length": 20, "rows": 2},
    ),
}


@pytest.mark.parametrize(("ours", "changes"), CRITIC_CASES.values(), ids=CRITIC_CASES.keys())
def test_the_token_critic_does_what_its_formulas_say(ours, changes, groups, monkeypatch):
    """Also with rows that have different numbers of prefixes, and for every way of reuse."""
    monkeypatch.setitem(OUR_SIDES, "judged", ours)
    case = dataclasses.replace(TINY_CASES["stride<G"], samples=3, temperature=0.4)
    side = build_sides(["judged"], dataclasses.replace(case, **changes), TINY_MODEL, groups)["judged"]
    done = check_counts(side, ARCHITECTURE)
    prefixes = {nodes.head_rows(side.shape.all_levels) for nodes in done.nodes}
    assert len(prefixes) == (len(done.nodes) if ours.merges else 1)
    cost = side.cost(done)
    assert 0 < cost.critic < cost.total
    for change in ({"rank": 31}, {"channels": 95}, {"merges": not ours.merges}, {"rows_of_step": 7}):
        if "merges" in change and side.shape.plan.generate_length == 1:
            continue  # nothing to add up by prefix but what the first tokens have
        wrong = dataclasses.replace(side.shape, critic=dataclasses.replace(side.shape.critic, **change))
        with pytest.raises(RuntimeError, match="for the token critic"):
            check_counts(dataclasses.replace(side, shape=wrong), ARCHITECTURE)


def greedy_rows(trainer, rows):
    """Rows in which every block continues as the policy does, block by block."""
    sampling = dataclasses.replace(trainer.sampling, temperature=1e-3)
    greedy = dataclasses.replace(trainer, sampling=sampling)
    for block, anchor in enumerate(trainer.plan.anchors):
        rollouts = train_step(greedy, rows, 0, 0.0).experiences[0].rollout.tokens
        rows.tokens[:, anchor : anchor + trainer.plan.generate_length] = rollouts[:, 0, block]
    return rows


@pytest.mark.parametrize("reuse", ["checkpoints", "off"])
@pytest.mark.parametrize("ebft", [{}, {"ce_coef": 0.3}], ids=["rl", "rl+ce"])
@pytest.mark.parametrize("name", ["stride=G", "stride<G"])
def test_rollouts_that_continue_as_the_document_does(name, reuse, ebft, groups):
    case = dataclasses.replace(TINY_CASES[name], rows=2, temperature=0.3)
    config = case.config(TINY_MODEL, reuse)
    config = config.model_copy(update={"ebft": config.ebft.model_copy(update=ebft)})
    trainer = build_trainer(config, ARCHITECTURE, ARCHITECTURE, groups)
    trainer = dataclasses.replace(trainer, reuse=reuse)
    products, nodes = products_of(trainer, greedy_rows(trainer, random_rows(case, VOCABULARY)))
    shape = StepShape.of(config, ARCHITECTURE, ARCHITECTURE)
    assert_counts(products, sum_of_rows(lambda of_row: cost_of_step(of_row, reuse), shape, nodes))
    bound = sum_of_rows(least_cost_of_step, shape, nodes)
    # The document holds what rollouts begin with: layers do not compute it again, and the head draws from its rows.
    shares = [of_row.shares(config.block_plan) for of_row in nodes]
    assert all(found.policy < found.head < 1 for found in shares)
    repeated = count_phase(products, "rollout", ARCHITECTURE).head_rows - bound.generate.head_rows
    assert repeated == 0 if name == "stride=G" else repeated > 0


def test_rows_that_the_bound_with_merging_does_not_have_are_found(groups):
    """A step that merged nothing, and whose formulas say so, though it should have merged."""
    case = dataclasses.replace(TINY_CASES["stride<G"], temperature=0.2)
    sides = build_sides(["ours", "ours_unmerged"], case, TINY_MODEL, groups)
    merged = sides["ours"].run(0).nodes
    lazy = dataclasses.replace(
        sides["ours_unmerged"],
        name="ours",
        run=lambda step: dataclasses.replace(sides["ours_unmerged"].run(step), nodes=merged),
        cost_of_row=lambda shape: sides["ours"].cost_of_row(dataclasses.replace(shape, nodes=None)),
    )
    with pytest.raises(RuntimeError, match="the bound with merging has"):
        check_counts(lazy, ARCHITECTURE)


def test_one_token_a_rollout(groups):
    """The policy has no rows of rollouts then, and the feature network one level of them."""
    case = BenchCase("", 22, samples=3, stride=2, context_length=3, generate_length=1, temperature=0.3, runs=1)
    for name in ("ours", "ours_unmerged", "ours_off"):
        side = build_sides([name], case, TINY_MODEL, groups)[name]
        nodes = check_counts(side, ARCHITECTURE).nodes[0]
        shares = nodes.shares(side.shape.plan)
        assert shares.policy is None and (shares.features < 1) == (name != "ours_unmerged")


@pytest.mark.parametrize(
    ("reuse", "checkpointing"),
    [("checkpoints", "none"), ("checkpoints", "full"), ("activations", "none"), ("off", "none"), ("off", "full")],
)
@pytest.mark.parametrize(
    "ebft",
    [{}, {"ce_coef": 0.3}, {"embed_method": "mean_pooling", "ce_coef": 0.1}, {"rl_coef": 0.0, "ce_coef": 1.0}],
    ids=["rl", "rl+ce", "pooled", "ce"],
)
def test_our_steps_do_what_the_formulas_say(reuse, checkpointing, ebft, groups):
    case = TINY_CASES["stride<G"]
    config = case.config(TINY_MODEL, reuse)
    train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
    config = config.model_copy(update={"ebft": config.ebft.model_copy(update=ebft), "train": train})
    trainer = build_trainer(config, ARCHITECTURE, ARCHITECTURE, groups)
    reuse = reuse if config.uses_rollouts else "off"
    trainer = dataclasses.replace(trainer, reuse=reuse)
    products, nodes = products_of(trainer, random_rows(case, VOCABULARY))
    shape = StepShape.of(config, ARCHITECTURE, ARCHITECTURE, nodes[0] if config.uses_rollouts else None)
    assert_counts(products, cost_of_step(shape, reuse, checkpoints_layers=checkpointing == "full"))


def test_eager_attention_of_the_baseline_is_counted_right(groups):
    """Its scores and weighted values are batched products; ours are a kernel's, whose pairs the masks give."""
    side = build_sides(["naive"], TINY_CASES["stride=G"], TINY_MODEL, groups)["naive"]
    with ProductCounter(side.timers) as counter:
        cost = side.cost(side.run(0))
    for phase, parts in PHASES.items():
        attention = sum(cost.phases[part].flops.attention for part in parts)
        assert count_phase(counter.products, phase, ARCHITECTURE).batched_flops == attention


@dataclasses.dataclass(frozen=True)
class RecordingRoute:
    """Attention that writes down how many pairs each call asks for."""

    route: AttentionRoute
    timers: LabelledTimers
    pairs: dict[str, int]

    def attend(self, pattern, *tensors):
        phase = self.timers.current
        self.pairs[phase] = self.pairs.get(phase, 0) + pattern.num_pairs
        return self.route.attend(pattern, *tensors)


@pytest.mark.parametrize("ours", OUR_SIDES.values(), ids=OUR_SIDES.keys())
@pytest.mark.parametrize("embed_method", ["last_token", "mean_pooling"])
def test_our_attention_asks_for_the_pairs_that_are_counted(ours, embed_method, groups):
    case, reuse = dataclasses.replace(TINY_CASES["stride<G"], temperature=0.3, rows=2), ours.reuse
    config = case.config(TINY_MODEL, reuse)
    config = config.model_copy(update={"ebft": config.ebft.model_copy(update={"embed_method": embed_method})})
    timers, pairs = LabelledTimers(), {}
    trainer = build_trainer(config, ARCHITECTURE, ARCHITECTURE, groups)
    sampling = dataclasses.replace(trainer.sampling, merge_equal_prefixes=ours.merges)
    trainer = dataclasses.replace(trainer, timers=timers, reuse=reuse, sampling=sampling)
    for stage in (trainer.stage, trainer.feature_network.stage):
        stage.attention = RecordingRoute(stage.attention, timers, pairs)
    result = train_step(trainer, random_rows(case, VOCABULARY), 0, 0.0)
    nodes, shape = StepDone.of(0.0, result.experiences).nodes, StepShape.of(config, ARCHITECTURE, ARCHITECTURE)
    assert (nodes[0].shares(shape.plan).policy < 1) == ours.merges
    cost = sum_of_rows(lambda of_row: cost_of_step(of_row, reuse), shape, nodes)
    policy, whole = cost.policy_backward.pairs, cost.features.pairs
    pooled = sum(dataclasses.replace(shape, nodes=of_row).pooled.pairs for of_row in nodes)
    layers = ARCHITECTURE.num_hidden_layers
    expected = {"rollout": layers * policy, "features": 2 * whole + pooled}
    # Learning asks again only where something is computed again.
    assert pairs == expected | ({} if reuse == "activations" else {"learn": layers * policy})


def test_the_counter_knows_every_kind_of_product():
    timers = LabelledTimers()
    linear, rows = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    with ProductCounter(timers) as counter, timers.phase("learn"), timers.phase("inner"):
        linear(rows).sum().backward()
        torch.zeros(7, 5).addmm_(rows.detach(), torch.randn(3, 5))
        torch.randn(2, 7, 3) @ torch.randn(2, 3, 5)
        torch.randn(7, 3, dtype=torch.float64) @ torch.randn(3, 5, dtype=torch.float64)
    assert [p.phase for p in counter.products] == ["learn"] * 6
    assert [p.flops for p in counter.products] == [210, 210, 210, 210, 420, 210]
    assert [p.batch for p in counter.products] == [None] * 4 + [2, None]
    assert [p.is_double for p in counter.products] == [False] * 5 + [True]
    assert not any(p.reads_table for p in counter.products)


def test_the_counter_knows_what_solves_and_what_reads_the_table():
    timers, table = LabelledTimers(), torch.randn(5, 3)
    squares = torch.eye(7, dtype=torch.float64).expand(2, -1, -1)
    with ProductCounter(timers, table) as counter, timers.phase("learn"):
        torch.randn(4, 5) @ table
        torch.randn(4, 3) @ table[1:4].T
        torch.cholesky_solve(squares[..., :3], torch.linalg.cholesky(squares))
    assert [p.reads_table for p in counter.products] == [True, True, False, False]
    assert [p.flops for p in counter.products] == [120, 72, 2 * (7**3 // 3), 2 * 2 * 7 * 7 * 3]


def counted_at_production_geometry(name, groups):
    """A real step on a row of 1,024 tokens with the default geometry, of a model of four narrow layers."""
    side = build_sides([name], BenchCase("", 1024), TINY_MODEL, groups)[name]
    with ProductCounter(side.timers) as counter:
        side.run(0)
    phases = {phase: count_phase(counter.products, phase, TINY_MODEL.architecture) for phase in PHASES}
    return phases, TINY_MODEL.architecture.num_hidden_layers


def test_our_step_has_the_promised_rows(groups):
    phases, layers = counted_at_production_geometry("ours_unmerged", groups)
    assert (phases["rollout"].layer_rows, phases["rollout"].head_rows) == (4_572 * layers, 3_683)
    assert (phases["features"].layer_rows, phases["features"].head_rows) == (5_088 * layers * 3 // 4, 0)
    # Once more for the gradient: the layers' recomputation and the logits of each chunk, but no forward of its own.
    assert (phases["learn"].layer_rows, phases["learn"].head_rows) == (4_572 * layers, 3_683)


@pytest.mark.slow
def test_the_baseline_has_the_rows_of_the_existing_trainers(groups):
    phases, layers = counted_at_production_geometry("naive", groups)
    assert (phases["rollout"].layer_rows, phases["rollout"].head_rows) == (46_992 * layers, 46_992)
    assert (phases["features"].layer_rows, phases["features"].head_rows) == (8_160 * layers, 8_160)
    assert (phases["learn"].layer_rows, phases["learn"].head_rows) == (8_160 * layers, 8_160)
