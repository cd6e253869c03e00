"""A value that is not finite, wherever it arises and on whichever rank, makes all ranks skip that step alone.

Each layout starts its ranks once. They take a few healthy steps, then the same steps again with a planted step before
each: it must leave weights and optimizer state as they were, and the step after it must be what it was without.
"""

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from ebft_mega.critic import fitted_critic
from ebft_mega.features import network as network_module
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model import head as head_module
from ebft_mega.model.stage import Stage
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.train import experience as experience_module
from ebft_mega.train import gradient_pass
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import CRITIC, LEARNING_RATE, MASKING, Case, rows_of_step
from tests.distributed.train.test_non_finite import build

LAST_RANK = 1  # of two: the second replica, the second slice, or the last stage
LAYOUTS = {"data": (1, 1), "tensor": (2, 1), "pipeline": (1, 2)}
DEFAULTS = ("learn.reuse_rollout=off",)  # an own forward pass for the gradient: sampling alone meets its logits
# Where blocks of masked documents and a row of each replica do not count.
UNCOUNTED = Case("uncounted", (MASKING,), filler=(0, 2))


def reward(original, value):
    """A reward with finite advantages."""

    def make_experience(*arguments):
        experience = original(*arguments)
        spoiled = experience.rewards.reward.clone()
        spoiled[0, 0, 0] = value
        return dataclasses.replace(experience, rewards=dataclasses.replace(experience.rewards, reward=spoiled))

    return make_experience


def feature(original, value):
    """A number of a tapped layer, in the ranks that have one."""

    def block_grams(taps, *others):
        for rows in taps[-1:]:
            rows[0, 1, 0, 0, 0] = value
        return original(taps, *others)

    return block_grams


def sampled_logit(original, value):
    """One logit of one row that tokens are drawn from; the gradient pass has its own."""

    def logits(stage, hidden):
        found = original(stage, hidden)
        found[0, 0] = value
        return found

    return logits


def scored_logit(original, value):
    """One logit of one row that is scored, most likely not that of the token."""

    def score_rows(logits, *others):
        logits[0, 0] = value
        return original(logits, *others)

    return score_rows


def logprob(original, value, which=0):
    """One log-probability, with a finite gradient."""

    def score(*arguments):
        found = list(original(*arguments))
        if arguments[0].shape.has_head:
            place = which if isinstance(which, int) else [each.shape for each in found].index(())
            first = torch.arange(found[place].numel()).view_as(found[place]) == 0
            found[place] = torch.where(first, value, found[place])
        return tuple(found)

    return score


def target_logprob(original, value):
    """One term of the cross-entropy, the last of those that are scored."""
    return logprob(original, value, -1)


def expected_value(original, value):
    """The sum of what a token critic expects, the only scalar that is scored."""
    return logprob(original, value, "scalar")


def direction(original, value):
    """One number of the directions that a token critic gives to the loss, in each rank of the replica."""

    def critic_values(*arguments):
        found = original(*arguments)
        found.directions[0, 0, 0, 0, 0] = value
        return found

    return critic_values


def loss(original, value):
    """The loss; its gradient is finite for an infinite one."""

    def loss_terms(*arguments):
        terms = original(*arguments)
        return dataclasses.replace(terms, total=terms.total + value)

    return loss_terms


def gradient(original, value):
    """The gradient of a finite loss."""

    def loss_terms(*arguments):
        terms = original(*arguments)
        terms.total.register_hook(lambda gradient: gradient * value)
        return terms

    return loss_terms


def hidden_state(original, value):
    """A hidden state in front of the first layer, of the policy or, where that is gone, of the feature network."""

    def embed(stage, tokens):
        found = original(stage, tokens).clone()
        found[0, 0, 0] += value
        return found

    return embed


