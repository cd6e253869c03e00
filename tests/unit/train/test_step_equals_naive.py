"""The packed, cached step against the naive one of `naive_blocks.py`."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ebft_mega.block_plan import BlockPlan
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.forest import Forest
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.model.weights.stage_weights import hf_tensors
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.stage_module import runner
from ebft_mega.registry.kinds import FEATURE_MAPS
from ebft_mega.rollout.generate import generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loss_masks import loss_masks
from ebft_mega.types import Rollout
from tests.explicit_features import NORMS
from tests.unit.reward.rewards import advantages_of, rewards_of
from tests.unit.train.naive_blocks import (
    ALIGNMENT_COEF,
    CE_COEF,
    DIVERSITY_COEF,
    ENTROPY_COEF,
    NUM_ROWS,
    RL_COEF,
    SAMPLING,
    Case,
    context_of,
    counts_in,
    document_of,
    naive_advantage,
    naive_block,
    naive_entropy,
    naive_features,
    naive_logprobs,
    naive_rollouts,
    naive_target_logits,
    setting_of,
)

CASES = {
    "stride<G": Case(BlockPlan(24, 2, 4, 4, 4)),
    "stride=G": Case(BlockPlan(32, 8, 8, 8, 4), model_type="qwen2"),
    "stride>G": Case(BlockPlan(30, 8, 2, 4, 3), whitening="feature", model_type="qwen3"),
    "one-block": Case(BlockPlan(16, 8, 8, 8, 4), whitening="none"),
    "one-token": Case(BlockPlan(12, 1, 3, 1, 3)),
    "n=1": Case(BlockPlan(20, 4, 4, 4, 1), whitening="none"),
    "n=2": Case(BlockPlan(20, 4, 4, 4, 2), embed_method="mean_pooling"),
    "n=5": Case(BlockPlan(20, 4, 4, 4, 5), embed_method="mean_pooling", feature_norm="per_layer", whitening="none"),
    "inner-product": Case(
        BlockPlan(20, 4, 4, 4, 3), embed_method="mean_pooling", whitening="none", alignment="inner_product"
    ),
    # Two fractions may name one depth, which then counts twice.
    "repeated": Case(BlockPlan(20, 4, 4, 4, 3), feature_layers=(0.25, 0.3, 0.75, 0.8), taps=(1, 1, 3, 3)),
    "all-layers": Case(BlockPlan(20, 4, 4, 4, 3), feature_layers=(0.5, 1.0), taps=(2, 4)),
    "per-layer": Case(BlockPlan(20, 4, 4, 4, 4), feature_norm="per_layer"),
    # Six token ids and one generated token: many groups hold equal rollouts.
    "duplicates": Case(BlockPlan(16, 1, 2, 1, 4), vocab_size=6),
    # Anchors 3, 5, ..., 23; boundaries at an anchor, right behind one, inside a target; a document of one token.
    "masked": Case(BlockPlan(25, 2, 3, 2, 3), starts=((0, 5, 6, 13), (0, 12))),
    "masked, mean pooling": Case(
        BlockPlan(30, 2, 3, 3, 3),
        embed_method="mean_pooling",
        feature_norm="per_layer",
        model_type="qwen3",
        starts=((0, 1, 2, 11, 29), (0, 8, 14, 23)),
    ),
    "masked, stride>G": Case(BlockPlan(34, 7, 2, 4, 2), model_type="qwen2", starts=((0, 10), (0, 2, 15, 16))),
    "masked, no block counted": Case(BlockPlan(14, 2, 2, 2, 3), starts=((0, *range(1, 14)), (0, *range(1, 14, 2)))),
    "masked, a document a row": Case(BlockPlan(20, 4, 4, 4, 3), starts=((0,), (0,))),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def setting(request, groups, tmp_path):
    return setting_of(request.param, groups, tmp_path)


@pytest.mark.parametrize("setting", [Case(BlockPlan(16, 4, 4, 4, 3))], indirect=True, ids=["maps"])
def test_every_feature_map_gives_the_naive_products(setting):
    """All maps, both norms, with weights of layers and without, on the same rollouts."""
    s, plan = setting, setting.plan
    shape = (NUM_ROWS, plan.num_samples, plan.num_blocks, plan.generate_length)
    tokens = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3))  # many begin alike
    rollout = Rollout(tokens, Forest.of(tokens, merges=True))
    assert rollout.forest.num_nodes < 0.8 * rollout.forest.num_rollout_tokens
    for method in FEATURE_MAPS.own_names():
        for norm in NORMS:
            for weights in (None, (0.5, 0.0, 3.0)):
                s.case = replace(s.case, embed_method=method, feature_norm=norm, layer_weights=weights)
                recipe = FeatureRecipe(FEATURE_MAPS.entry(method)(), plan.generate_length, norm, weights)
                (gram,) = replace(s.network, recipe=recipe).grams([s.batch], [rollout], plan)
                for row, block in ((0, 0), (1, plan.num_blocks - 1)):
                    anchor = plan.anchors[block]
                    own = (*tokens[row, :, block], s.batch.tokens[row, anchor : anchor + plan.generate_length])
                    x = torch.stack([naive_features(s, torch.cat((context_of(s, row, anchor), each))) for each in own])
                    assert (gram[row, block] - x @ x.T).abs().max() <= 1e-9, (method, norm, weights)


@pytest.mark.parametrize("reuse", ["off", "checkpoints", "activations"])
def test_packed_step_equals_naive_step(setting, reuse):
    s, plan = setting, setting.plan
    with torch.no_grad():
        expected_rollouts = naive_rollouts(s)
    policy = PipelinedModel.of(s.policy, runner(s.policy, recording=reuse == "activations"))
    (sampled,) = generate_rollouts(policy, [s.batch], plan, SAMPLING, 3, reuse, with_targets=reuse != "off")
    rollout = sampled.rollout
    assert torch.equal(rollout.tokens, expected_rollouts)

    # Features and rewards. Equal rollouts have equal features on the naive side, too: the same sequence is forwarded.
    (gram,) = s.network.grams([s.batch], [rollout], plan)
    rewards = rewards_of(gram, s.case.whitening, ALIGNMENT_COEF, DIVERSITY_COEF, s.case.alignment)
    counted = counted_blocks(s.batch, plan)
    advantages = advantages_of(rewards, "rloo").masked_fill(~counted[:, None], 0.0)
    naive_advantages = torch.zeros_like(advantages)
    with torch.no_grad():
        for row in range(NUM_ROWS):
            for block, anchor in enumerate(plan.anchors):
                assert counted[row, block] == counts_in(s, row, anchor)
                if not counted[row, block]:
                    continue
                prefix = context_of(s, row, anchor)
                x = torch.stack([naive_features(s, torch.cat((prefix, own))) for own in rollout.tokens[row, :, block]])
                target = s.batch.tokens[row, anchor : anchor + plan.generate_length]
                y = naive_features(s, torch.cat((prefix, target)))
                everything = torch.cat((x, y[None]))
                assert (gram[row, block] - everything @ everything.T).abs().max() <= 1e-9
                alignment, diversity, cfm = naive_block(x, y, s.case.whitening, s.case.alignment)
                assert (rewards.terms["alignment"].values[row, :, block] - alignment).abs().max() <= 1e-7
                assert (rewards.terms["diversity"].values[row, :, block] - diversity).abs().max() <= 1e-7
                assert (rewards.cfm[row, block] - cfm).abs() <= 1e-7 * max(1.0, cfm)
                naive_advantages[row, :, block] = naive_advantage(alignment, diversity)
    assert (advantages - naive_advantages).abs().max() <= 1e-6

    # Log-probabilities, loss and gradient, both sides with our advantages so that only the policy is compared.
    request = ScoreRequest(
        s.batch.tokens, rollout.forest, True, SAMPLING.temperature, s.batch.documents, entropies=True
    )
    ours = request.logprobs(score(s.policy, request, plan, saved=sampled.saved))
    expected_logprobs, expected_targets = naive_logprobs(s, rollout.tokens)
    assert (ours.rollout - expected_logprobs).abs().max() <= 1e-9
    assert (ours.target - expected_targets).abs().max() <= 1e-9

    expected_entropies = naive_entropy(naive_target_logits(s))
    assert (ours.entropies - expected_entropies).abs().max() <= 1e-9

    counts = count_tokens(plan, NUM_ROWS, RL_COEF, CE_COEF, int(counted.sum()))
    terms = loss_terms(ours, advantages, counts, RL_COEF, CE_COEF, entropy_coef=ENTROPY_COEF)
    expected_loss = -CE_COEF * expected_targets.mean() - ENTROPY_COEF * expected_entropies.mean()
    if counted.any():
        of_tokens = (-advantages[..., None] * expected_logprobs).transpose(1, 2)[counted]  # [counted blocks, n, G]
        expected_loss = expected_loss + RL_COEF * of_tokens.mean()
    assert abs(terms.total.item() - expected_loss.item()) <= 1e-9
    terms.total.backward()
    expected_loss.backward()
    gradients = ((name, parameter.grad) for name, parameter in s.policy.named_parameters())
    compared = dict(hf_tensors(gradients, s.policy))
    scale = max(parameter.grad.abs().max() for parameter in s.hf_policy.parameters())
    for name, parameter in s.hf_policy.named_parameters():
        assert (compared[name] - parameter.grad).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("setting", [CASES["masked"]], indirect=True)
@pytest.mark.parametrize("masked", [True, False])
def test_without_the_first_tokens_of_documents_the_loss_is_of_all_others(setting, masked, groups):
    """The naive side takes each document by itself, and learns from all of its tokens but the first."""
    s = setting
    batch = s.batch if masked else replace(s.batch, documents=None)
    data = SimpleNamespace(document_masking=False, on_error="raise", skip_rows=(), train_on_first_token=False)
    config = SimpleNamespace(data=data, uses_rollouts=False, uses_targets=True)
    masks = loss_masks([batch], s.plan, config, groups)
    request = ScoreRequest(batch.tokens, None, True, 0.8, batch.documents, entropies=True)
    ours = request.logprobs(score(s.policy, request, s.plan))
    counts = count_tokens(s.plan, masks.num_rows, 0.0, CE_COEF, masks.num_blocks, masks.num_targets)
    terms = loss_terms(ours, None, counts, 0.0, CE_COEF, *masks.of(0), entropy_coef=ENTROPY_COEF)

    parts, entropies = [], []
    for row in range(NUM_ROWS):
        for start, end in sorted({document_of(s, row, position) for position in range(s.plan.sequence_length)}):
            seen = start if masked else 0
            logits = s.hf_policy(batch.tokens[row, seen:end][None]).logits[0, start - seen : -1]
            parts.append(logits.log_softmax(-1).gather(-1, batch.tokens[row, start + 1 : end, None])[:, 0])
            entropies.append(naive_entropy(logits))
    expected, entropy = -torch.cat(parts).mean(), torch.cat(entropies).mean()
    assert masks.num_targets == len(torch.cat(parts)) < NUM_ROWS * (s.plan.sequence_length - 1)
    assert abs(terms.ce.item() - expected.item()) <= 1e-9 and abs(terms.entropy.item() - entropy.item()) <= 1e-9
    terms.total.backward()
    (CE_COEF * expected - ENTROPY_COEF * entropy).backward()
    compared = dict(hf_tensors(((name, parameter.grad) for name, parameter in s.policy.named_parameters()), s.policy))
    scale = max(parameter.grad.abs().max() for parameter in s.hf_policy.parameters())
    for name, parameter in s.hf_policy.named_parameters():
        assert (compared[name] - parameter.grad).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("setting", [CASES["stride=G"], CASES["one-token"]], indirect=True)
def test_rollouts_alone_and_targets_alone_score_the_same(setting):
    s = setting
    forest = generate_rollouts(s.model, [s.batch], s.plan, SAMPLING, step=0)[0].rollout.forest
    both = score(s.policy, ScoreRequest(s.batch.tokens, forest, True, 0.8), s.plan)
    (alone,) = score(s.policy, ScoreRequest(s.batch.tokens, forest, False, 0.8), s.plan)
    (targets,) = score(s.policy, ScoreRequest(s.batch.tokens, None, True, 0.8), s.plan)
    torch.testing.assert_close(both[0], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(both[1], targets, atol=1e-12, rtol=0)


def test_the_masked_cases_keep_some_blocks_and_drop_others():
    """Otherwise they would not test what they are for."""
    shares = {}
    for name, case in CASES.items():
        if case.starts is not None:
            s = SimpleNamespace(case=case, plan=case.plan)
            counted = [counts_in(s, row, anchor) for row in range(NUM_ROWS) for anchor in case.plan.anchors]
            shares[name] = sum(counted) / len(counted)
    assert shares.pop("masked, no block counted") == 0 and shares.pop("masked, a document a row") == 1
    assert all(0.2 < share < 0.8 for share in shares.values()), shares


def test_the_duplicates_case_has_duplicates():
    """Otherwise the case would not test what its name says."""
    plan = CASES["duplicates"].plan
    assert plan.num_samples**2 > CASES["duplicates"].vocab_size
