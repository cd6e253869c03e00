"""A learning-rate schedule: the inverse square root of the steps."""

# In a configuration:
#     plugins: [inverse_square_root.py]  # a copy beside the configuration
#     train: {lr_scheduler: inverse_square_root, warmup_share: 0.01}
#     options: {inverse_square_root: {halving: 0.1}}  # not needed

from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule
from ebft_mega.extension.options import Section, key


class InverseSquareRootOptions(Section):
    """How fast it falls."""

    halving: float = key(0.25, "Share of the steps after the warm-up at which half of the way is left.", gt=0, le=1)


class InverseSquareRoot(LearningRateSchedule):
    """Falls as 1 / sqrt(steps), so that a run can be continued without having planned its end."""

    name = "inverse_square_root"
    Options = InverseSquareRootOptions

    def factor(self, progress: float) -> float:
        """1 at the start, 1/2 at `halving`."""
        return (1.0 + 3.0 * progress / self.options.halving) ** -0.5
