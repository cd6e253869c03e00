"""The packed, cached step against a naive one: every block of every sample by itself, through transformers, in float64.

The naive side knows nothing of packing, caches, shared documents or Gram matrices: it re-forwards the whole prefix
for each token it samples, forms the features and whitens them with explicit matrices. Masked documents it forwards
one by one, each at positions from 0.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.forest import Forest
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import hf_tensors, load_weights
from ebft_mega.model.weights.weight_sources import SafetensorsWeights
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.stage_module import runner
from ebft_mega.registry.kinds import FEATURE_MAPS
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.sampling import sample_tokens
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loss_masks import loss_masks
from ebft_mega.types import PolicyLogprobs, Rollout, TokenBatch
from tests.conftest import tiny_config
from tests.explicit_features import NORMS, explicit_feature
from tests.unit.model.test_against_transformers import random_hf_model
from tests.unit.reward.rewards import advantages_of, rewards_of

SAMPLING = SamplingSettings(seed=7, temperature=0.8, top_p=1.0)
RL_COEF, CE_COEF, ALIGNMENT_COEF, DIVERSITY_COEF = 1.0, 0.3, 1.0, 0.7
NUM_ROWS = 2


@dataclass(frozen=True)
class Case:
    plan: BlockPlan
    embed_method: str = "last_token"
    feature_norm: str = "joint"
    layer_weights: tuple[float, ...] | None = None
    whitening: str = "sample"
    model_type: str = "llama"
    vocab_size: int = 131
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    taps: tuple[int, ...] = (1, 2, 3)  # of four layers
    starts: tuple[tuple[int, ...], ...] | None = None  # of both rows' documents, masked from each other


CASES = {
    "stride<G": Case(BlockPlan(24, 2, 4, 4, 4)),
    "stride=G": Case(BlockPlan(32, 8, 8, 8, 4), model_type="qwen2"),
    "stride>G": Case(BlockPlan(30, 8, 2, 4, 3), whitening="feature", model_type="qwen3"),
    "one-block": Case(BlockPlan(16, 8, 8, 8, 4), whitening="none"),
    "one-token": Case(BlockPlan(12, 1, 3, 1, 3)),
    "n=1": Case(BlockPlan(20, 4, 4, 4, 1), whitening="none"),
    "n=2": Case(BlockPlan(20, 4, 4, 4, 2), embed_method="mean_pooling"),
    "n=5": Case(BlockPlan(20, 4, 4, 4, 5), embed_method="mean_pooling", feature_norm="per_layer", whitening="none"),
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
    """A policy, a different feature network, both as transformers models and as stages, and rows of text."""
    case: Case = request.param
    config = tiny_config(case.model_type, vocab_size=case.vocab_size)
    models, stages = [], []
    for name, shift in (("policy", 0.0), ("feature", 0.05)):
        model = with_float64_norms(random_hf_model(config).double())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(shift * torch.sin(parameter * 50))
        model.save_pretrained(tmp_path / name)
        models.append(model)
        architecture = Architecture.from_directory(tmp_path / name)
        source = SafetensorsWeights(tmp_path / name, architecture)
        stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float64)
        load_weights(stage, source)
        stages.append((stage, source))
    recipe = FeatureRecipe(
        FEATURE_MAPS.entry(case.embed_method)(), case.plan.generate_length, case.feature_norm, case.layer_weights
    )
    settings = FeatureSettings(case.feature_layers, recipe, torch.float64)
    network = build_feature_network(architecture, stages[1][1], settings, groups)
    assert network.taps == case.taps
    tokens = torch.randint(
        0, case.vocab_size, (NUM_ROWS, case.plan.sequence_length), generator=torch.Generator().manual_seed(1)
    )
    batch = TokenBatch(tokens, torch.zeros_like(tokens), torch.tensor([5, 9]))
    if case.starts is not None:
        documents = [
            [sum(p >= start for start in row) for p in range(case.plan.sequence_length)] for row in case.starts
        ]
        batch = TokenBatch(tokens, torch.tensor(documents), batch.row_indices).with_document_masking()
    return SimpleNamespace(
        case=case,
        plan=case.plan,
        batch=batch,
        policy=stages[0][0],
        model=PipelinedModel.of(stages[0][0]),
        network=network,
        hf_policy=models[0],
        hf_feature=models[1],
    )


def with_float64_norms(model: nn.Module) -> nn.Module:
    """transformers' own norms compute in float32 whatever the model's dtype; here both sides must be float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def document_of(s, row: int, position: int) -> tuple[int, int]:
    """Start and end of the document that a position of a row is in."""
    starts = (0,) if s.case.starts is None else s.case.starts[row]
    ends = (*starts[1:], s.plan.sequence_length)
    return next((start, end) for start, end in zip(starts, ends, strict=True) if start <= position < end)