# Owner and name of the function whose result is spoiled, how, and on which rank.
PLANTS = {
    "reward": (experience_module, "make_experience", reward, LAST_RANK),
    "feature": (network_module, "block_grams", feature, LAST_RANK),
    "sampled logit": (Stage, "logits", sampled_logit, LAST_RANK),
    "scored logit": (head_module, "score_rows", scored_logit, LAST_RANK),
    "logprob": (gradient_pass, "score", logprob, LAST_RANK),
    "cross-entropy term": (gradient_pass, "score", target_logprob, LAST_RANK),
    "expected value": (gradient_pass, "score", expected_value, LAST_RANK),
    "direction": (fitted_critic, "_critic_values", direction, LAST_RANK),
    "loss": (gradient_pass, "loss_terms", loss, LAST_RANK),
    "gradient": (gradient_pass, "loss_terms", gradient, LAST_RANK),
    "hidden state": (Stage, "embed", hidden_state, 0),
}
# By default every place that is not a gradient once; all values, and the others, in the slow variants.
FEW = {
    **{"reward": (math.inf,), "feature": (math.nan,), "sampled logit": (-math.inf,), "scored logit": (math.nan,)},
    **{"logprob": (-math.inf,), "cross-entropy term": (math.nan,), "loss": (math.inf,)},
}
MORE = {
    **{"feature": (math.inf,), "sampled logit": (math.nan, math.inf), "scored logit": (-math.inf, math.inf)},
    **{"gradient": (math.nan,), "hidden state": (math.nan, math.inf)},
}
OF_CRITIC = {
    **{name: FEW[name] for name in ("feature", "sampled logit", "scored logit", "logprob", "loss")},
    **{"gradient": (math.nan,), "expected value": (math.nan,), "direction": (math.inf,)},
}
WITHOUT_ROLLOUTS = {name: FEW[name] for name in FEW if name not in ("reward", "feature", "sampled logit", "logprob")}


@contextmanager
def planted(owner, name, spoil, rank, value):
    """Spoil a function's result on a rank."""
    original = getattr(owner, name)
    if dist.get_rank() == rank:
        setattr(owner, name, spoil(original, value))
    try:
        yield
    finally:
        setattr(owner, name, original)


def state_of(trainer):
    """All of this rank's weights and moments, how often they were updated, and what a token critic has learned."""
    engine, critic = trainer.engine, trainer.critic
    tensors = [
        value.detach().flatten().clone() for kind in engine.state_kinds for _, value in engine.state_tensors(kind)
    ]
    if critic is not None:
        statistics, weights = critic.state.statistics, critic.state.weights
        learned = [statistics.squares, statistics.products, *([weights.prefix, weights.token] if weights else [])]
        tensors += [value.flatten().clone() for value in learned]
        tensors.append(torch.tensor([float(critic.state.batches)]))
    return torch.cat([*tensors, torch.tensor([float(engine.applied_updates)])])


def take_planted_steps(directory, tensor, pipeline, overrides, values):
    """Of each planted step whether it was applied and changed anything, its metrics, and if the next is the same."""
    plants = [(name, value) for name, several in values.items() for value in several]

    def healthy_step(trainer, number):
        assert train_step(trainer, rows_of_step(number, trainer.groups), number, LEARNING_RATE).update.applied
        return state_of(trainer)

    trainer = build(directory, tensor, pipeline, *overrides)
    initial = state_of(trainer)
    expected = [healthy_step(trainer, number) for number in range(len(plants))]
    assert all(not torch.equal(*pair) for pair in zip([initial, *expected], expected, strict=False))

    trainer, outcomes, before = build(directory, tensor, pipeline, *overrides), {}, initial
    for number, (name, value) in enumerate(plants):
        with planted(*PLANTS[name], value):
            result = train_step(trainer, rows_of_step(50 + number, trainer.groups), 50 + number, LEARNING_RATE)
            metrics = step_metrics(trainer, result, LEARNING_RATE)
        moved = not torch.equal(state_of(trainer), before)
        before = healthy_step(trainer, number)
        outcomes[f"{name} {value}"] = result.update.applied, moved, metrics, torch.equal(before, expected[number])
    return outcomes


def spoil_what_does_not_count(function, owner, spoiled):
    """Make features, or log-probabilities, NaN where they have no weight; notes of how many blocks."""

    def grams(network, batches, rollouts, plan, take=None):
        found = function(network, batches, rollouts, plan, take)
        counted = [counted_blocks(rows, plan) for rows in batches]
        spoiled.extend((~blocks).sum().item() for blocks in counted)
        pairs = zip(found, counted, strict=True)
        return [gram.masked_fill(~blocks[..., None, None], torch.nan) for gram, blocks in pairs]

    def loss_terms(logprobs, *others):
        rows, blocks, _, _ = others[-4:]
        return function(
            dataclasses.replace(
                logprobs,
                rollout=logprobs.rollout.masked_fill(~blocks[:, None, :, None], torch.nan),
                target=logprobs.target.masked_fill(~rows[:, None], torch.nan),
                entropies=logprobs.entropies.masked_fill(~rows[:, None], torch.nan),
            ),
            *others,
        )

    return grams if owner is FeatureNetwork else loss_terms


