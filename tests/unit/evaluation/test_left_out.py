"""An evaluation leaves out what is not finite, says how much, and keeps every other figure bit for bit."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.evaluation import held_out
from ebft_mega.evaluation.held_out import EvaluationSettings, evaluate
from ebft_mega.features import network as network_module
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.maps.last_token import LastToken
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.types import TokenBatch
from tests.conftest import tiny_config

PLAN = BlockPlan(29, 3, 3, 2, 3)
ROWS, BAD_ROW, BAD_BLOCK = 3, 1, 2
CROSS_ENTROPY = "eval/ce_loss"


@pytest.fixture(scope="module")
def models(groups):
    """A policy, and a feature network of another model."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, seed=1))
    settings = FeatureSettings((0.25, 0.75), FeatureRecipe(LastToken(), PLAN.generate_length), torch.float32)
    network = build_feature_network(architecture, RandomWeights(architecture, seed=2), settings, groups)
    return SimpleNamespace(policy=PipelinedModel.of(stage), network=network)


def rows(masked=False):
    """Real rows and a filler row; masked, each real row is two documents."""
    tokens = torch.randint(0, 131, (ROWS, 29), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, (torch.arange(29) >= 14).long().expand(ROWS, 29), torch.arange(ROWS)).filled_up(4)
    return batch.with_document_masking() if masked else batch


def evaluation_of(models, batch):
    settings = EvaluationSettings(PLAN, SamplingSettings(seed=7, temperature=0.8, top_p=0.9), "feature", 2)
    return evaluate(models.policy, models.network, batch, settings)


def spoil_features(monkeypatch, value, places):
    """Spoil an inner product of some (row, block); micro-batches have two rows."""
    original, calls = network_module.block_grams, []

    def spoiled(*arguments):
        gram = original(*arguments)
        for row, block in places:
            if row // 2 == len(calls):
                gram[row % 2, block, 1, 1] = value
        calls.append(None)
        return gram

    monkeypatch.setattr(network_module, "block_grams", spoiled)


def spoil_logits(monkeypatch, value, places):
    """Spoil a logit that the first token of some (row, block) is drawn from."""
    original, calls = Stage.logits, []

    def spoiled(stage, hidden):
        logits = original(stage, hidden)
        if len(hidden) == PLAN.num_blocks * 2:  # the document's pass of a micro-batch, [B, K]
            for row, block in places:
                if row // 2 == len(calls):
                    logits[row % 2 * PLAN.num_blocks + block, 100] = value
            calls.append(None)
        return logits

    monkeypatch.setattr(Stage, "logits", spoiled)


@pytest.mark.parametrize("masked", [False, True], ids=["whole rows", "masked documents"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("spoil", [spoil_features, spoil_logits])
def test_a_block_that_is_not_finite_is_left_out_and_counted(models, monkeypatch, spoil, value, masked):
    healthy = evaluation_of(models, rows(masked))
    assert healthy.means["eval/blocks_left_out"] == healthy.means["eval/rows_left_out"] == 0
    # A filler row counts nowhere; neither does the block of two documents.
    uncounted = [(BAD_ROW, 4)] if masked else []
    spoil(monkeypatch, value, [(BAD_ROW, BAD_BLOCK), (3, 0), *uncounted])
    found = evaluation_of(models, rows(masked))
    assert found.means["eval/blocks_left_out"] == 1 and found.means["eval/rows_left_out"] == 0
    assert json.loads(json.dumps(found.per_row, allow_nan=False)) == found.per_row
    for name, values in found.per_row.items():
        assert all(value is not None for value in values), name
        others = [values[row] for row in range(ROWS) if row != BAD_ROW]
        assert others == [healthy.per_row[name][row] for row in range(ROWS) if row != BAD_ROW], name
        assert found.means[name] == sum(values) / ROWS
        unchanged = values[BAD_ROW] == healthy.per_row[name][BAD_ROW]
        assert unchanged is (name == CROSS_ENTROPY) or name == "eval/duplicate_share", name
    assert all(math.isfinite(alignment) for block in found.shown for alignment in block.alignment)


def test_the_figures_of_a_row_are_means_over_its_other_blocks(models, monkeypatch):
    """The row's own figures with each block left out in turn average to those with none left out."""
    healthy = evaluation_of(models, rows()).per_row["eval/alignment"][BAD_ROW]
    partial = []
    for block in range(PLAN.num_blocks):
        with monkeypatch.context() as context:
            spoil_features(context, math.inf, [(BAD_ROW, block)])
            partial.append(evaluation_of(models, rows()).per_row["eval/alignment"][BAD_ROW])
    assert sum(partial) / len(partial) == pytest.approx(healthy, abs=1e-12)
    assert len(set(partial)) == PLAN.num_blocks


def test_a_row_of_which_nothing_is_left_has_no_figures_and_a_metric_without_rows_is_nan(models, monkeypatch):
    every = [(row, block) for row in range(ROWS) for block in range(PLAN.num_blocks)]
    with monkeypatch.context() as context:
        spoil_features(context, math.nan, [place for place in every if place[0] == BAD_ROW])
        one = evaluation_of(models, rows())
    assert one.means["eval/blocks_left_out"] == PLAN.num_blocks
    spoil_features(monkeypatch, math.nan, every)
    none = evaluation_of(models, rows())
    assert none.means["eval/blocks_left_out"] == ROWS * PLAN.num_blocks and none.shown == ()
    for name in one.per_row.keys() - {CROSS_ENTROPY}:
        assert [value is None for value in one.per_row[name]] == [False, True, False] and math.isfinite(one.means[name])
        assert none.per_row[name] == [None] * ROWS and math.isnan(none.means[name])


def test_a_row_whose_cross_entropy_is_not_finite_is_left_out_and_counted(models, monkeypatch):
    healthy, original = evaluation_of(models, rows()), held_out.score_without_gradient

    def spoiled(*arguments):
        found = original(*arguments)
        found[0].target[BAD_ROW, 3] = -math.inf
        found[1].target[1, 3] = math.nan  # filler
        return found

    monkeypatch.setattr(held_out, "score_without_gradient", spoiled)
    found = evaluation_of(models, rows())
    first, _, last = healthy.per_row[CROSS_ENTROPY]
    assert found.per_row[CROSS_ENTROPY] == [first, None, last]
    assert found.means[CROSS_ENTROPY] == (first + last) / 2 and found.means["eval/rows_left_out"] == 1
    assert found.means["eval/blocks_left_out"] == 0
    assert {name: values for name, values in found.per_row.items() if name != CROSS_ENTROPY} == {
        name: values for name, values in healthy.per_row.items() if name != CROSS_ENTROPY
    }


def test_parts_of_an_evaluation_add_up():
    part = held_out.Evaluation({CROSS_ENTROPY: [1.0, None], "eval/alignment": [None, 0.5]}, (), 3)
    merged = held_out.merge([part, replace(part, blocks_left_out=4)])
    assert merged.blocks_left_out == 7 and merged.rows_left_out == 2
