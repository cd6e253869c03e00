"""The constant schedule."""

from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule


class Constant(LearningRateSchedule):
    """Stays at `train.lr`."""

    name = "constant"

    def factor(self, progress: float) -> float:
        """Always 1."""
        return 1.0
