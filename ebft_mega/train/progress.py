"""The progress of a run: steps done, steps skipped, evaluations, and metrics that are not reported yet."""

from dataclasses import dataclass, field

from ebft_mega.checkpoint.run_state import EvaluationRecord, RunState


@dataclass
class SkippedSteps:
    """Count the steps that all ranks skipped because something was not finite on one of them."""

    total: int = 0
    in_a_row: int = 0

    def count(self, applied: bool) -> None:
        """Take in a step."""
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1


@dataclass
class Progress:
    """How far a run has come; the training loop moves it on, the same on every rank."""

    step: int = 0  # optimizer steps done
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    # Metrics of this very step that are not logged yet, because an evaluation belongs to them; None: all is logged.
    pending: dict[str, float] | None = field(default_factory=dict)
    # The evaluation after this step was interrupted, or is that of the initial model and has not begun.
    evaluation_pending: bool = True

    @classmethod
    def of(cls, state: RunState) -> "Progress":
        """Where a checkpoint was taken."""
        return cls(
            state.step,
            SkippedSteps(state.skipped_steps, state.skipped_in_a_row),
            list(state.evaluations),
            state.pending_metrics,
            evaluation_pending=state.pending_metrics is not None,
        )

    @property
    def logged_step(self) -> int:
        """The last step whose metrics are logged; -1 before the first."""
        return self.step if self.pending is None else self.step - 1
