"""A naive step: every block of every sample by itself, through transformers, in float64.

It knows nothing of packing, caches, shared documents, nodes or Gram matrices: it re-forwards the whole prefix for each
token it samples, forms the features and whitens them with explicit matrices. Masked documents it forwards one by one,
each at positions from 0.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import SafetensorsWeights
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.registry.kinds import FEATURE_MAPS
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import sample_tokens
from ebft_mega.types import TokenBatch
from tests.conftest import tiny_config
from tests.explicit_features import explicit_feature
from tests.unit.model.test_against_transformers import random_hf_model

SAMPLING = SamplingSettings(seed=7, temperature=0.8, top_p=1.0)
RL_COEF, CE_COEF, ENTROPY_COEF, ALIGNMENT_COEF, DIVERSITY_COEF = 1.0, 0.3, 0.2, 1.0, 0.7
NUM_ROWS = 2


@dataclass(frozen=True)
class Case:
    plan: BlockPlan
    embed_method: str = "last_token"
    feature_norm: str = "joint"
    layer_weights: tuple[float, ...] | None = None
    whitening: str = "sample"
    alignment: str = "cosine"
    model_type: str = "llama"
    vocab_size: int = 131
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    taps: tuple[int, ...] = (1, 2, 3)  # of four layers
    starts: tuple[tuple[int, ...], ...] | None = None  # of both rows' documents, masked from each other
    own_text: bool = False  # whether the rows' text is what the policy finds most probable


def setting_of(
    case: Case, groups: ProcessGroups, tmp_path: Path, sampling: SamplingSettings = SAMPLING
) -> SimpleNamespace:
    """A policy, a different feature network, both as transformers models and as stages, and rows of text."""
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
    for position in range(1, case.plan.sequence_length) if case.own_text else ():
        tokens[:, position] = models[0](tokens[:, :position]).logits[:, -1].argmax(dim=-1)
    batch = TokenBatch(tokens, torch.zeros_like(tokens), torch.tensor([5, 9]))
    if case.starts is not None:
        documents = [
            [sum(p >= start for start in row) for p in range(case.plan.sequence_length)] for row in case.starts
        ]
        batch = TokenBatch(tokens, torch.tensor(documents), batch.row_indices).with_document_masking()
    return SimpleNamespace(
        case=case,
        plan=case.plan,
        sampling=sampling,
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
                s.sampling.seed, 3, s.batch.row_indices[row : row + 1], plan.num_samples, plan.num_blocks, t
            )
            for sample in range(plan.num_samples):
                for block, anchor in enumerate(plan.anchors):
                    sequence = torch.cat((context_of(s, row, anchor), rollouts[row, sample, block, :t]))
                    logits = s.hf_policy(sequence[None]).logits[0, -1:]
                    key = keys[0, sample, block]
                    rollouts[row, sample, block, t] = sample_tokens(
                        logits, torch.zeros_like(key), key, s.sampling.temperature, s.sampling.top_p, s.model.vocabulary
                    )
    return rollouts


def naive_target_logits(s) -> Tensor:
    """[B, P - 1, V]: what predicts each row's own tokens, every document by itself, with gradient."""
    logits = []
    for row, tokens in enumerate(s.batch.tokens):
        documents = sorted({document_of(s, row, position) for position in range(s.plan.sequence_length)})
        logits.append(torch.cat([s.hf_policy(tokens[start:end][None]).logits[0] for start, end in documents]))
    return torch.stack(logits)[:, :-1]


def naive_entropy(logits: Tensor) -> Tensor:
    """Of each distribution [..., V] at temperature 1, in nats: its expectation of minus its log-probabilities."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def naive_logprobs(s, rollouts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, K, G] at the sampling temperature and [B, P - 1] at temperature 1, with gradient."""
    plan = s.plan
    targets = naive_target_logits(s).log_softmax(-1).gather(-1, s.batch.tokens[:, 1:, None])[..., 0]
    scored = torch.zeros(rollouts.shape, dtype=torch.float64)
    parts = []
    for row in range(NUM_ROWS):
        for sample in range(plan.num_samples):
            for block, anchor in enumerate(plan.anchors):
                own = rollouts[row, sample, block]
                sequence = torch.cat((context_of(s, row, anchor), own))
                logits = s.hf_policy(sequence[None]).logits[0, -len(own) - 1 : -1] / s.sampling.temperature
                parts.append(logits.log_softmax(-1).gather(-1, own[:, None])[:, 0])
    return torch.stack(parts).view(scored.shape), targets


def naive_features(s, sequence: Tensor) -> Tensor:
    """[D]: the feature of the last G tokens of one sequence."""
    window = s.plan.generate_length
    hidden = s.hf_feature(sequence[None], output_hidden_states=True).hidden_states
    layers = torch.stack([hidden[tap][0, -window:] for tap in s.case.taps], dim=1)  # [G, T, H]
    return explicit_feature(layers, s.case.embed_method, s.case.feature_norm, s.case.layer_weights)


def naive_block(x: Tensor, y: Tensor, whitening: str, kind: str = "cosine") -> tuple[Tensor, Tensor, Tensor]:
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
    alignment = 2 * (wx * wy).sum(1)
    if kind == "cosine":
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
