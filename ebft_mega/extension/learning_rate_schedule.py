"""Contract of a learning-rate schedule: the way from `train.lr` to `train.min_lr` after the warm-up."""

from ebft_mega.extension.entry import Entry


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
