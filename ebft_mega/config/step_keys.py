"""Configuration keys of what happens around optimizer steps: checkpoints and profiles."""

from typing import Literal

from ebft_mega.config.fields import WordOrPath
from ebft_mega.config.input_keys import STEPS
from ebft_mega.extension.options import Section, key


class CheckpointConfig(Section):
    """Complete checkpoints during the run."""

    interval: int | None = key(
        None, "Steps between checkpoints; not set: none between the first step and the last.", unit=STEPS, ge=1
    )
    final: bool = key(
        True, "(ours) A checkpoint after the last step, whatever `interval` says; `false`: only where it is due there."
    )
    keep_last: int | None = key(None, "How many of the newest checkpoints are kept; not set: all.", ge=1)
    keep_every: int | None = key(
        None, "With `keep_last`: checkpoints at multiples of this are never deleted.", unit=STEPS, ge=1
    )
    resume: WordOrPath = key(
        "auto",
        "`auto`: resume from the newest complete checkpoint in `output_dir`, if there is one. A path (of a checkpoint "
        "or of a run): start from there, and once the run has a checkpoint of its own, resume from that.",
        allowed="auto, never or the path of a checkpoint",
    )
    on_error: Literal["continue", "stop"] = key(
        "continue", "(ours) Whether a run continues when a checkpoint cannot be written."
    )


class ProfileConfig(Section):
    """A profiler trace of some steps; both keys or neither."""

    start: int | None = key(None, "Optimizer steps of the run before the first traced one.", unit=STEPS, ge=0)
    steps: int | None = key(None, "How many steps to trace.", unit=STEPS, ge=1)

    @property
    def traced_steps(self) -> range:
        """The steps to trace, counted from 0; empty if none are."""
        if self.start is None or self.steps is None:
            return range(0)
        return range(self.start, self.start + self.steps)