def context_of(s, row: int, anchor: int) -> Tensor:
    """What a block's rollouts continue."""
    return s.batch.tokens[row, document_of(s, row, anchor - 1)[0] : anchor]


def counts_in(s, row: int, anchor: int) -> bool:
    """Whether a block's context and target are of one document, token by token."""
    window = range(anchor - s.plan.context_length, anchor + s.plan.generate_length)
    return len({document_of(s, row, position) for position in window}) == 1


def naive_rollouts(s) -> Tensor:
    """[B, n, K, G]: the whole sequence is forwarded again for every token of every sample."""
    plan = s.plan
    rollouts = torch.zeros(NUM_ROWS, plan.num_samples, plan.num_blocks, plan.generate_length, dtype=torch.int64)
    for row in range(NUM_ROWS):
        for t in range(plan.generate_length):
            keys = noise_keys(
                SAMPLING.seed, 3, s.batch.row_indices[row : row + 1], plan.num_samples, plan.num_blocks, t
            )
            for sample in range(plan.num_samples):
                for block, anchor in enumerate(plan.anchors):
                    sequence = torch.cat((context_of(s, row, anchor), rollouts[row, sample, block, :t]))
                    logits = s.hf_policy(sequence[None]).logits[0, -1:]
                    key = keys[0, sample, block]
                    rollouts[row, sample, block, t] = sample_tokens(
                        logits, torch.zeros_like(key), key, SAMPLING.temperature, SAMPLING.top_p, s.model.vocabulary
                    )
    return rollouts


