"""Credit for what is still to come, less what a linear critic of tokens predicts of it."""

from typing import TYPE_CHECKING

from ebft_mega.extension.advantage_estimator import AdvantageEstimator, EstimatorInputs
from ebft_mega.extension.critic_settings import CriticSettings
from ebft_mega.extension.options import Section, key
from ebft_mega.objective.estimators.rloo import Rloo, above_baseline

if TYPE_CHECKING:
    from torch import Tensor


class TokenCritic(AdvantageEstimator):
    """Per token: the feature still to come along the objective's gradient, less predictions of it from the tokens so
    far and from the drawn token, whose exact expectation over the vocabulary the loss adds.

    Follows delta |E phi|^2 - alpha E a as `rloo` does (there the legend is), a the inner product, with less noise
    (docs/tuning.md). Until enough batches are held it is `rloo`.
    """

    name = "token_critic"
    leaves_the_mean = True
    needs = frozenset({"critic"})

    class Options(Section):
        """How the critic is fitted and used."""

        rank: int = key(64, "Numbers of a token's vector; at most the hidden size is used.", ge=1, le=4096)
        decay: float = key(0.95, "Share of the critic's statistics that is left after another step.", ge=0, le=1)
        prefix_ridge: float = key(
            0.1,
            "Ridge of the regression on the tokens so far, times the mean of the regressors' squares.",
            gt=0,
            le=1e6,
        )
        token_ridge: float = key(0.02, "The same of the regression on the drawn token.", gt=0, le=1e6)
        leave_one_out_share: float | None = key(
            None,
            "How much of the other rollouts' mean is the baseline, beside the prediction from the tokens so far. Not "
            "set: 0.5 where the feature is a mean of tokens, else 0.",
            ge=0,
            le=1,
        )
        warmup_batches: int = key(4, "Steps that the critic is fitted on before it is used.", unit="steps", ge=1)

    def critic_settings(self) -> CriticSettings:
        """As the options say."""
        return CriticSettings(**self.options.model_dump())

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """Float64 [B, n, K, G]; more terms of the reward have the baseline of `rloo`."""
        if inputs.critic is None:
            advantages = Rloo().advantages(inputs)[..., None]
            return advantages.expand(*advantages.shape[:-1], inputs.plan.generate_length)
        found = inputs.critic.advantages
        for name, term in inputs.rewards.terms.items():
            if name not in ("alignment", "diversity"):
                found = found + (term.coefficient * above_baseline(term))[..., None]
        return found
