"""The cosine schedule."""

import math

from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule


class Cosine(LearningRateSchedule):
    """Falls to `train.min_lr` along half a wave of a cosine."""

    name = "cosine"

    def factor(self, progress: float) -> float:
        """(1 + cos(pi * progress)) / 2."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))
