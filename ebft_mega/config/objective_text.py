"""Which objective a configuration follows, in words: the function whose gradient a step's gradient is in the mean."""

from ebft_mega.config.critic_rules import features_have_length_one
from ebft_mega.config.entries import advantage_estimator
from ebft_mega.config.schema import RunConfig


def followed_objective(config: RunConfig) -> str:
    """Say what a run minimises; where the rollouts' part of it is the gradient of no function, why.

    docs/numerics.md has the legend and the tests.
    """
    ebft = config.ebft
    parts = [("cross-entropy", ebft.ce_coef)]
    if config.uses_rollouts:
        parts.insert(0, (_of_rollouts(config), ebft.rl_coef))
    words = " + ".join(text if weight == 1 else f"{weight:g} ({text})" for text, weight in parts if weight)
    return f"{words} - {ebft.entropy_coef:g} (entropy of the next token)" if ebft.entropy_coef else words


def objective_notes(config: RunConfig) -> list[str]:
    """What a term of the reward is worth under whitening."""
    ebft = config.ebft
    if not (config.uses_rollouts and ebft.use_whitening and ebft.diversity_coef and ebft.n_samples_per_prompt > 1):
        return []
    return [
        f"ebft.use_whitening: the diversity term is 0 for a rollout that no other one of its block equals, whatever "
        f"ebft.whitening is; of m equal ones among {ebft.n_samples_per_prompt} each has "
        f"2 (m - 1) / (m * {ebft.n_samples_per_prompt - 1})."
    ]


def _of_rollouts(config: RunConfig) -> str:
    ebft = config.ebft
    estimator = advantage_estimator(config)
    if not estimator.leaves_the_mean:
        return f"{'no function' if estimator.is_built_in() else 'not known'} (advantages of {estimator.name})"
    if ebft.use_whitening:
        return "no function (whitened rewards)"
    if ebft.top_p < 1:
        return "no function (rollouts of a nucleus)"
    alpha = ebft.alignment_coef
    delta = ebft.diversity_coef if ebft.n_samples_per_prompt > 1 else 0.0
    is_inner = ebft.alignment == "inner_product" or features_have_length_one(config)
    signed = [(delta, "|E phi|^2"), (-2 * alpha, "y . E phi" if is_inner else "E cos(phi, y)")]
    signed += [(-weight, f"E {name}") for name, weight in ebft.reward_terms.items()]
    if is_inner and alpha == delta == 1:
        signed = [(1.0, "|E phi - y|^2"), *signed[2:]]
    signed = [(weight, text) for weight, text in signed if weight]
    if not signed:
        return "no function (one rollout has no other to differ from)"
    first, *others = signed
    words = f"{_times(first[0])}{first[1]}"
    for weight, text in others:
        words += f" {'-' if weight < 0 else '+'} {_times(abs(weight))}{text}"
    return f"feature matching, {words}" if "- y|" in words else words


def _times(weight: float) -> str:
    return {1.0: "", -1.0: "-"}.get(weight, f"{weight:g} ")
