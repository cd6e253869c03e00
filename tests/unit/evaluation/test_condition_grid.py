"""What one sampling and one packed pass give at several conditions is what an evaluation of each alone gives."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.evaluation import condition_grid
from ebft_mega.evaluation.condition_grid import (
    GridSettings,
    NamedView,
    ViewedFeatures,
    evaluate_grid,
    merge_grid,
    plan_of_length,
)
from ebft_mega.evaluation.conditions import POSITION_BINS, Condition, part_of
from ebft_mega.evaluation.held_out import CROSS_ENTROPY, EvaluationSettings, evaluate
from ebft_mega.evaluation.rollout_figures import part_means
from ebft_mega.features import network
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.maps.concat import Concat
from ebft_mega.features.maps.last_token import LastToken
from ebft_mega.features.maps.mean_pooling import MeanPooling
from ebft_mega.features.views import ViewedNetwork
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.types import TokenBatch
from tests.conftest import tiny_config

TEXT = BlockPlan(31, 3, 4, 3, 3)  # rows as they are
PLAN = BlockPlan(30, 3, 4, 5, 3)  # the longest completions: one token of a row is left over
LENGTHS = (1, 3, 5)
SAMPLING = SamplingSettings(seed=7, temperature=0.8, top_p=0.9)
TEMPERATURES = (0.8, 1.3)
# Name, layers, map, norm and weights of layers; two layers of the last are one.
MAPS = {
    "trained": ((0.25, 0.75), MeanPooling(), "joint", None),
    "last": ((0.5,), LastToken(), "joint", None),
    "concat": ((0.25, 0.3, 1.0), Concat(), "per_layer", (0.5, 1.0, 2.0)),
}


def feature_network(groups, names):
    """A network with the layers of some maps, and the recipe of the first one."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    fractions = tuple(sorted({layer for name in names for layer in MAPS[name][0]}))
    settings = FeatureSettings(fractions, recipe(names[0], PLAN.generate_length), torch.float32)
    return build_feature_network(architecture, RandomWeights(architecture, seed=2), settings, groups)


def recipe(name, length):
    _, pooling, norm, weights = MAPS[name]
    return FeatureRecipe(pooling, length, norm, weights)


@pytest.fixture(scope="module")
def models(groups):
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, seed=1))
    names = [NamedView(name, length) for name in MAPS for length in LENGTHS]
    views = [(MAPS[view.features][0], recipe(view.features, view.completion_length)) for view in names]
    viewed = ViewedNetwork.of(feature_network(groups, list(MAPS)), views)
    return SimpleNamespace(policy=PipelinedModel.of(stage), features=(ViewedFeatures(viewed, tuple(names)),))


def held_out(masked=False):
    """Real rows, some of whose tokens come back, and a filler row; masked, each real row is two documents."""
    tokens = torch.randint(0, 131, (3, 31), generator=torch.Generator().manual_seed(1))
    ids = (torch.arange(31) >= 14).long().expand(3, 31)
    batch = TokenBatch(tokens, ids, torch.arange(3)).filled_up(4)
    return batch.with_document_masking() if masked else batch


def evaluated(models, batches, **changes):
    settings = GridSettings(PLAN, TEXT, SAMPLING, TEMPERATURES, TEMPERATURES, "sample")
    return evaluate_grid(models.policy, models.features, batches, replace(settings, **changes))


@pytest.mark.parametrize("masked", [False, True], ids=["whole rows", "masked documents"])
def test_every_condition_equals_an_evaluation_of_it_alone(models, groups, masked, monkeypatch):
    samplings, generate = [], condition_grid.generate_rollouts
    passes, tap = [], condition_grid.ViewedNetwork.grams

    monkeypatch.setattr(condition_grid, "generate_rollouts", lambda *args: samplings.append(1) or generate(*args))
    monkeypatch.setattr(condition_grid.ViewedNetwork, "grams", lambda *args: passes.append(1) or tap(*args))
    batches = held_out(masked).split(2)
    together = evaluated(models, batches)
    assert len(samplings) == len(passes) == len(TEMPERATURES)
    assert set(together.conditions) == {
        Condition(temperature, length, name) for temperature in TEMPERATURES for length in LENGTHS for name in MAPS
    }
    assert together == merge_grid([evaluated(models, [batch]) for batch in batches])
    for name in MAPS:
        alone_network = feature_network(groups, [name])
        for length in LENGTHS:
            plan = plan_of_length(PLAN, length)
            assert plan.anchors == PLAN.anchors
            whole = held_out()
            cut = TokenBatch(
                whole.tokens[:, : plan.sequence_length],
                whole.document_ids[:, : plan.sequence_length],
                whole.row_indices,
            )
            cut = cut.with_document_masking() if masked else cut
            own = replace(alone_network, recipe=recipe(name, length))
            for temperature in TEMPERATURES[: 2 if name == "last" else 1]:
                settings = EvaluationSettings(plan, replace(SAMPLING, temperature=temperature), "sample", 2)
                alone = evaluate(models.policy, own, cut, settings)
                found = together.conditions[Condition(temperature, length, name)]
                assert found.left_out == 0 and set(found.per_row) == set(alone.per_row) - {CROSS_ENTROPY}
                for metric, values in found.per_row.items():
                    assert values == pytest.approx(alone.per_row[metric], abs=1e-6), (name, length, metric)
                figures = [row[0] for row in zip(*found.per_row.values(), strict=True)]
                assert len(figures) == 3 and len(set(figures)) == 3


