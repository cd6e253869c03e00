"""The work of a step as the dry run prints it."""

import pytest

from ebft_mega.apps.benchmark.case import MODELS, BenchCase
from ebft_mega.config.schema import EbftConfig, TrainConfig
from ebft_mega.cost.cost_table import aligned, work_text
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.errors import InputError

LARGE = MODELS["7b"].architecture


def text_of(shares=None, reuse="checkpoints", **sections):
    config = BenchCase("", 1024).config(MODELS["7b"], "checkpoints").model_copy(update=sections)
    shape = StepShape.of(config, LARGE, LARGE)
    return config, shape, work_text(config, shape, reuse, shares)


def figures(text):
    return {line[:26].strip(): line[26:].split() for line in text.splitlines()[1:6]}


def test_all_rows_of_a_step_count():
    """307.6 TFLOP a row (`docs/performance.md`), of which the layers are computed twice."""
    _, _, text = text_of(train=TrainConfig(global_batch_size=10, max_steps=1))
    found = figures(text)
    assert found["total"] == ["3,076"] and found["policy backward"] == ["1,943"]
    assert text.splitlines()[-1].endswith("--distinct-shares says what that leaves.")


def test_shares_give_a_second_column_and_the_ratio():
    shares = DistinctShares(0.55, 0.5, 0.6)
    _, shape, text = text_of(shares)
    merged = cost_of_step(shape.with_nodes(RolloutNodes.of_shares(shape.plan, shares)), "checkpoints").total
    plain = cost_of_step(shape, "checkpoints").total
    assert figures(text)["total"] == [f"{plain / 1e12:,.4g}", f"{merged / 1e12:,.4g}", f"{merged / plain:.3f}"]
    assert 0.5 < merged / plain < 0.7
    # Learning has no forward pass of its own: nothing over nothing is left empty.
    assert figures(text)["policy forward"] == ["0", "0"]
    assert "--distinct-shares" not in text


def test_what_is_not_merged_or_not_there():
    _, _, text = text_of(ebft=EbftConfig(merge_equal_prefixes=False))
    assert text.splitlines()[-1] == "This run merges nothing: ebft.merge_equal_prefixes is false."
    plain = {"ebft": EbftConfig(rl_coef=0.0, ce_coef=1.0), "reuse": "off"}
    _, _, text = text_of(**plain)
    assert figures(text)["features"] == ["0"] and "merge" not in text.splitlines()[-1]
    with pytest.raises(InputError, match="found a run without rollouts"):
        text_of(DistinctShares(0.5), **plain)
    with pytest.raises(InputError, match="that of features lies between it and"):
        text_of(DistinctShares(0.5, 0.9))


def test_columns():
    assert aligned([["", "a"], ["bc", "10"]]) == ["     a", "bc  10"]
