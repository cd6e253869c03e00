"""Documents that share a row do not know each other, and what they cut in two has no weight."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.load import load_config
from ebft_mega.evaluation.held_out import EvaluationSettings, evaluate
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.maps.mean_pooling import MeanPooling
from ebft_mega.forest import Forest
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.optimizer import Update
from ebft_mega.parallel.stage_module import runner
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loss_masks import LossMasks, loss_masks
from ebft_mega.train.step import StepResult
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.train.step_trace import _local_tensors
from ebft_mega.types import Experience, Learned, LossTerms, PolicyLogprobs, Rollout, TokenBatch
from tests.conftest import tiny_config
from tests.unit.reward.rewards import made_rewards

PLAN = BlockPlan(29, 3, 3, 2, 3)
SAMPLING = SamplingSettings(seed=7, temperature=0.8, top_p=1.0)
# Every rollout by itself: passes of one length whatever is drawn, so that equal rows are equal to the last bit.
APART = replace(SAMPLING, merge_equal_prefixes=False)
# Two documents that hold blocks, and one of one token between them; the second row begins with the next one.
STARTS = ((0, 13, 14), (0, 15))
CHANGED, KEPT = slice(0, 13), slice(14, 29)  # of the first row: the document that is rewritten, and another one


def batch_of(starts, length, tokens=None, indices=None):
    """Rows whose masked documents start there."""
    rows = len(starts)
    if tokens is None:
        tokens = torch.randint(0, 131, (rows, length), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[7 + sum(position >= start for start in row) for position in range(length)] for row in starts])
    indices = torch.arange(rows) if indices is None else torch.tensor(indices)
    return TokenBatch(tokens, ids, indices).with_document_masking()


def rows_of_documents(length, num_rows=2):
    row = st.sets(st.integers(1, length - 1)).map(lambda starts: (0, *sorted(starts)))
    return st.lists(row, min_size=num_rows, max_size=num_rows).map(tuple)


@given(rows_of_documents(12, num_rows=3))
def test_starts_are_where_ids_change_and_travel_with_their_rows(starts):
    batch = batch_of(starts, 12)
    assert batch.documents.starts == starts
    expected = [[max(start for start in row if start <= position) for position in range(12)] for row in starts]
    assert batch.documents.token_starts.tolist() == expected

    first, second = batch.split(2)
    for part, rows in ((first, slice(0, 2)), (second, slice(2, 3)), (batch.to(torch.device("cpu")), slice(0, 3))):
        assert part.documents.starts == starts[rows]
        assert part.documents.token_starts.tolist() == expected[rows]
        assert torch.equal(part.tokens, batch.tokens[rows])
    filled = second.filled_up(3)
    assert filled.documents.starts == (starts[2], (0,), (0,))
    assert filled.documents.token_starts.tolist() == [expected[2], [0] * 12, [0] * 12]


def test_rows_without_masking_stay_so():
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    batch = TokenBatch(tokens, tokens, torch.arange(3))
    parts = (batch, *batch.split(2), batch.filled_up(4), batch.to(torch.device("cpu")))
    assert all(part.documents is None for part in parts)
    assert counted_blocks(batch.filled_up(4), BlockPlan(4, 1, 1, 1, 2)).tolist() == [[True] * 3] * 3 + [[False] * 3]


@given(
    rows_of_documents(20),
    st.sampled_from([BlockPlan(20, 2, 4, 2, 1), BlockPlan(20, 5, 2, 3, 1), BlockPlan(20, 1, 1, 4, 1)]),
    st.booleans(),
)
def test_a_block_counts_if_its_context_and_target_are_of_one_document(starts, plan, is_filler):
    batch = batch_of(starts, 20, indices=[3, -1 if is_filler else 0])
    windows = [slice(anchor - plan.context_length, anchor + plan.generate_length) for anchor in plan.anchors]
    expected = [[len(set(ids[window])) == 1 for window in windows] for ids in batch.document_ids.tolist()]
    if is_filler:
        expected[1] = [False] * plan.num_blocks
    assert counted_blocks(batch, plan).tolist() == expected


@pytest.fixture(scope="module")
def models(groups):
    """A policy and a feature network in float64."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float64)
    load_weights(stage, RandomWeights(architecture, seed=1))
    settings = FeatureSettings((0.25, 0.5, 0.75), FeatureRecipe(MeanPooling(), PLAN.generate_length), torch.float64)
    network = build_feature_network(architecture, RandomWeights(architecture, seed=2), settings, groups)
    return SimpleNamespace(stage=stage, policy=PipelinedModel.of(stage), network=network)