def test_equal_completions_are_those_whose_own_tokens_are_equal(models, monkeypatch):
    """Of short completions, whatever comes after them in the longest."""
    seen, original = set(), network.copy_duplicate_rows
    monkeypatch.setattr(
        network, "copy_duplicate_rows", lambda gram, tokens: seen.add(tokens.shape) or original(gram, tokens)
    )
    evaluated(models, [held_out()], temperatures=(0.8,))
    assert seen == {(4, PLAN.num_samples, PLAN.num_blocks, length) for length in LENGTHS}


def test_text_is_scored_as_in_training_to_the_last_bit(models, groups):
    batch = held_out()
    settings = EvaluationSettings(TEXT, SAMPLING, "sample", 2)
    expected = evaluate(models.policy, None, batch, settings).per_row[CROSS_ENTROPY]
    found = evaluated(models, batch.split(2), temperatures=()).text
    assert found.per_row[CROSS_ENTROPY] == expected
    # 30 targets in 8 parts: each has three or four, and their means make the row's.
    sizes = [sum(part_of(place, 30) == part for place in range(30)) for part in range(POSITION_BINS)]
    assert set(sizes) == {3, 4}
    for mean, parts in zip(expected, found.per_position[CROSS_ENTROPY], strict=True):
        weighed = sum(size * value for size, value in zip(sizes, parts, strict=True))
        assert weighed / 30 == pytest.approx(mean, abs=1e-12) and len(set(parts)) == POSITION_BINS


def test_calibration_at_one_temperature_does_not_depend_on_others(models):
    together = evaluated(models, held_out().split(2), temperatures=())
    alone = evaluated(models, held_out().split(2), temperatures=(), calibration_temperatures=TEMPERATURES[1:])
    assert together.calibration[1:] == alone.calibration and together.calibration[0] != alone.calibration[0]
    (found,) = alone.calibration
    assert [sum(counts) for counts in found.per_row["eval/bin_tokens"]] == [30, 30, 30]


def test_figures_by_position_are_means_over_a_parts_blocks(models):
    found = evaluated(models, held_out().split(2)).conditions[Condition(0.8, 3, "trained")]
    blocks = PLAN.num_blocks
    sizes = [sum(part_of(block, blocks) == part for block in range(blocks)) for part in range(POSITION_BINS)]
    assert sum(sizes) == blocks and 0 not in sizes
    for metric, values in found.per_row.items():
        for mean, parts in zip(values, found.per_position[metric], strict=True):
            weighed = sum(size * value for size, value in zip(sizes, parts, strict=True))
            assert weighed / blocks == pytest.approx(mean, abs=1e-9), metric


def test_parts_without_a_used_place_have_no_mean():
    values = torch.arange(20, dtype=torch.float64).view(2, 10)
    values[0, 3] = torch.nan
    used = torch.ones(2, 10, dtype=torch.bool)
    used[0, 3] = used[1, 0] = used[1, 9] = False
    parts = [[place for place in range(10) if part_of(place, 10) == part] for part in range(POSITION_BINS)]
    found = part_means(values, used)
    for row in range(2):
        for part, places in enumerate(parts):
            kept = [float(values[row, place]) for place in places if used[row, place]]
            mean = float(found[row, part])
            assert mean == pytest.approx(sum(kept) / len(kept)) if kept else mean != mean
    assert found.isnan().nonzero().tolist() == [[0, 2], [1, 7]]
    few = part_means(values[:, :3], torch.ones(2, 3, dtype=torch.bool))  # fewer places than parts
    assert few.isnan().sum(dim=1).tolist() == [5, 5] and few[1].nan_to_num(0).tolist() == [10, 0, 11, 0, 0, 12, 0, 0]


def test_a_marked_block_is_left_out_of_rows_and_parts_and_counted(models, monkeypatch):
    healthy = evaluated(models, held_out().split(2)).conditions[Condition(0.8, 5, "last")]
    original = condition_grid.ViewedNetwork.grams

    def spoiled(*arguments):
        grams = original(*arguments)
        for of_view in grams:
            of_view[0][1, 0] = torch.nan
        return grams

    monkeypatch.setattr(condition_grid.ViewedNetwork, "grams", spoiled)
    found = evaluated(models, held_out().split(2)).conditions[Condition(0.8, 5, "last")]
    assert found.left_out == 1
    for metric, values in found.per_row.items():
        assert None not in values and values[0] == healthy.per_row[metric][0]
        first, *others = found.per_position[metric][1]
        assert others == healthy.per_position[metric][1][1:]
        assert (first is None) == (part_of(1, PLAN.num_blocks) > 0)
