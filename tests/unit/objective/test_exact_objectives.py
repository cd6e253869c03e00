"""Which objective each setting follows: exact means over all sample sets of a toy (`tests/exact_toy.py`).

    pytest -s tests/unit/objective/test_exact_objectives.py -k "whitened or nucleus or group_norm"

prints the figures of docs/numerics.md.
"""

import pytest
import torch
from torch import Tensor

from ebft_mega.critic.critic_terms import Objective
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS, FEATURE_MAPS, REWARD_TERMS
from ebft_mega.reward.terms.alignment import Alignment
from ebft_mega.reward.terms.diversity import Diversity
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import keep_nucleus, sample_tokens
from tests.exact_toy import Critic, Features, Toy, advantages_of, gradient_of, mean_gradient, rewards_of
from tests.explicit_features import NORMS
from tests.own_entries import Matches

EXACT = 1e-12
# What the docstring of an estimator claims: the gradient's mean is that of this objective, divided by G.
OBJECTIVE = "delta |E phi|^2 - alpha E a"
FOLLOWS = {"rloo": OBJECTIVE, "reinforce": OBJECTIVE, "token_critic": OBJECTIVE, "group_norm": "no objective"}
THAT_FOLLOW = [name for name, claim in FOLLOWS.items() if claim == OBJECTIVE]
KINDS = ("cosine", "inner_product")
# V, G, n
TOYS = {"V=4": (4, 2, 3), "V=5": (5, 2, 3), "V=3": (3, 3, 2), "one rollout": (4, 2, 1), "four rollouts": (3, 2, 4)}
CRITIC_TOYS = {"V=4": (4, 2, 3), "V=5": (5, 2, 2), "V=3": (3, 3, 2), "two rollouts": (4, 2, 2)}
COEFFICIENTS = {"1, 1": (1.0, 1.0), "0.7, 0.4": (0.7, 0.4)}  # alpha, delta
ALL_FEATURES = [Features(method, norm) for method in FEATURE_MAPS.own_names() for norm in NORMS]
FEATURES = [each for each in ALL_FEATURES if each.method in ("mean_pooling", "last_token")]
WEIGHTED = Features("mean_pooling", "joint", (0.5, 2.0))


def of_toys(toys: dict[str, tuple[int, int, int]]):
    """Every feature on the first toy, the two usual ones on all."""
    return pytest.mark.parametrize(
        ("features", "sizes"),
        [
            pytest.param(features, sizes, id=f"{features.method} {features.norm} {features.weights or ''} {label}")
            for label, sizes in toys.items()
            for features in ([*ALL_FEATURES, WEIGHTED] if label == "V=4" else FEATURES)
        ],
    )


def entry(name: str):
    return ADVANTAGE_ESTIMATORS.entry(name)()


def terms_of(kind: str, alpha: float = 1.0, delta: float = 1.0):
    return [(Alignment(kind=kind), alpha), (Diversity(), -delta)]


def objective_gradient(toy: Toy, features: Features, kind: str, alpha: float = 1.0, delta: float = 1.0) -> Tensor:
    """Of delta |E phi|^2 - alpha E a, a twice the cosine or the inner product with the target, divided by G."""
    phi, target = features.explicit(toy)
    similarity = phi @ target
    if kind == "cosine":
        similarity = torch.nn.functional.cosine_similarity(phi, target[None], dim=1)
    if toy.num_samples == 1:
        delta = 0.0
    return (
        gradient_of(toy, lambda p: delta * (p @ phi).square().sum() - 2 * alpha * (p @ similarity).sum()) / toy.length
    )


def policy_gradient(toy: Toy, reward: Tensor) -> Tensor:
    """Of the loss whose rewards [sets, n, 1] nothing is subtracted from: -(1/n) sum_j E[r_j grad log pi(x_j)] / G."""
    probabilities = toy.probabilities[toy.sample_sets].prod(dim=1)
    of_rollouts = probabilities[:, None] * reward[..., 0]
    scores = toy.scores.sum(dim=1)[toy.sample_sets]
    return -torch.einsum("sn,snp->p", of_rollouts, scores) / toy.num_samples / toy.length


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS.own_names())
def test_each_estimator_names_its_objective(name):
    assert FOLLOWS[name] in " ".join(ADVANTAGE_ESTIMATORS.entry(name).__doc__.split())
    assert ADVANTAGE_ESTIMATORS.entry(name).leaves_the_mean == (FOLLOWS[name] == OBJECTIVE)
    assert REWARD_TERMS.own_names() == ("alignment", "diversity"), "name the objective of a further term"


