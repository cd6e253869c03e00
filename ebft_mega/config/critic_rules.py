"""What a token critic needs: settings under which its estimate has the mean that it claims. Rules of `rules.py`."""

from collections.abc import Iterator

from ebft_mega.config.entries import feature_map, uses_critic
from ebft_mega.config.fields import yaml_text
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import Problem

CRITIC = (
    "options",
    *(
        f"ebft.{name}"
        for name in (
            *("advantage_estimator", "alignment", "use_whitening", "top_p", "n_samples_per_prompt", "rl_coef"),
            *("embed_method", "feature_norm", "layer_weights"),
        )
    ),
)


def critic_keeps_its_mean(config: RunConfig) -> Iterator[Problem]:
    """Settings with which the token critic's gradient would be that of another objective, or of none."""
    ebft = config.ebft
    if not uses_critic(config):
        return
    beside = f"with ebft.advantage_estimator {ebft.advantage_estimator}"
    if ebft.use_whitening:
        expected = "false: the token critic follows inner products of features as they are"
        yield Problem("", "ebft.use_whitening", f"true, {beside}", expected)
    if ebft.alignment == "cosine" and not features_have_length_one(config):
        expected = "inner_product; cosines are the same only for features of length one (last_token with joint norm)"
        yield Problem("", "ebft.alignment", f"cosine, {beside}", expected)
    if ebft.top_p < 1:
        expected = "1: the critic's expectations are those of the whole softmax, which a nucleus does not sample from"
        yield Problem("", "ebft.top_p", f"{yaml_text(ebft.top_p)}, {beside}", expected)
    if ebft.n_samples_per_prompt == 1:
        expected = "at least 2: a rollout is compared with the others of its anchor"
        yield Problem("", "ebft.n_samples_per_prompt", f"1, {beside}", expected)


def features_have_length_one(config: RunConfig) -> bool:
    """Whether every feature has length one, so that inner products of two are their cosines."""
    ebft = config.ebft
    return feature_map(config).normalises == "pooled" and ebft.feature_norm == "joint" and ebft.layer_weights is None
