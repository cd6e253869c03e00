"""The naive baseline: the same step as ours in results, and what the existing trainers do in work."""

import dataclasses

import pytest
import torch

from ebft_mega.apps.benchmark.counting import LabelledTimers, ProductCounter
from ebft_mega.apps.benchmark.naive_step import NaiveTrainer, naive_step
from ebft_mega.apps.benchmark.sides import random_rows
from ebft_mega.apps.benchmark.step_major import (
    dense_layout,
    feature_positions,
    predicting_positions,
    step_major_sequence,
)
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.train.step import train_step
from tests.unit.apps.benchmark.benchmark_models import TINY_CASES, TINY_MODEL

VOCABULARY = TINY_MODEL.architecture.vocab_size
PLAN = BlockPlan(14, 3, 2, 3, 2)


def trainers(case, groups, kernel="eager", **ebft):
    """Our trainer and a baseline around the same policy."""

    config = case.config(TINY_MODEL, "off")
    config = config.model_copy(update={"ebft": config.ebft.model_copy(update=ebft)})
    architecture = TINY_MODEL.architecture
    trainer = build_trainer(config, architecture, architecture, groups)
    frozen = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(frozen, RandomWeights(architecture, config.seed))
    return trainer, NaiveTrainer(trainer, frozen.requires_grad_(False), kernel)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("case", TINY_CASES.values(), ids=TINY_CASES.keys())
def test_the_same_step_as_ours(case, kernel, groups):
    """Same noise, same weights: equal tokens, and rewards and gradient norms within rounding."""
    ours, naive = trainers(case, groups, kernel, ce_coef=0.3)
    rows = random_rows(case, VOCABULARY)
    expected = train_step(ours, rows, 5, 0.0)
    found = naive_step(naive, rows, 5, 0.0)
    assert torch.equal(found.experiences[0].rollout.tokens, expected.experiences[0].rollout.tokens)
    torch.testing.assert_close(found.experiences[0].gram, expected.experiences[0].gram, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logprobs[0].rollout, expected.learned[0].logprobs.rollout, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.logprobs[0].target, expected.learned[0].logprobs.target, atol=1e-4, rtol=1e-5)
    assert found.loss == pytest.approx(expected.learned[0].terms.total.item(), rel=1e-4)
    assert found.grad_norm == pytest.approx(expected.update.grad_norm, rel=1e-4)


@pytest.mark.parametrize(
    "ebft",
    [
        {"embed_method": "mean_pooling"},
        {"embed_method": "concat", "layer_weights": (0.5, 0.0, 3.0)},
        {"embed_method": "completion_mean", "layer_weights": (0.5, 0.0, 3.0)},
        {"embed_method": "completion_mean", "feature_norm": "per_layer"},
    ],
    ids=lambda ebft: "-".join(map(str, ebft.values())),
)
def test_other_features_are_the_same_too(ebft, groups):
    case = TINY_CASES["stride<G"]
    ours, naive = trainers(case, groups, **ebft)
    rows = random_rows(case, VOCABULARY)
    expected = train_step(ours, rows, 0, 0.0).experiences[0].gram
    found = naive_step(naive, rows, 0, 0.0).experiences[0].gram
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_the_mask_is_the_definition(tokens):
    """Each pair of positions by itself."""
    layout = dense_layout(PLAN, tokens, "eager", torch.float32, torch.device("cpu"))
    length = PLAN.sequence_length + PLAN.num_blocks * tokens
    for query in range(length):
        for key in range(length):
            row, other_row = query < PLAN.sequence_length, key < PLAN.sequence_length
            if row:
                allowed = other_row and key <= query
            else:
                step, block = divmod(query - PLAN.sequence_length, PLAN.num_blocks)
                other_step, other_block = divmod(key - PLAN.sequence_length, PLAN.num_blocks)
                allowed = key < PLAN.anchors[block] if other_row else other_block == block and other_step <= step
            assert (layout.mask[query, key] == 0) == allowed, (query, key)


def test_the_mask_is_built_once():
    arguments = (PLAN, 2, "sdpa", torch.float32, torch.device("cpu"))
    assert dense_layout(*arguments) is dense_layout(*arguments)


def test_places_in_a_step_major_sequence():
    """Every generated token is at the place that its successor's logits and its feature are read from."""
    rollouts = torch.arange(PLAN.generated_per_row).view(1, PLAN.num_samples, PLAN.num_blocks, PLAN.generate_length)
    row = 1000 + torch.arange(PLAN.sequence_length)[None]
    sequence, positions = step_major_sequence(row, rollouts, PLAN)
    assert sequence.shape == (PLAN.num_samples, PLAN.sequence_length + PLAN.num_blocks * PLAN.generate_length)
    predicting = predicting_positions(PLAN, row.device)
    generated, targets = feature_positions(PLAN, range(PLAN.generate_length), row.device)
    for sample in range(PLAN.num_samples):
        assert torch.equal(sequence[sample, generated], rollouts[0, sample])
        assert torch.equal(sequence[sample, predicting[:, 1:]], rollouts[0, sample, :, :-1])
    anchors = torch.tensor(PLAN.anchors)
    assert torch.equal(predicting[:, 0], anchors - 1)
    assert torch.equal(targets, anchors[:, None] + torch.arange(PLAN.generate_length))
    assert torch.equal(positions[generated], targets)


def test_existing_trainers_rows_pass_through_every_layer(groups):
    """Counted by hooks on the layers, not by the formulas that the benchmark prints."""
    case = TINY_CASES["stride=G"]
    _, naive = trainers(case, groups)
    plan, seen = naive.trainer.plan, {}

    def counting(name):
        return lambda layer, inputs: seen.__setitem__(name, seen.get(name, 0) + inputs[0].shape[0] * inputs[0].shape[1])

    for name, stage in (("policy", naive.trainer.stage), ("features", naive.feature_stage)):
        for number, layer in enumerate(stage.layers):
            layer.register_forward_pre_hook(counting((name, number)))
    naive_step(naive, random_rows(case, VOCABULARY), 0, 0.0)
    packed = plan.num_samples * (plan.sequence_length + plan.num_blocks * plan.generate_length)
    while_generating = sum(plan.num_samples * (plan.sequence_length + plan.num_blocks * t) for t in range(4))
    assert {seen["policy", number] for number in range(4)} == {while_generating + packed}
    assert {seen["features", number] for number in range(4)} == {packed}


def test_the_baseline_needs_no_more_logits_than_it_says(groups):
    """The head of every pass sees every position, and nothing else has the vocabulary's size."""
    case = TINY_CASES["stride<G"]
    _, naive = trainers(case, groups)
    timers = LabelledTimers()
    naive = dataclasses.replace(naive, trainer=dataclasses.replace(naive.trainer, timers=timers))
    with ProductCounter(timers) as counter:
        naive_step(naive, random_rows(case, VOCABULARY), 0, 0.0)
    head = [p.rows for p in counter.products if p.phase == "rollout" and p.columns == VOCABULARY]
    plan = naive.trainer.plan
    assert head == [2 * (plan.sequence_length + plan.num_blocks * t) for t in range(plan.generate_length)]