@of_toys(TOYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", THAT_FOLLOW)
def test_the_mean_is_the_gradient_of_the_objective(name, kind, features, sizes, groups):
    toy = Toy.of(groups, *sizes)
    gram = features.gram(toy)
    for alpha, delta in COEFFICIENTS.values():
        expected = objective_gradient(toy, features, kind, alpha, delta)
        assert expected.norm() > 0.01
        rewards = rewards_of(toy, gram, terms_of(kind, alpha, delta))
        found = mean_gradient(toy, advantages_of(toy, rewards, entry(name)))
        assert (found - expected).abs().max() <= EXACT


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@of_toys(CRITIC_TOYS)
def test_a_token_critic_that_is_wrong_leaves_the_mean(features, share, sizes, groups):
    """Regressions and vectors of tokens are random numbers, and far from nothing."""
    toy, (alpha, delta) = Toy.of(groups, *sizes), (0.7, 0.4)
    critic = Critic(Objective(alpha, delta, share), merges=share != 0.5)
    rewards = rewards_of(toy, features.gram(toy), terms_of("inner_product", alpha, delta))
    values = critic.values(toy, features)
    advantages = advantages_of(toy, rewards, entry("token_critic"), critic=values[0])
    expected = objective_gradient(toy, features, "inner_product", alpha, delta)
    assert (mean_gradient(toy, advantages, critic=values) - expected).abs().max() <= EXACT
    assert relative(mean_gradient(toy, advantages), expected) > 0.1  # without what the vocabulary adds back
    plain = advantages_of(toy, rewards, entry("rloo"))[..., None]
    assert (advantages - plain).std() > 0.1 * plain.std()


@pytest.mark.parametrize("name", ["rloo", "token_critic"])
def test_a_further_term_adds_its_mean(name, groups):
    """Minus its coefficient times E of the term, for a term that is a function of each rollout by itself."""
    toy, features, coefficient = Toy.of(groups, *TOYS["V=4"]), Features("mean_pooling", "per_layer"), 0.3
    rewards = rewards_of(toy, features.gram(toy), [*terms_of("inner_product"), (Matches(), coefficient)])
    values = Critic(Objective(1.0, 1.0, 0.5)).values(toy, features) if name == "token_critic" else None
    critic = None if values is None else values[0]
    found = mean_gradient(toy, advantages_of(toy, rewards, entry(name), critic=critic), critic=values)
    matches = (toy.tokens == toy.text[1:]).double().mean(dim=1)
    of_term = gradient_of(toy, lambda p: -coefficient * (p @ matches)) / toy.length
    assert of_term.norm() > 0.01
    assert (found - objective_gradient(toy, features, "inner_product") - of_term).abs().max() <= EXACT


def test_kinds_of_alignment_are_one_objective_for_features_of_length_one_alone(groups):
    """By length: one for what is scaled last, with a joint norm; the figures are those of this toy."""
    toy, found = Toy.of(groups, *TOYS["V=4"]), {}
    for features in ALL_FEATURES:
        cosine, inner = (objective_gradient(toy, features, kind) for kind in KINDS)
        found[features.method, features.norm] = relative(cosine, inner)
    for (method, norm), difference in found.items():
        print(f"{method:16} {norm:10} gradient with cosines against feature matching: {difference:.2f}")
        if norm == "joint" and method in ("last_token", "completion_mean"):
            assert difference <= EXACT
        else:
            assert difference > 0.25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whitening", ["sample", "feature"])
def test_whitened_rewards_follow_no_objective(whitening, kind, groups):
    """A rollout's whitened reward depends on the others, and theirs on it: a baseline of them is not independent.

    So the mean with `rloo` is not that of the rewards themselves, (1/n) sum_j E[r_j grad log pi(x_j)] with the other
    rollouts held fixed; nor is that a gradient: its Jacobian is not symmetric. `reinforce` subtracts nothing.
    """
    for label in ("V=4", "V=3"):
        toy = Toy.of(groups, *TOYS[label])
        for features in FEATURES:
            rewards = rewards_of(toy, features.gram(toy), terms_of(kind), whitening)
            expected = policy_gradient(toy, rewards.reward)
            found = {name: advantages_of(toy, rewards, entry(name)) for name in ("reinforce", "rloo")}
            means = {name: mean_gradient(toy, advantages) for name, advantages in found.items()}
            assert (means["reinforce"] - expected).abs().max() <= EXACT
            difference, lopsided = relative(means["rloo"], expected), asymmetry(toy, rewards.reward)
            print(
                f"{whitening:8} {kind:14} {label} {features.method:13} {features.norm:10} rloo against the rewards "
                f"{difference:.2f}, asymmetry of the rewards {lopsided:.2f}, "
                f"of rloo {asymmetry(toy, found['rloo']):.2f}"
            )
            assert 0.03 < difference < 0.7 and lopsided > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_group_norm_follows_no_objective(kind, groups):
    """It divides by what depends on the rollout itself: no factor makes its mean that of the rewards."""
    toy = Toy.of(groups, *TOYS["V=4"])
    for whitening in ("none", "sample", "feature"):
        for features in FEATURES:
            rewards = rewards_of(toy, features.gram(toy), terms_of(kind), whitening)
            expected = policy_gradient(toy, rewards.reward)
            advantages = advantages_of(toy, rewards, entry("group_norm"))
            found = mean_gradient(toy, advantages)
            factor = (found @ expected) / found.square().sum()
            difference, lopsided = relative(factor * found, expected), asymmetry(toy, advantages)
            print(
                f"group_norm {whitening:8} {kind:14} {features.method:13} {features.norm:10} after the best factor "
                f"{difference:.2f}, asymmetry {lopsided:.2f}"
            )
            assert difference > 0.03 and lopsided > 0.03


def test_in_a_nucleus_baselines_change_the_mean(groups):
    """`top_p` below 1 draws from a nucleus and scores by the whole softmax: scores do not have a mean of zero."""
    toy, features = Toy.of(groups, *TOYS["V=4"]), Features("mean_pooling", "joint")
    gram = features.gram(toy)
    kept = [keep_nucleus(table / toy.temperature, 0.8, toy.own_slice).softmax(dim=-1) for table in toy.tables]
    assert any((probabilities == 0).any() for probabilities in kept)
    of_sets = toy.of_continuations(kept).prod(dim=1)[toy.sample_sets].prod(dim=1)
    rewards = rewards_of(toy, gram, terms_of("inner_product"))
    means = {n: mean_gradient(toy, advantages_of(toy, rewards, entry(n)), of_sets) for n in ("rloo", "reinforce")}
    difference = relative(means["rloo"], means["reinforce"])
    print(f"top_p 0.8, mean_pooling joint: rloo against the rewards {difference:.2f}")
    assert difference > 0.03


def asymmetry(toy: Toy, advantages: Tensor) -> float:
    """How far a field of advantages is from a gradient: 0 for every gradient of a function of the policy.

    f_s(p), the mean advantage of continuation s where others are drawn from p, is a gradient on the simplex of
    probabilities p only if its Jacobian, here at the policy, is symmetric in directions that add up to 0.
    """
    size, others = toy.num_continuations, toy.num_samples - 2
    rest = torch.ones(1, dtype=torch.float64)
    for _ in range(others):
        rest = torch.outer(rest, toy.probabilities).flatten()
    jacobian = advantages[:, 0, 0].view(size, size, -1) @ rest
    centred = jacobian - jacobian.mean(dim=0) - jacobian.mean(dim=1, keepdim=True) + jacobian.mean()
    return ((centred - centred.T).norm() / centred.norm() / 2).item()


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_an_objective_is_a_field_of_gradients(kind, name, groups):
    """The measure of the tests above, where the answer is known."""
    toy, features = Toy.of(groups, *TOYS["V=4"]), Features("mean_pooling", "per_layer")
    rewards = rewards_of(toy, features.gram(toy), terms_of(kind))
    assert asymmetry(toy, advantages_of(toy, rewards, entry(name))) <= EXACT


def test_the_sampler_draws_what_was_enumerated(groups):
    """One run through the sampler, which statistics judge: z-scores of the mean gradient of 30 000 blocks."""
    toy, features, num_blocks = Toy.of(groups, *TOYS["V=4"]), Features("mean_pooling", "per_layer"), 30_000
    drawn: list[Tensor] = []
    prefix = torch.zeros(num_blocks, toy.num_samples, 1, dtype=torch.int64)
    for t, table in enumerate(toy.tables):
        keys = noise_keys(3, 0, torch.arange(num_blocks), toy.num_samples, 1, t)
        drawn.append(sample_tokens(table, prefix, keys, toy.temperature, 1.0, toy.own_slice))
        prefix = prefix * toy.vocabulary + drawn[-1]
    sets = prefix[..., 0]
    assert torch.equal(toy.tokens[sets], torch.cat(drawn, dim=-1))
    rewards = rewards_of(toy, features.gram(toy), terms_of("inner_product"), sets=sets)
    advantages = advantages_of(toy, rewards, entry("rloo"), sets)[..., 0]
    of_blocks = -torch.einsum("bn,bnp->bp", advantages, toy.scores.sum(dim=1)[sets]) / toy.num_samples / toy.length
    errors = of_blocks.mean(dim=0) - objective_gradient(toy, features, "inner_product")
    z = errors / (of_blocks.std(dim=0) / num_blocks**0.5)
    print(f"largest z {z.abs().max():.2f}, mean square {z.square().mean():.2f}")
    assert z.abs().max() < 4 and 0.2 < z.square().mean() < 2.5
