"""Contract of a learning-rate schedule: the way from `train.lr` to `train.min_lr` after the warm-up."""

from dataclasses import dataclass

from ebft_mega.errors import EntryError, Problem
from ebft_mega.extension.entry import Entry, place_of_entry

_MOST_CHECKED = 200  # steps, spread over the run, at which a schedule is tried before anything starts


class LearningRateSchedule(Entry):
    """An entry of `train.lr_scheduler`. Every rank computes it for itself, so it must be a pure function."""

    def factor(self, progress: float) -> float:
        """Share of the way from `train.min_lr` up to `train.lr`, from 0 to 1.

        Args:
            progress: share of the steps after the warm-up that has been done, from 0 at the first of them; 1 would be
                the step after the last one.
        Returns:
            The learning rate is `min_lr + (lr - min_lr) * factor`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of every step of a run: a linear warm-up, then what the schedule says."""

    schedule: LearningRateSchedule
    peak: float  # `train.lr`
    lowest: float  # `train.min_lr`
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based).

        The warm-up begins above 0 and reaches the peak at step `warmup_steps`.

        Raises:
            EntryError: the schedule's factor is not a finite number from 0 to 1.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        factor = self.schedule.factor(progress)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
            found = f"{self.schedule.name}, whose factor({progress:g}), of step {step}, is {factor!r}"
            where = place_of_entry(type(self.schedule))
            raise EntryError(Problem(where, "train.lr_scheduler", found, "a finite number from 0 to 1"))
        # Exact at both ends of the way, and without a lowest rate.
        return self.peak * factor + self.lowest * (1.0 - factor)

    def some_steps(self) -> list[int]:
        """The first and the last step, those around the end of the warm-up, and some spread over the run."""
        spread = {number * self.total_steps // _MOST_CHECKED for number in range(_MOST_CHECKED)}
        edges = {0, self.warmup_steps - 1, self.warmup_steps, self.warmup_steps + 1, self.total_steps - 1}
        return sorted(step for step in spread | edges if 0 <= step < self.total_steps)
