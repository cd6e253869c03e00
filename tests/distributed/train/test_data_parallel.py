"""One and two data-parallel ranks under ZeRO-3 take the same steps as plain torch, whatever the settings."""

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.evaluation.held_out import EvaluationSettings
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.hooks import HeldOut, evaluate_now
from ebft_mega.types import TokenBatch
from tests.conftest import tiny_config
from tests.distributed.plain import plain_steps
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import NUM_STEPS, Case, Layout, config_of, rows_of_step, run_cases

CASES = (
    Case("plain"),
    Case("two rows a micro-batch", ("train.micro_batch_size=2",)),
    Case("checkpointing", ("train.activation_checkpointing=full",)),
    Case("cross-entropy only", ("ebft.rl_coef=0", "ebft.ce_coef=1")),
    Case("rollouts only", ("ebft.ce_coef=0", "train.grad_clip=0", "train.weight_decay=0.1")),
    Case("top_p and mean pooling", ("ebft.top_p=0.9", "ebft.embed_method=mean_pooling"), "qwen3"),
    Case("bfloat16", ("train.dtype=bfloat16",), "qwen2"),
)
EXACT = [case for case in CASES if "bfloat16" not in case.name]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(1, run_cases, Layout(1, 1, 1), CASES, str(tmp_path_factory.mktemp("one")))[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, run_cases, Layout(2, 1, 1), CASES, str(tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_equal_plain_torch(case, world_size, groups, one_rank, two_ranks, tmp_path):
    truth = plain_steps(case, groups, str(tmp_path))
    results = [one_rank] if world_size == 1 else two_ranks
    for rank, result in enumerate(results):
        outcome = result[case.name]
        for step in range(NUM_STEPS):
            found = outcome.metrics[step]
            assert found["train/loss"] == pytest.approx(truth.losses[step], abs=1e-5), (rank, step)
            norm = truth.grad_norms[step]
            assert found["train/grad_norm"] == pytest.approx(norm, rel=1e-4), (rank, step)
            assert outcome.projections[step] == pytest.approx(truth.projections[step], rel=0, abs=1e-4 * norm)
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
    assert (one_rank["plain"].parameters["model.embed_tokens.weight"] - before).abs().max() > 1e-3


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
            if key.startswith("perf/distinct_rows_share/") and key.endswith("_max"):
                assert value - 1e-6 <= together[key] <= 1.0, key  # the larger share of the two halves
            elif key != "memory/peak_bytes":
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


def evaluate_unequal_rows(directory: str) -> dict[str, float]:
    """Held-out figures of three rows on two ranks: the second has one less, and every pass gathers parameters."""
    groups = make_process_groups(connect())
    config = config_of(CASES[0], directory, ("zero.hold_parameters=none", "zero.feature_network=sharded"))
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    everything = rows_of_step(0, groups)
    own = 3 if groups.data_parallel_size == 1 else 2 - groups.data_parallel_rank
    rows = TokenBatch(everything.tokens[:own], everything.document_ids[:own], everything.row_indices[:own])
    held_out = HeldOut(rows.filled_up(-(-3 // groups.data_parallel_size)), EvaluationSettings.of(config), interval=None)
    return evaluate_now(trainer, held_out, 0, None)


def test_ranks_with_fewer_held_out_rows_than_others_keep_up(tmp_path):
    alone = run_ranks(1, evaluate_unequal_rows, str(tmp_path))[0]
    for means in run_ranks(2, evaluate_unequal_rows, str(tmp_path)):
        assert means == pytest.approx(alone, abs=1e-6) and len(means) == 8