def take_steps_with_spoiled_filler(directory, tensor, pipeline):
    """State after two steps of a trainer with, and of one without NaN in what does not count."""
    found, spoiled = [], []
    for spoils in (False, True):
        trainer = build(directory, tensor, pipeline, *DEFAULTS, MASKING, "data.on_error=skip", "ebft.entropy_coef=.1")
        for owner, name in ((FeatureNetwork, "grams"), (gradient_pass, "loss_terms")) if spoils else ():
            setattr(owner, name, spoil_what_does_not_count(getattr(owner, name), owner, spoiled))
        for number in range(2):
            rows = rows_of_step(number, trainer.groups, UNCOUNTED)
            assert train_step(trainer, rows, number, LEARNING_RATE).update.applied, "skipped"
        found.append(state_of(trainer))
    assert sum(spoiled) > 4, "a row of filler and a dropped block in each step"
    return torch.equal(*found)


def take_all(directory, tensor, pipeline, overrides, values):
    """Both, in one start of the ranks."""
    planted_steps = take_planted_steps(directory, tensor, pipeline, overrides, values)
    return planted_steps, take_steps_with_spoiled_filler(directory, tensor, pipeline)


def check(ranks):
    """Every rank skipped every planted step, and nothing hid what was planted."""
    for rank, outcomes in enumerate(ranks):
        for name, (applied, moved, metrics, same_as_without) in outcomes.items():
            assert not applied and not moved, (rank, name)
            assert same_as_without, (rank, name, "the next step is another one")
            assert metrics["train/grad_norm"] == math.inf, (rank, name)
            if name.startswith(("feature", "sampled logit")):
                # A mean over the blocks of all replicas.
                assert math.isnan(metrics["ebft/mean_reward"]) and math.isnan(metrics["ebft/cfm_loss"]), (rank, name)
                assert math.isnan(metrics["ebft/advantages_std"]), (rank, name)
            if rank == LAST_RANK and name.startswith(("scored logit", "logprob", "cross-entropy")):
                assert not math.isfinite(metrics["train/loss"]), (rank, name)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "pipeline" else pytest.mark.slow) for name in LAYOUTS]
)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(layout, tmp_path):
    found = run_ranks(2, take_all, str(tmp_path), *LAYOUTS[layout], DEFAULTS, FEW)
    check([outcomes for outcomes, _ in found])
    assert all(same for _, same in found), "NaN in what does not count changed a step"


VARIANTS = {
    "other values": (DEFAULTS, MORE),
    "whitening feature, checkpoints": (("ebft.whitening=feature", "learn.reuse_rollout=checkpoints"), FEW),
    "no whitening, activations": (
        ("ebft.use_whitening=false", "learn.reuse_rollout=activations", "zero.hold_parameters=step"),
        FEW,
    ),
    "nucleus, bfloat16": ((*DEFAULTS, "ebft.top_p=0.8", "train.dtype=bfloat16"), FEW),
    "token critic": ((*DEFAULTS, *CRITIC), OF_CRITIC),
    "token critic, activations": (("learn.reuse_rollout=activations", "zero.hold_parameters=step", *CRITIC), OF_CRITIC),
    "cross-entropy alone": (("ebft.rl_coef=0", "ebft.ce_coef=1"), WITHOUT_ROLLOUTS),
    **{f"ZeRO {stage}": ((*DEFAULTS, f"zero.stage={stage}"), FEW) for stage in (0, 1, 2)},
    **{
        f"ZeRO {stage}, bfloat16": ((*DEFAULTS, f"zero.stage={stage}", "train.dtype=bfloat16"), FEW)
        for stage in (0, 1, 2)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_skip_it_whatever_is_reused_partitioned_or_rounded(layout, variant, tmp_path):
    check(run_ranks(2, take_planted_steps, str(tmp_path), *LAYOUTS[layout], *VARIANTS[variant]))