def step_of(models, batch, reuse, sampling=APART):
    """Rollouts, Gram matrices, log-probabilities, and the gradient of those of the first row's `KEPT` document."""
    policy = PipelinedModel.of(models.stage, runner(models.stage, recording=reuse == "activations"))
    (sampled,) = generate_rollouts(policy, [batch], PLAN, sampling, 0, reuse, with_targets=reuse != "off")
    (gram,) = models.network.grams([batch], [sampled.rollout], PLAN)
    request = ScoreRequest(batch.tokens, sampled.rollout.forest, True, 0.8, batch.documents)
    of_rollouts, of_targets = score(models.stage, request, PLAN, saved=sampled.saved)
    continues = [anchor - 1 in range(KEPT.start, KEPT.stop) for anchor in PLAN.anchors]
    own = (of_rollouts[0][:, continues], of_targets[0, KEPT.start : KEPT.stop - 1])
    models.stage.zero_grad()
    sum(part.sum() for part in own).backward()
    gradients = {name: value.grad.clone() for name, value in models.stage.named_parameters()}
    values = {"rollouts": sampled.rollout.tokens, "gram": gram, "logprobs": of_rollouts, "targets": of_targets}
    return SimpleNamespace(**values, gradients=gradients, continues=continues)


def same(first, second, sampling):
    """To the last bit, or to rounding where passes have other lengths."""
    return torch.equal(first, second) if sampling is APART else torch.allclose(first, second, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("reuse", "sampling"),
    [
        ("off", APART),
        ("checkpoints", APART),
        ("activations", APART),
        ("checkpoints", replace(SAMPLING, temperature=0.3)),
    ],
    ids=["off", "checkpoints", "activations", "merged"],
)
def test_rewriting_a_document_changes_nothing_in_the_others(models, reuse, sampling):
    before = batch_of(STARTS, PLAN.sequence_length)
    tokens = before.tokens.clone()
    tokens[0, CHANGED] = (tokens[0, CHANGED] + 17) % 131
    first = step_of(models, before, reuse, sampling)
    second = step_of(models, replace(before, tokens=tokens), reuse, sampling)

    counted, continues = counted_blocks(before, PLAN), first.continues
    assert not torch.equal(first.rollouts, second.rollouts)
    assert torch.equal(first.rollouts[0][:, continues], second.rollouts[0][:, continues])
    assert torch.equal(first.rollouts[1], second.rollouts[1])
    assert same(first.logprobs[0][:, continues], second.logprobs[0][:, continues], sampling)
    assert same(first.logprobs[1], second.logprobs[1], sampling)
    assert same(first.targets[0, KEPT.start :], second.targets[0, KEPT.start :], sampling)
    assert same(first.targets[1], second.targets[1], sampling)
    of_counted = counted[0] & torch.tensor(continues)
    assert of_counted.sum() >= 3
    tolerance = 1e-14 if sampling is APART else 1e-12
    torch.testing.assert_close(first.gram[0, of_counted], second.gram[0, of_counted], atol=tolerance, rtol=0)
    assert same(first.gram[1], second.gram[1], sampling)
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(second.gradients[name], gradient, atol=1e-12, rtol=1e-12)


def test_without_masking_the_rewritten_document_is_seen(models):
    """Otherwise the test above would pass whatever is computed."""
    before = replace(batch_of(STARTS, PLAN.sequence_length), documents=None)
    tokens = before.tokens.clone()
    tokens[0, CHANGED] = (tokens[0, CHANGED] + 17) % 131
    first, second = step_of(models, before, "off"), step_of(models, replace(before, tokens=tokens), "off")
    assert (first.targets[0, KEPT.start :] - second.targets[0, KEPT.start :]).abs().min() > 1e-6
    assert torch.equal(first.targets[1], second.targets[1])


def config_of(tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: o\nmodel: {init_from: m}\ndata: {shards: s, sequence_length: 1024}\ntrain: {max_steps: 1}\n"
    )
    return load_config(path, overrides)


def test_counts_are_taken_only_where_something_may_not_count(tmp_path, groups):
    batch = batch_of(STARTS, PLAN.sequence_length, indices=[4, -1])
    parts = batch.split(1)
    shared = [replace(part, documents=None) for part in parts]
    assert loss_masks(shared, PLAN, config_of(tmp_path), groups) is None
    skipping = loss_masks(shared, PLAN, config_of(tmp_path, "data.on_error=skip"), groups)
    assert (skipping.num_rows, skipping.num_blocks) == (1, PLAN.num_blocks)
    masked = loss_masks(parts, PLAN, config_of(tmp_path, "data.document_masking=true"), groups)
    assert [part.tolist() for part in masked.rows] == [[True], [False]]
    assert torch.equal(torch.cat(masked.blocks), counted_blocks(batch, PLAN))
    assert masked.num_blocks == counted_blocks(batch, PLAN).sum() < PLAN.num_blocks
    assert masked.targets is None and masked.num_targets is None
    without_firsts = "data.train_on_first_token=false"
    firsts = loss_masks(shared, PLAN, config_of(tmp_path, without_firsts, "ebft.ce_coef=0.1"), groups)
    not_first = torch.tensor([place not in STARTS[0] for place in range(1, PLAN.sequence_length)])
    assert torch.equal(torch.cat(firsts.targets), torch.stack([not_first, torch.zeros_like(not_first)]))  # and filler
    assert firsts.num_targets == not_first.sum() < len(not_first) and firsts.num_rows == 1
    assert loss_masks(shared, PLAN, config_of(tmp_path, without_firsts), groups) is None  # no cross-entropy
    text_only = ("data.document_masking=true", "ebft.rl_coef=0", "ebft.ce_coef=1")
    assert loss_masks(parts, PLAN, config_of(tmp_path, *text_only), groups) is None
    with pytest.raises(ValueError, match="rows with masked documents"):
        loss_masks(shared, PLAN, config_of(tmp_path, "data.document_masking=true"), groups)


