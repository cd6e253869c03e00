"""One and two data-parallel ranks under ZeRO-3 take the same steps as plain torch without any engine."""

import pytest
import torch

from ebft_mega.evaluation.heldout import evaluation_settings
from ebft_mega.features.network import build_feature_network
from ebft_mega.model.architecture import Architecture
from ebft_mega.model.huggingface import RandomWeights, load_weights
from ebft_mega.model.stage import Stage, StageShape
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loop import HeldOut, evaluate_now
from ebft_mega.train.run import build_trainer
from ebft_mega.train.step import judge
from ebft_mega.types import PolicyLogprobs, TokenBatch
from tests.conftest import tiny_config
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import (
    CASES,
    LEARNING_RATE,
    NUM_STEPS,
    Case,
    Outcome,
    config_of,
    rows_of_step,
    run_cases,
)

EXACT = [case for case in CASES if "bfloat16" not in case.name]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(1, run_cases, CASES, str(tmp_path_factory.mktemp("one")))[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, run_cases, CASES, str(tmp_path_factory.mktemp("two")))


def plain_torch(case: Case, groups, directory: str) -> Outcome:
    """The same steps with a whole batch at once, torch's AdamW and torch's clipping: no engine, no partition."""
    config = config_of(case, directory)
    ebft, plan = config.ebft, config.block_plan
    architecture = Architecture.from_hf(config.model.config, "test")
    source = RandomWeights(architecture, config.seed)
    policy = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(policy, source)
    network = build_feature_network(
        architecture, source, ebft.feature_layers, ebft.embed_method, ebft.feature_norm, groups, torch.float32
    )
    matrices = [parameter for parameter in policy.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in policy.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=config.train.betas,
    )
    outcome = Outcome()
    counts = count_tokens(plan, 4, ebft.rl_coef, ebft.ce_coef)
    for step in range(NUM_STEPS):
        rows = rows_of_step(step, groups)
        rollout = advantages = None
        if ebft.rl_coef > 0:
            rollout = generate_rollouts(policy, rows, plan, SamplingSettings.of(config), step)
            advantages = judge(network, rows, rollout, plan, config).advantages
            outcome.rollouts.append(rollout.tokens)
        request = ScoreRequest(rows.tokens, rollout.tokens if rollout else None, ebft.ce_coef > 0, ebft.temperature)
        scores = list(score(policy, request, plan))
        logprobs = PolicyLogprobs(scores.pop(0) if rollout else None, scores.pop(0) if request.targets else None)
        terms = loss_terms(logprobs, advantages, counts, ebft.rl_coef, ebft.ce_coef)
        optimizer.zero_grad()
        terms.total.backward()
        limit = config.train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)
        optimizer.step()
        outcome.metrics.append({"train/loss": terms.total.item(), "train/grad_norm": norm.item()})
    outcome.parameters = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    return outcome


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_equal_plain_torch(case, world_size, groups, one_rank, two_ranks, tmp_path):
    truth = plain_torch(case, groups, str(tmp_path))
    results = [one_rank] if world_size == 1 else two_ranks
    for rank, result in enumerate(results):
        outcome = result[case.name]
        for step in range(NUM_STEPS):
            found, expected = outcome.metrics[step], truth.metrics[step]
            assert found["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5), (rank, step)
            assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4), (
                rank,
                step,
            )
        for name, parameter in truth.parameters.items():
            assert (outcome.parameters[name] - parameter).abs().max() <= 1e-4, name
    for step, tokens in enumerate(truth.rollouts):
        found = torch.cat([result[case.name].rollouts[step] for result in results])
        assert torch.equal(found, tokens), f"rollouts of step {step}"


def test_clipping_was_active_in_the_plain_case(one_rank):
    """Otherwise the comparison would not see a wrong global norm."""
    assert one_rank["plain"].metrics[0]["train/grad_norm"] > 0.5


def test_parameters_move_far_more_than_the_tolerance(one_rank, tmp_path):
    architecture = Architecture.from_hf(tiny_config("llama", initializer_range=0.2), "test")
    before = RandomWeights(architecture, 11).tensor("model.embed_tokens.weight")
    assert (one_rank["plain"].parameters["embedding.weight"] - before).abs().max() > 3e-3


def test_metrics_are_the_same_on_every_rank(two_ranks):
    for case in CASES:
        for first, second in zip(two_ranks[0][case.name].metrics, two_ranks[1][case.name].metrics, strict=True):
            assert {key: value for key, value in first.items() if key != "memory/peak_bytes"} == {
                key: value for key, value in second.items() if key != "memory/peak_bytes"
            }


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
def test_metrics_are_means_over_the_global_batch(case, one_rank, two_ranks):
    """One rank sees all rows itself; two have to put their halves together."""
    for alone, together in zip(one_rank[case.name].metrics, two_ranks[0][case.name].metrics, strict=True):
        assert set(alone) == set(together)
        for key, value in alone.items():
            if key != "memory/peak_bytes":
                assert together[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_micro_batches_do_not_change_the_step(two_ranks):
    single, double = two_ranks[0]["plain"], two_ranks[0]["two rows a micro-batch"]
    assert all(torch.equal(a, b) for a, b in zip(single.rollouts, double.rollouts, strict=True))
    for name, parameter in single.parameters.items():
        assert (double.parameters[name] - parameter).abs().max() <= 1e-4


def test_bfloat16_follows_float32_closely(one_rank, two_ranks):
    """In bfloat16 tokens depend on rounding, so only the loss and the master weights' dtype are compared."""
    for result in (one_rank, two_ranks[0]):
        outcome = result["bfloat16"]
        assert all(value.dtype == torch.float32 for value in outcome.parameters.values())
        assert all(0.1 < metrics["train/grad_norm"] < 50 for metrics in outcome.metrics)
    first, second = one_rank["bfloat16"].metrics[0], two_ranks[0]["bfloat16"].metrics[0]
    assert first["ebft/ce_loss"] == pytest.approx(second["ebft/ce_loss"], rel=1e-2)


def test_cross_entropy_alone_pays_for_no_rollouts(one_rank):
    outcome = one_rank["cross-entropy only"]
    assert outcome.rollouts == []
    assert "ebft/alignment" not in outcome.metrics[0] and "ebft/rl_loss" not in outcome.metrics[0]


def evaluate_fewer_rows_than_ranks(directory: str) -> dict[str, float]:
    """Held-out figures of one row on two ranks: the second has nothing to do."""
    groups = make_process_groups(connect())
    config = config_of(CASES[0], directory)
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    everything = rows_of_step(0, groups)
    first = 1 if groups.data_parallel_rank == 0 else 0
    rows = TokenBatch(everything.tokens[:first], everything.document_ids[:first], everything.row_indices[:first])
    held_out = HeldOut(rows, evaluation_settings(config), interval=None)
    return evaluate_now(trainer, held_out, 0, None)


def test_fewer_held_out_rows_than_ranks_are_evaluated(tmp_path):
    alone = run_ranks(1, evaluate_fewer_rows_than_ranks, str(tmp_path))[0]
    for means in run_ranks(2, evaluate_fewer_rows_than_ranks, str(tmp_path)):
        assert means == pytest.approx(alone, abs=1e-6) and len(means) == 6
