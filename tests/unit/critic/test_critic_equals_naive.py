"""The token critic's step against a naive one: every rollout and token by itself, through transformers, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.critic.critic_terms import Objective
from ebft_mega.critic.fitted_critic import FittedCritic, row_directions
from ebft_mega.critic.ridge import CriticWeights
from ebft_mega.extension.critic_settings import CriticSettings
from ebft_mega.model.head import LinearValues
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.model.weights.stage_weights import hf_tensors
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.stage_module import runner
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.types import PolicyLogprobs
from tests.explicit_features import explicit_feature
from tests.unit.train.naive_blocks import (
    NUM_ROWS,
    Case,
    context_of,
    naive_features,
    naive_logprobs,
    setting_of,
)

RANK = 5
MASKED = Case(BlockPlan(15, 3, 3, 3, 3), vocab_size=5, starts=((0, 5), (0, 8)), embed_method="mean_pooling")


@dataclass(frozen=True)
class Judged:
    """A case, its reuse and its objective."""

    case: Case
    reuse: str = "off"
    objective: Objective = Objective(1.0, 1.0, 0.5)
    merges: bool = True


MEAN = Case(BlockPlan(12, 4, 4, 4, 3), vocab_size=7, embed_method="mean_pooling")
CASES = {
    "mean": Judged(MEAN),
    "mean, checkpoints": Judged(MEAN, "checkpoints", Objective(0.6, 1.3, 0.0)),
    "mean, activations": Judged(replace(MEAN, feature_norm="per_layer"), "activations", Objective(1.0, 0.5, 1.0)),
    "not merged": Judged(MEAN, "checkpoints", merges=False),
    "masked": Judged(MASKED, "checkpoints"),
    "last": Judged(replace(MEAN, embed_method="last_token"), "checkpoints", Objective(1.0, 1.0, 0.0)),
    "last, weights": Judged(replace(MEAN, embed_method="last_token", layer_weights=(0.5, 0.0, 3.0)), "off"),
    "completion mean, two": Judged(Case(BlockPlan(12, 4, 4, 4, 2), embed_method="completion_mean")),
    "one token": Judged(Case(BlockPlan(10, 3, 3, 1, 3), vocab_size=7, embed_method="mean_pooling"), "checkpoints"),
    "the document's own": Judged(replace(MEAN, own_text=True), "checkpoints"),
}


@pytest.mark.parametrize("judged", CASES.values(), ids=CASES.keys())
def test_advantages_values_loss_and_gradient(judged, groups, tmp_path):
    case, sampling = judged.case, SamplingSettings(7, 0.6, 1.0, judged.merges)
    s = setting_of(case, groups, tmp_path, sampling)
    plan, vocabulary = case.plan, case.vocab_size
    generator = torch.Generator().manual_seed(11)
    table = torch.randn(vocabulary, RANK, generator=generator)
    size = len(naive_features(s, s.batch.tokens[0, : plan.generate_length]))
    shape = plan.generate_length, 3 * RANK + 1 + RANK, size
    both = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = CriticWeights(both[:, :-RANK], both[:, -RANK:])
    critic = FittedCritic(table, size, CriticSettings(rank=RANK), judged.objective, plan, groups)
    critic.state = replace(critic.state, weights=weights)

    policy = PipelinedModel.of(s.policy, runner(s.policy, recording=judged.reuse == "activations"))
    (sampled,) = generate_rollouts(
        policy, [s.batch], plan, sampling, 3, judged.reuse, judged.reuse != "off", table=critic.table
    )
    counted = counted_blocks(s.batch, plan)
    step = critic.of_step([s.batch], [sampled], [counted])
    s.network.grams([s.batch], [sampled.rollout], plan, step.take)
    (values,) = step.values
    expected = naive_values(s, sampled.rollout.tokens, table.double(), weights, judged.objective)
    for name in ("advantages", "directions", "expected"):
        ours, theirs = getattr(values, name), expected[name]
        assert ours.shape == theirs.shape
        ours, theirs = ours.transpose(1, 2)[counted], theirs.detach().transpose(1, 2)[counted]
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), name

    directions = row_directions(values, sampled.rollout.forest)
    request = ScoreRequest(
        s.batch.tokens,
        sampled.rollout.forest,
        judged.reuse != "off",
        sampling.temperature,
        s.batch.documents,
        LinearValues(s.model.vocabulary.own_rows(table), directions),
    )
    ours = request.logprobs(score(s.policy, request, plan, saved=sampled.saved))
    advantages = values.advantages.masked_fill(~counted[:, None, :, None], 0.0)
    counts = count_tokens(plan, NUM_ROWS, 1.0, 0.0, int(counted.sum()))
    rollouts_alone = PolicyLogprobs(ours.rollout, None, ours.expected_values)
    loss = loss_terms(rollouts_alone, advantages, counts, 1.0, 0.0).total

    logprobs, _ = naive_logprobs(s, sampled.rollout.tokens)
    gained = expected["advantages"].detach() * logprobs + expected["expected"]  # of the values alone with gradient
    naive_loss = -gained.transpose(1, 2)[counted].mean()
    assert abs(loss.item() - naive_loss.item()) <= 1e-9
    loss.backward()
    naive_loss.backward()
    compared = dict(hf_tensors(((name, each.grad) for name, each in s.policy.named_parameters()), s.policy))
    scale = max(parameter.grad.abs().max() for parameter in s.hf_policy.parameters())
    for name, parameter in s.hf_policy.named_parameters():
        assert (compared[name] - parameter.grad).abs().max() <= 1e-9 * scale, name

    check_statistics(step.statistics, expected["regressed"], counted)


def naive_values(s, tokens: Tensor, table: Tensor, weights: CriticWeights, objective: Objective) -> dict[str, Tensor]:
    """What the critic makes of each rollout by the definitions; `expected` with the policy's gradient."""
    rows, samples, blocks, length = tokens.shape
    found = {name: torch.zeros(tokens.shape, dtype=torch.float64) for name in ("advantages",)}
    found["directions"] = torch.zeros(*tokens.shape, RANK, dtype=torch.float64)
    expected = {}
    regressed = {}
    for row in range(rows):
        for block, anchor in enumerate(s.plan.anchors):
            context = context_of(s, row, anchor)
            target = s.batch.tokens[row, anchor : anchor + length]
            u, zeta, means, whole, to_come = [], [], [], [], []
            for own in tokens[row, :, block]:
                sequence = torch.cat((context, own))
                logits = s.hf_policy(sequence[None]).logits[0, -length - 1 : -1] / s.sampling.temperature
                mean = logits.softmax(-1) @ table  # [G, r], with gradient
                before = table[sequence[-length - 1 : -1]]
                past = 0.5 * before.cumsum(dim=0)
                u.append(torch.cat((mean.detach(), before, past, torch.full((length, 1), 3.0)), dim=1))
                zeta.append(table[own] - mean.detach())
                means.append(mean)
                with torch.no_grad():
                    whole.append(naive_features(s, sequence))
                    to_come.append(naive_to_come(s, sequence, whole[-1]))
            with torch.no_grad():
                y = naive_features(s, torch.cat((context, target)))
            regressed[row, block] = (u, zeta, to_come)
            corrected = [phi - sum(zeta[j][t] @ weights.token[t] for t in range(length)) for j, phi in enumerate(whole)]
            for j in range(samples):
                others = [k for k in range(samples) if k != j]
                of_others = sum(corrected[k] for k in others) / len(others)
                w = 2 * (objective.alignment * y - objective.diversity * of_others)
                for t in range(length):
                    baseline = 0.0
                    for k in others:
                        rest = sum(zeta[k][later] @ weights.token[later] for later in range(t, length))
                        baseline = baseline + to_come[k][t] - rest - u[k][t] @ weights.prefix[t]
                    own = to_come[j][t] - u[j][t] @ weights.prefix[t] - zeta[j][t] @ weights.token[t]
                    share = objective.leave_one_out_share / len(others)
                    found["advantages"][row, j, block, t] = w @ (own - share * baseline)
                    found["directions"][row, j, block, t] = weights.token[t] @ w
                    expected[row, j, block, t] = means[j][t] @ (weights.token[t] @ w)
    places = [
        (row, j, k, t) for row in range(rows) for j in range(samples) for k in range(blocks) for t in range(length)
    ]
    found["expected"] = torch.stack([expected[place] for place in places]).view(tokens.shape)
    return {**found, "regressed": regressed}