def result_of(batch, blocks):
    """A step with one rollout per block, as far as a trace and a dump look at it."""
    shape = (len(batch.tokens), 1, PLAN.num_blocks)
    ones = torch.ones(shape, dtype=torch.float64)
    rewards = made_rewards(ones, ones, torch.ones(shape)[:, 0], 2.0, 1.0)
    gram = torch.zeros(2, PLAN.num_blocks, 2, 2)
    tokens = torch.zeros(*shape, 2, dtype=torch.int64)
    experience = Experience(Rollout(tokens, Forest.of(tokens, merges=True)), gram, rewards, rewards.reward)
    if blocks is not None:
        experience = replace(experience, counted_blocks=blocks)
    masks = None if blocks is None else LossMasks((batch.row_indices >= 0,), (blocks,), 2, int(blocks.sum()))
    return StepResult((batch,), (experience,), (), Update(1.0, True), masks)


def test_a_trace_names_the_counted_blocks_of_masked_documents_alone():
    batch = batch_of(STARTS, PLAN.sequence_length)
    counted = counted_blocks(batch, PLAN)
    assert torch.equal(_local_tensors(result_of(batch, counted), None)["kept"], counted.to(torch.uint8))
    assert "kept" not in _local_tensors(result_of(replace(batch, documents=None), counted), None)
    assert "kept" not in _local_tensors(result_of(replace(batch, documents=None), None), None)


def test_means_over_blocks_are_left_out_of_a_step_in_which_none_counts(tmp_path, groups):
    batch = batch_of(STARTS, PLAN.sequence_length)
    config = config_of(tmp_path, "data.document_masking=true", "ebft.ce_coef=1")
    trainer = SimpleNamespace(config=config, groups=groups, plan=PLAN, feature_network=object())
    terms = LossTerms(rl=torch.tensor(0.0), ce=torch.tensor(2.0), total=torch.tensor(2.0))

    def metrics(counted):
        learned = (Learned(PolicyLogprobs(None, None), terms),)
        return step_metrics(trainer, replace(result_of(batch, counted), learned=learned), 0.1)

    counted, none = metrics(counted_blocks(batch, PLAN)), metrics(torch.zeros(2, PLAN.num_blocks, dtype=torch.bool))
    assert set(counted) - set(none) == {
        *("ebft/alignment", "ebft/diversity", "ebft/mean_reward", "ebft/cfm_loss"),
        *("ebft/advantages_std", "ebft/duplicate_share"),
    }
    assert (none["ebft/rl_loss"], none["train/loss"], none["data/dropped_anchor_share"]) == (0.0, 2.0, 1.0)
    assert 0 < counted["data/dropped_anchor_share"] < 1


def evaluation_of(models, batch):
    return evaluate(models.policy, models.network, batch, EvaluationSettings(PLAN, SAMPLING, "sample", 2))


def test_an_evaluation_is_over_the_blocks_that_count_and_a_row_without_has_no_figures(models):
    """The second row, a document per token, has a cross-entropy and nothing else; filler has nothing."""
    batch = batch_of((STARTS[0], tuple(range(29)), STARTS[1]), 29).filled_up(4)
    found = evaluation_of(models, batch)
    assert json.loads(json.dumps(found.per_row, allow_nan=False)) == found.per_row
    for name, values in found.per_row.items():
        assert [value is None for value in values] == [False, name != "eval/ce_loss", False], name
        known = [value for value in values if value is not None]
        assert found.means[name] == pytest.approx(np.mean(known))

    (sampled,) = generate_rollouts(models.policy, [batch], PLAN, SAMPLING, -1)
    (gram,) = models.network.grams([batch], [sampled.rollout], PLAN)
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = (gram[..., :-1, -1] / lengths[..., :-1] / lengths[..., -1:]).mean(dim=-1)
    for row in (0, 2):
        expected = cosine[row][counted_blocks(batch, PLAN)[row]].mean().item()
        assert found.per_row["eval/raw_cosine"][row] == pytest.approx(expected, abs=1e-12)
    for block in found.shown:
        assert counted_blocks(batch, PLAN)[block.row, block.block]
        start = max(start for start in STARTS[0] if start < PLAN.anchors[block.block])
        assert block.context == batch.tokens[0, start : PLAN.anchors[block.block]].tolist()


def test_a_figure_that_no_row_has_is_left_out_of_the_means(models):
    found = evaluation_of(models, batch_of((tuple(range(29)),), 29))
    counts = {"eval/rows_left_out": 0.0, "eval/blocks_left_out": 0.0}
    assert found.means == {"eval/ce_loss": found.means["eval/ce_loss"], **counts} and found.shown == ()
