"""The token critic's counts: on the quickstart's model, and where they are added and left out."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ebft_mega.apps.benchmark.case import MODELS, BenchCase
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.load import load_config
from ebft_mega.cost.cost_table import work_text
from ebft_mega.cost.critic_cost import CriticShape
from ebft_mega.cost.mfu import model_flops_utilisation
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step, least_cost_of_step
from tests.overrides import last_of_each

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CRITIC = ("ebft.advantage_estimator=token_critic", "ebft.alignment=inner_product", "ebft.use_whitening=false")


def quickstart(*overrides):
    """The quickstart's configuration with the critic, and the model that its warm start makes."""
    sizes = yaml.safe_load((CONFIGS / "quickstart_warmstart.yaml").read_text())["model"]["config"]
    config = load_config(CONFIGS / "quickstart.yaml", last_of_each(*CRITIC, *overrides))
    return config, Architecture.from_hf(sizes, "quickstart")


@pytest.mark.parametrize("shares", [None, DistinctShares(0.55, 0.48, 0.58)], ids=["nothing merged", "merged"])
@pytest.mark.parametrize("reuse", ["off", "checkpoints", "activations"])
def test_the_critic_is_at_most_15_percent_of_the_quickstart_s_step(shares, reuse):
    config, architecture = quickstart()
    shape = StepShape.of(config, architecture, architecture)
    cost = cost_of_step(shape.with_nodes(RolloutNodes.of_shares(shape.plan, shares)), reuse)
    assert 0.03 < cost.critic / cost.total <= 0.15


def test_its_sizes_are_those_of_the_configuration():
    config, architecture = quickstart("ebft.n_samples_per_prompt=8")
    small = dataclasses.replace(architecture, hidden_size=96)
    assert CriticShape.of(config, architecture, small) == CriticShape(64, 3 * 96, True, True, 16)
    for overrides, expected in (
        (("ebft.embed_method=last_token", "options.token_critic.rank=9"), CriticShape(9, 384, False, True, 16)),
        (("ebft.embed_method=concat", "train.global_batch_size=8"), CriticShape(64, 3 * 4 * 128, False, True, 8)),
        (("ebft.merge_equal_prefixes=false",), CriticShape(64, 384, True, False, 16)),
        (("options.token_critic.rank=512",), CriticShape(128, 384, True, True, 16)),
        (("ebft.advantage_estimator=rloo",), None),
        (("ebft.rl_coef=0",), None),
    ):
        config, architecture = quickstart(*overrides)
        assert CriticShape.of(config, architecture, architecture) == expected, overrides


def test_without_a_critic_a_step_costs_what_it_did():
    config, architecture = quickstart()
    shape = StepShape.of(config, architecture, architecture)
    plain = dataclasses.replace(shape, critic=None)
    for count in (lambda each: cost_of_step(each, "checkpoints"), least_cost_of_step):
        with_it, without = count(shape), count(plain)
        assert without.critic == 0 and with_it.total - without.total == with_it.critic > 0
        assert with_it.update.total == with_it.update.flops.critic > 0 == without.update.total
    # Learning with a forward pass of its own takes the mean vectors a second time.
    again = cost_of_step(shape, "off").critic - cost_of_step(shape, "checkpoints").critic
    assert again == 2 * 512 * 64 * shape.rollout_head_rows


def test_merging_makes_it_cheaper_and_a_larger_batch_solves_less_often():
    config, architecture = quickstart()
    shape = StepShape.of(config, architecture, architecture)
    merged = shape.with_nodes(RolloutNodes.of_shares(shape.plan, DistinctShares(0.55, 0.48, 0.58)))
    assert 0.6 < cost_of_step(merged, "checkpoints").critic / cost_of_step(shape, "checkpoints").critic < 0.9
    alone = dataclasses.replace(shape, critic=dataclasses.replace(shape.critic, rows_of_step=1))
    of_one, of_sixteen = (cost_of_step(each, "checkpoints").update.total for each in (alone, shape))
    assert of_one // 16 == of_sixteen


def test_the_dry_run_has_a_line_for_it():
    config, architecture = quickstart()
    shape = StepShape.of(config, architecture, architecture)
    cost = cost_of_step(shape, "checkpoints")
    lines = work_text(config, shape, "checkpoints", DistinctShares(0.8)).splitlines()
    (row,) = [line for line in lines if line.startswith("of it the token critic")]
    assert row.split()[5] == f"{16 * cost.critic / 1e12:.4g}"
    merged = cost_of_step(shape.with_nodes(RolloutNodes.of_shares(shape.plan, DistinctShares(0.8))), "checkpoints")
    assert lines[-1] == f"The token critic is {merged.critic / merged.total:.1%} of the total, once it is used."
    assert any(line.startswith("update ") for line in lines)
    plain = work_text(config, dataclasses.replace(shape, critic=None), "checkpoints", None)
    assert "critic" not in plain and "update" not in plain


def test_utilisation_does_not_count_it():
    large = MODELS["7b"].architecture
    with_it, without = (
        BenchCase("", 1024).config(MODELS["7b"], "checkpoints", estimator=estimator)
        for estimator in ("token_critic", "rloo")
    )
    utilised = [model_flops_utilisation(config, large, large, 1.0, 1, 1e15) for config in (with_it, without)]
    assert utilised[0] == utilised[1]
