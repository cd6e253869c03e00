"""Steps whose rollouts begin alike, from all-equal to all-different, against the naive step, which merges nothing."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.model.weights.stage_weights import hf_tensors
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.stage_module import runner
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.types import PolicyLogprobs
from tests.distinct_prefixes import prefixes_by_level
from tests.unit.train.naive_blocks import (
    CE_COEF,
    NUM_ROWS,
    RL_COEF,
    Case,
    context_of,
    naive_features,
    naive_logprobs,
    naive_rollouts,
    setting_of,
)


@dataclass(frozen=True)
class Forested:
    """A case, and between which shares of the rollouts' tokens its forest's nodes must be."""

    case: Case
    temperature: float
    least: float
    most: float
    top_p: float = 1.0


MASKED = Case(BlockPlan(21, 3, 3, 3, 4), vocab_size=5, starts=((0, 5, 9), (0, 12)), embed_method="mean_pooling")
FORESTS = {
    "one node": Forested(Case(BlockPlan(16, 4, 4, 4, 4)), 0.005, 0.25, 0.25),
    "almost equal": Forested(Case(BlockPlan(16, 4, 4, 4, 4), vocab_size=7, model_type="qwen3"), 0.3, 0.26, 0.5),
    "few ids": Forested(Case(BlockPlan(17, 2, 4, 3, 5), vocab_size=3, embed_method="mean_pooling"), 0.9, 0.4, 0.8),
    "nucleus": Forested(Case(BlockPlan(16, 4, 4, 4, 4), model_type="qwen2"), 1.0, 0.3, 0.95, top_p=0.5),
    "masked": Forested(MASKED, 0.8, 0.4, 0.95),
    "all different": Forested(Case(BlockPlan(16, 4, 4, 4, 3)), 2.0, 0.99, 1.0),
    "one rollout": Forested(Case(BlockPlan(16, 4, 4, 4, 1), whitening="none"), 0.02, 1.0, 1.0),
    "one block": Forested(Case(BlockPlan(8, 4, 4, 4, 4), vocab_size=7), 0.3, 0.25, 0.8),
    # Rollouts that continue as the document does are its rows; of each level one is computed all the same.
    "the document's own": Forested(Case(BlockPlan(16, 4, 4, 4, 4), vocab_size=7, own_text=True), 0.005, 0.25, 0.25),
    "from the document": Forested(Case(BlockPlan(17, 2, 4, 3, 4), vocab_size=7, own_text=True), 0.5, 0.3, 0.9),
    "from masked documents": Forested(replace(MASKED, own_text=True), 0.5, 0.3, 0.9),
    "one token": Forested(Case(BlockPlan(10, 3, 3, 1, 4), vocab_size=7), 0.3, 0.25, 0.8),
}


@pytest.mark.parametrize("forested", FORESTS.values(), ids=FORESTS.keys())
def test_merged_and_unmerged_steps_equal_the_naive_step(forested, groups, tmp_path):
    """With every way of reuse, an advantage for each token, and each row computed once."""
    sampling = SamplingSettings(seed=7, temperature=forested.temperature, top_p=forested.top_p)
    s = setting_of(forested.case, groups, tmp_path, sampling)
    with torch.no_grad():
        rollouts = naive_rollouts(s)
        grams = naive_grams(s, rollouts)
    levels = prefixes_by_level(rollouts, s.batch, s.plan, s.plan.sequence_length - 1)
    share = sum(len(level.prefixes) for level in levels) / rollouts.numel()
    assert forested.least <= share <= forested.most, share
    assert not s.case.own_text or any(level.nodes != level.prefixes for level in levels)
    counted = counted_blocks(s.batch, s.plan)
    # Advantages of tokens, as an estimator may give them: what rollouts of one node weigh has to add up.
    advantages = torch.randn(rollouts.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages = advantages.masked_fill(~counted[:, None, :, None], 0.0)
    expected = naive_gradient(s, rollouts, advantages, counted)
    rows = count_rows(s)
    for merges, reuse in [(True, "off"), (True, "checkpoints"), (True, "activations"), (False, "checkpoints")]:
        s.sampling = replace(sampling, merge_equal_prefixes=merges)
        rows.clear()
        found = packed_step(s, reuse, advantages, counted)
        assert torch.equal(found.rollouts, rollouts)
        assert (found.gram - grams)[counted].abs().max() <= 1e-9
        assert (found.logprobs.rollout - expected.logprobs).abs().max() <= 1e-9 * max(
            1.0, expected.logprobs.abs().max()
        )
        assert (found.logprobs.target - expected.targets).abs().max() <= 1e-9
        assert abs(found.loss - expected.loss) <= 1e-9 * max(1.0, abs(expected.loss))
        scale = max(gradient.abs().max() for gradient in expected.gradients.values())
        for name, gradient in expected.gradients.items():
            assert (found.gradients[name] - gradient).abs().max() <= 1e-9 * scale, (name, merges, reuse)
        assert rows == expected_rows(s, rollouts, merges, reuse), (merges, reuse)


def naive_grams(s, rollouts: Tensor) -> Tensor:
    """[B, K, n + 1, n + 1] from a forward pass of every sequence by itself."""
    grams = []
    for row in range(NUM_ROWS):
        for block, anchor in enumerate(s.plan.anchors):
            own = (*rollouts[row, :, block], s.batch.tokens[row, anchor : anchor + s.plan.generate_length])
            x = torch.stack([naive_features(s, torch.cat((context_of(s, row, anchor), each))) for each in own])
            grams.append(x @ x.T)
    return torch.stack(grams).unflatten(0, (NUM_ROWS, -1))


def naive_gradient(s, rollouts: Tensor, advantages: Tensor, counted: Tensor) -> SimpleNamespace:
    """Log-probabilities, loss and gradient by Hugging Face name."""
    logprobs, targets = naive_logprobs(s, rollouts)
    of_tokens = (-advantages * logprobs).transpose(1, 2)[counted]  # [counted blocks, n, G]
    loss = RL_COEF * of_tokens.mean() - CE_COEF * targets.mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in s.hf_policy.named_parameters()}
    return SimpleNamespace(logprobs=logprobs, targets=targets, loss=loss.item(), gradients=gradients)


def packed_step(s, reuse: str, advantages: Tensor, counted: Tensor) -> SimpleNamespace:
    """The same by the package."""
    policy = PipelinedModel.of(s.policy, runner(s.policy, recording=reuse == "activations"))
    (sampled,) = generate_rollouts(policy, [s.batch], s.plan, s.sampling, 3, reuse, with_targets=reuse != "off")
    (gram,) = s.network.grams([s.batch], [sampled.rollout], s.plan)
    request = ScoreRequest(s.batch.tokens, sampled.rollout.forest, True, s.sampling.temperature, s.batch.documents)
    logprobs = PolicyLogprobs(*score(s.policy, request, s.plan, saved=sampled.saved))
    counts = count_tokens(s.plan, NUM_ROWS, RL_COEF, CE_COEF, int(counted.sum()))
    loss = loss_terms(logprobs, advantages, counts, RL_COEF, CE_COEF).total
    s.policy.zero_grad()
    loss.backward()
    gradients = dict(hf_tensors(((name, value.grad) for name, value in s.policy.named_parameters()), s.policy))
    return SimpleNamespace(
        rollouts=sampled.rollout.tokens, gram=gram, logprobs=logprobs, loss=loss.item(), gradients=gradients
    )


def count_rows(s) -> dict[str, list[int]]:
    """Positions of every call of the policy's layers and head, and of the feature network's feed-forward parts."""
    rows: dict[str, list[int]] = {}

    def counting(name: str):
        return lambda _, inputs, __: rows.setdefault(name, []).append(inputs[0].shape[0])

    for index, layer in enumerate(s.policy.layers):
        layer.register_forward_hook(counting(f"policy {index}"))
    s.policy.head.register_forward_hook(counting("head"))
    for index, layer in enumerate(s.network.stage.layers):
        layer.mlp.register_forward_hook(counting(f"features {index}"))
    return rows


def expected_rows(s, rollouts: Tensor, merges: bool, reuse: str) -> dict[str, list[int]]:
    """From what is distinct alone; the head sees the rows of prefixes that the document holds, too."""
    plan = s.plan
    per_row = plan.anchors[-1] if reuse == "off" else plan.sequence_length - 1
    levels, prefixes = [rollouts[..., 0].numel()] * plan.generate_length, rollouts[..., 1:].numel()
    by_pass = levels[:-1]
    if merges:
        distinct = prefixes_by_level(rollouts, s.batch, plan, per_row)
        levels, by_pass = [len(level.nodes) for level in distinct], [len(level.prefixes) for level in distinct[:-1]]
        prefixes = sum(by_pass)
    document = NUM_ROWS * per_row
    anchors, targets = NUM_ROWS * plan.num_blocks, NUM_ROWS * (plan.sequence_length - 1)
    fed_back, decode = sum(levels[:-1]), [document, *levels[:-1]]
    learning = {"off": [targets + fed_back], "checkpoints": [document + fed_back], "activations": []}[reuse]
    tokens_read = plan.generate_length if s.case.embed_method == "mean_pooling" else 1
    windows = {a + t for a in plan.anchors for t in range(plan.generate_length - tokens_read, plan.generate_length)}
    whole = NUM_ROWS * plan.sequence_length + sum(levels)
    read = NUM_ROWS * len(windows) + sum(levels[plan.generate_length - tokens_read :])
    rows = {f"policy {index}": decode + learning for index in range(len(s.policy.layers))}
    last = len(s.network.stage.layers) - 1
    rows |= {f"features {index}": [read if index == last else whole] for index in range(last + 1)}
    scored = [anchors + prefixes + targets]  # each row for all that it predicts, in one call
    return rows | {"head": [anchors, *by_pass, *scored]}
