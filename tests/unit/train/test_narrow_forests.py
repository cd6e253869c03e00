"""Whole steps whose forests are as small as they can be: one node, one rollout, one block, one token."""

import math

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from tests.distributed.steps import Case, config_of, rows_of_step

FROZEN = "ebft.temperature=1e-6"
ONE_ROLLOUT = ("ebft.n_samples_per_prompt=1", "ebft.use_whitening=false")
ONE_BLOCK = ("ebft.context_length=20",)
ONE_TOKEN = ("ebft.context_length=3", "ebft.generate_max_len=1")
NARROW = {
    "one node": (FROZEN,),
    "one rollout": ONE_ROLLOUT,
    "one block": ONE_BLOCK,
    "one token": ONE_TOKEN,
    "one of everything": (FROZEN, *ONE_ROLLOUT, "ebft.context_length=23", "ebft.generate_max_len=1"),
    "one node, rollouts only": (FROZEN, "ebft.ce_coef=0"),
    "one node, saved activations": (FROZEN, "learn.reuse_rollout=activations", "zero.hold_parameters=step"),
}


@pytest.mark.parametrize("overrides", NARROW.values(), ids=NARROW.keys())
def test_a_step_of_a_narrow_forest_is_that_without_merging(overrides, groups, tmp_path):
    outcomes = []
    for merges in ("true", "false"):
        case = Case(f"narrow-{merges}", (*overrides, f"ebft.merge_equal_prefixes={merges}"))
        config = config_of(case, str(tmp_path), ("zero.stage=0",))
        architecture = Architecture.from_hf(config.model.config, "test")
        trainer = build_trainer(config, architecture, architecture, groups)
        result = train_step(trainer, rows_of_step(0, groups), 0, 1e-3)
        metrics = step_metrics(trainer, result, 1e-3)
        assert result.update.applied and all(map(math.isfinite, metrics.values()))
        outcomes.append((result, metrics))
    (merged, metrics), (apart, expected) = outcomes
    for own, other in zip(merged.experiences, apart.experiences, strict=True):
        assert torch.equal(own.rollout.tokens, other.rollout.tokens)
        forest = own.rollout.forest
        if FROZEN in overrides:
            assert forest.num_nodes <= forest.num_anchors * len(forest.levels)
    for key, value in expected.items():
        if "distinct_rows" not in key and "memory" not in key:
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
