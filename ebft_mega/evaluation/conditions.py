"""Under which conditions a model's rollouts are evaluated, and the names of what `evaluation.json` says of each.

One sampling serves all completion lengths and feature maps of a temperature: the anchors are those of the longest
completion, and shorter ones are its first tokens, as noise depends on neither length nor map (`rollout/noise.py`).
No torch.
"""

from dataclasses import dataclass

TRAINED_FEATURES = "trained"  # the feature map of the configuration
POSITION_BINS = 8  # equal parts of a row's anchors, and of its tokens
CONFIDENCE_BINS = 15  # equal parts of [0, 1]


@dataclass(frozen=True, order=True)
class Condition:
    """One way to sample and to look at completions."""

    temperature: float
    completion_length: int  # tokens
    features: str = TRAINED_FEATURES  # name of a feature map

    @property
    def label(self) -> str:
        """For people and plots, such as `T=0.6 G=4 trained`."""
        return f"T={self.temperature:g} G={self.completion_length} {self.features}"


# What a file of an evaluation holds beside what it held before:
#
# "completion_length": tokens of the configuration's completions, beside the old "temperature"
# "conditions": a list of objects, each with
#     "temperature", "completion_length", "features": of a `Condition`
#     "means":   {metric key: mean over the rows that have it}
#     "per_row": {metric key: [R] numbers or null}
#     "per_position": {metric key: [R][POSITION_BINS] numbers or null}, by the anchor's place in the row
#   with the metric keys of rollouts: eval/feature_matching_loss, eval/cfm_loss, eval/alignment, eval/raw_cosine,
#   eval/duplicate_share. The old top-level means and "per_row" are those of the configuration's own condition.
# "by_completion_length": {length: means}, of the configuration's own temperature and feature map
# "feature_maps": {name: what it is, in the words of the configuration's keys}
# "calibration": a list of objects, one for each temperature of the next-token distribution, each with
#     "temperature"
#     "means":   {"eval/brier", "eval/calibration_error"}: Brier score (mean of |p - onehot|^2), and the expected
#       calibration error
#     "per_row": {"eval/brier": [R], and [R][CONFIDENCE_BINS] "eval/bin_tokens", "eval/bin_confidence" and
#       "eval/bin_correct"}:
#       tokens of the row's targets whose likeliest token has a probability within the bin, the sum of those
#       probabilities, and how many of them were right
# "ce_per_position": [R][POSITION_BINS], mean cross-entropy of the targets in each part of the row


def part_of(place: int, count: int) -> int:
    """Which of `POSITION_BINS` equal parts a place of a row belongs to.

    Args:
        place: from 0 to `count` - 1, of an anchor among a row's, or of a target among a row's.
    """
    return place * POSITION_BINS // count
