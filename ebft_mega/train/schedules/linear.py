"""The linear schedule."""

from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule


class Linear(LearningRateSchedule):
    """Falls in a straight line to `train.min_lr`."""

    name = "linear"

    def factor(self, progress: float) -> float:
        """1 - progress."""
        return 1.0 - progress