def naive_logprobs(s, rollouts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, K, G] at the sampling temperature and [B, P - 1] at temperature 1, with gradient."""
    plan, tokens = s.plan, s.batch.tokens
    logits = []
    for row in range(NUM_ROWS):
        documents = sorted({document_of(s, row, position) for position in range(plan.sequence_length)})
        logits.append(torch.cat([s.hf_policy(tokens[row, start:end][None]).logits[0] for start, end in documents]))
    targets = torch.stack(logits)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scored = torch.zeros(rollouts.shape, dtype=torch.float64)
    parts = []
    for row in range(NUM_ROWS):
        for sample in range(plan.num_samples):
            for block, anchor in enumerate(plan.anchors):
                own = rollouts[row, sample, block]
                sequence = torch.cat((context_of(s, row, anchor), own))
                logits = s.hf_policy(sequence[None]).logits[0, -len(own) - 1 : -1] / SAMPLING.temperature
                parts.append(logits.log_softmax(-1).gather(-1, own[:, None])[:, 0])
    return torch.stack(parts).view(scored.shape), targets


def naive_features(s, sequence: Tensor) -> Tensor:
    """[D]: the feature of the last G tokens of one sequence."""
    window = s.plan.generate_length
    hidden = s.hf_feature(sequence[None], output_hidden_states=True).hidden_states
    layers = torch.stack([hidden[tap][0, -window:] for tap in s.case.taps], dim=1)  # [G, T, H]
    return explicit_feature(layers, s.case.embed_method, s.case.feature_norm, s.case.layer_weights)


def naive_block(x: Tensor, y: Tensor, whitening: str) -> tuple[Tensor, Tensor, Tensor]:
    """Alignment [n], diversity [n] (factor 2) and CFM [] of one block from explicit features [n, D], [D]."""
    n = len(x)
    if whitening == "none":
        wx, wy = x, y.expand(n, -1)
    else:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        inverse = torch.where(s > 1e-5 * s[0], 1 / (s + 1e-12), 0.0)
        if whitening == "sample":
            w = u @ inverse.diag() @ u.T
            wx, wy = w @ x, w @ y.expand(n, -1)
        else:
            w = vt.T @ inverse.diag() @ vt
            wx, wy = x @ w, (y @ w).expand(n, -1)
    alignment = 2 * torch.nn.functional.cosine_similarity(wx, wy, dim=1, eps=1e-8)
    if n == 1:
        diversity = torch.zeros(1, dtype=x.dtype)
    else:
        dots = wx @ wx.T
        diversity = 2 * (dots.sum(1) - dots.diagonal()) / (n - 1)
    return alignment, diversity, (wx.mean(0) - wy.mean(0)).square().sum()


def naive_advantage(alignment: Tensor, diversity: Tensor) -> Tensor:
    """[n]: the reward minus the leave-one-out baselines, written out one sample at a time."""
    n = len(alignment)
    reward = ALIGNMENT_COEF * alignment - DIVERSITY_COEF * diversity
    if n == 1:
        return reward
    result = []
    for j in range(n):
        others = [k for k in range(n) if k != j]
        baseline = ALIGNMENT_COEF * sum(alignment[k] for k in others) / (n - 1)
        if n > 2:
            baseline = baseline - DIVERSITY_COEF * (diversity.sum() - 2 * diversity[j]) / (n - 2)
        result.append(reward[j] - baseline)
    return torch.stack(result)


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
    rewards = rewards_of(gram, s.case.whitening, ALIGNMENT_COEF, DIVERSITY_COEF)
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
                alignment, diversity, cfm = naive_block(x, y, s.case.whitening)
                assert (rewards.terms["alignment"].values[row, :, block] - alignment).abs().max() <= 1e-7
                assert (rewards.terms["diversity"].values[row, :, block] - diversity).abs().max() <= 1e-7
                assert (rewards.cfm[row, block] - cfm).abs() <= 1e-7 * max(1.0, cfm)
                naive_advantages[row, :, block] = naive_advantage(alignment, diversity)
    assert (advantages - naive_advantages).abs().max() <= 1e-6

    # Log-probabilities, loss and gradient, both sides with our advantages so that only the policy is compared.
    request = ScoreRequest(s.batch.tokens, rollout.forest, True, SAMPLING.temperature, s.batch.documents)
    ours = PolicyLogprobs(*score(s.policy, request, plan, saved=sampled.saved))
    expected_logprobs, expected_targets = naive_logprobs(s, rollout.tokens)
    assert (ours.rollout - expected_logprobs).abs().max() <= 1e-9
    assert (ours.target - expected_targets).abs().max() <= 1e-9

    counts = count_tokens(plan, NUM_ROWS, RL_COEF, CE_COEF, int(counted.sum()))
    terms = loss_terms(ours, advantages, counts, RL_COEF, CE_COEF)
    expected_loss = -CE_COEF * expected_targets.mean()
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
    config = SimpleNamespace(data=data, uses_rollouts=False, ebft=SimpleNamespace(ce_coef=CE_COEF))
    masks = loss_masks([batch], s.plan, config, groups)
    (target,) = score(s.policy, ScoreRequest(batch.tokens, None, True, 0.8, batch.documents), s.plan)
    counts = count_tokens(s.plan, masks.num_rows, 0.0, CE_COEF, masks.num_blocks, masks.num_targets)
    terms = loss_terms(PolicyLogprobs(None, target), None, counts, 0.0, CE_COEF, *masks.of(0))

    parts = []
    for row in range(NUM_ROWS):
        for start, end in sorted({document_of(s, row, position) for position in range(s.plan.sequence_length)}):
            seen = start if masked else 0
            logits = s.hf_policy(batch.tokens[row, seen:end][None]).logits[0, start - seen : -1]
            parts.append(logits.log_softmax(-1).gather(-1, batch.tokens[row, start + 1 : end, None])[:, 0])
    expected = -torch.cat(parts).mean()
    assert masks.num_targets == len(torch.cat(parts)) < NUM_ROWS * (s.plan.sequence_length - 1)
    assert abs(terms.ce.item() - expected.item()) <= 1e-9
    terms.total.backward()
    (CE_COEF * expected).backward()
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
