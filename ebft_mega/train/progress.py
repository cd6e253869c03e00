"""Where a run stands, beside its weights and its data."""

from dataclasses import dataclass, field

from ebft_mega.checkpoint.run_state import EvaluationRecord, Layout, RunState, StartedFrom
from ebft_mega.data.rows.loader import BatchLoader


@dataclass
class SkippedSteps:
    """Counts the steps that all ranks skipped because something was not finite on one of them."""

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

    @classmethod
    def of(cls, state: RunState) -> "Progress":
        """Where a checkpoint was taken."""
        return cls(
            state.step,
            SkippedSteps(state.skipped_steps, state.skipped_in_a_row),
            list(state.evaluations),
            state.pending_metrics,
        )

    @property
    def logged_step(self) -> int:
        """The last step whose metrics are logged; -1 before the first."""
        return self.step if self.pending is None else self.step - 1


@dataclass(frozen=True)
class RunIdentity:
    """What a run keeps from its first step to its last, and the layout of this start of it."""

    seed: int
    feature_network: str | None  # sha256 of the initial model; None: no rollouts
    feature_source: str  # where it came from, in words
    layout: Layout
    started_from: StartedFrom | None  # the checkpoint that `checkpoint.resume` named

    def state(self, progress: Progress, loader: BatchLoader, optimizer_updates: int) -> RunState:
        """What a checkpoint says of the run.

        Args:
            optimizer_updates: steps that changed the weights.
        """
        data = loader.state
        return RunState(
            step=progress.step,
            optimizer_updates=optimizer_updates,
            skipped_steps=progress.skipped.total,
            skipped_in_a_row=progress.skipped.in_a_row,
            tokens=data.next_row * data.sequence_length,
            seed=self.seed,
            data=data,
            feature_network=self.feature_network,
            feature_source=self.feature_source,
            layout=self.layout,
            evaluations=tuple(progress.evaluations),
            pending_metrics=progress.pending,
            started_from=self.started_from,
        )
