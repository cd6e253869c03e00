"""How reports name the held-out metrics: label, which direction is better, what the number means."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationMetric:
    """How reports name one `eval/*` key."""

    key: str
    label: str
    direction: str
    meaning: str

    @property
    def file_name(self) -> str:
        """Stem of the metric's plot."""
        return self.key.replace("/", "_")


EVALUATION_METRICS = (
    EvaluationMetric(
        "eval/ce_loss", "cross-entropy", "lower", "Nats per token of the held-out code, at temperature 1."
    ),
    EvaluationMetric(
        "eval/feature_matching_loss",
        "feature-matching loss",
        "lower",
        "Squared distance between the expected rollout feature and the target feature, unwhitened, estimated "
        "without bias from pairs of rollouts.",
    ),
    EvaluationMetric(
        "eval/cfm_loss",
        "CFM loss",
        "lower",
        "Squared distance between the mean of a block's rollout features and the target feature, in the "
        "training's feature space.",
    ),
    EvaluationMetric(
        "eval/alignment",
        "alignment",
        "higher",
        "Twice the cosine between a rollout's and the target's features after sample whitening.",
    ),
    EvaluationMetric(
        "eval/raw_cosine",
        "raw cosine",
        "higher",
        "Cosine between a rollout's and the target's features, unwhitened.",
    ),
    EvaluationMetric(
        "eval/duplicate_share",
        "duplicate share",
        "-",
        "Share of blocks in which two or more rollouts are equal: how sharp the policy is.",
    ),
)

# Of next-token distributions at a temperature; not in every evaluation.
CALIBRATION_METRICS = (
    EvaluationMetric(
        "eval/brier",
        "Brier score",
        "lower",
        "Squared distance between the next-token distribution and the token that came, mean over tokens.",
    ),
    EvaluationMetric(
        "eval/calibration_error",
        "calibration error",
        "lower",
        "Mean distance between how sure the likeliest token is and how often it is right, over 15 equal parts of "
        "[0, 1] weighted by their tokens.",
    ),
)


def metric_named(name: str) -> EvaluationMetric:
    """The metric with the name that an experiment's file uses, such as `ce_loss`."""
    return next(each for each in (*EVALUATION_METRICS, *CALIBRATION_METRICS) if each.key == f"eval/{name}")
