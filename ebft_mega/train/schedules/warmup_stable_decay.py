"""The schedule of warm-up, plateau and decay."""

from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule
from ebft_mega.extension.options import Section, key


class DecayOptions(Section):
    """When the plateau ends."""

    decay_share: float = key(0.2, "Share of the steps after the warm-up in which the learning rate falls.", gt=0, le=1)


class WarmupStableDecay(LearningRateSchedule):
    """Stays at `train.lr`, then falls in a straight line to `train.min_lr` in the last share of the run."""

    name = "warmup_stable_decay"
    Options = DecayOptions

    def factor(self, progress: float) -> float:
        """1 up to the decay, then the share of it that is left."""
        return min(1.0, (1.0 - progress) / self.options.decay_share)