def naive_to_come(s, sequence: Tensor, whole: Tensor) -> list[Tensor]:
    """Of each token the feature that is still to come."""
    length = s.plan.generate_length
    if s.case.embed_method != "mean_pooling":
        return [whole] * length
    hidden = s.hf_feature(sequence[None], output_hidden_states=True).hidden_states
    layers = torch.stack([hidden[tap][0, -length:] for tap in s.case.taps], dim=1)  # [G, L, H]
    of_tokens = [explicit_feature(layers[t : t + 1], "last_token", s.case.feature_norm) for t in range(length)]
    return [sum(of_tokens[t:]) / length for t in range(length)]


def check_statistics(statistics, regressed, counted) -> None:
    """Sums over counted rollouts, one by one."""
    for t in range(len(statistics.squares)):
        squares, products = 0.0, 0.0
        for (row, block), (u, zeta, to_come) in regressed.items():
            for j in range(len(u)) if counted[row, block] else ():
                x = torch.cat((u[j][t], zeta[j][t]))
                squares = squares + torch.outer(x, x)
                products = products + torch.outer(x, to_come[j][t])
        assert (statistics.squares[t] - squares).abs().max() <= 1e-9 * squares.abs().max()
        assert (statistics.products[t] - products).abs().max() <= 1e-9 * products.abs().max()
