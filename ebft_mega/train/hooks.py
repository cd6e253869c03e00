"""What happens around every optimizer step beside the step itself: profile, evaluation, report, checkpoint.

They happen in this order, which is the order of `step_hooks`. A checkpoint comes last because it holds what the others
have done; metrics are reported after the evaluation because one line of `metrics.jsonl` holds both.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch.distributed as dist

from ebft_mega.checkpoint.run_state import EvaluationRecord
from ebft_mega.evaluation.held_out import (
    EvaluationSettings,
    evaluate_chunk,
    evaluation_chunks,
    gather,
    merge,
)
from ebft_mega.metrics.announcer import SILENT, Announcer, Count
from ebft_mega.metrics.profiler import StepProfiler
from ebft_mega.runtime.stop_requests import StopReason
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.observer import Observer, announcer_of
from ebft_mega.train.progress import Progress
from ebft_mega.train.step_boundary import Boundary
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What evaluations look at, and when."""

    rows: TokenBatch  # this rank's rows
    settings: EvaluationSettings
    interval: int | None  # optimizer steps; None: only before the first and after the last
    num_rows: int | None = None  # of all replicas; None: it is not known


class StepHook:
    """Something that happens around every optimizer step; by default nothing.

    Communication: a hook may be collective over the world, so every rank has the same hooks in the same order.
    """

    def at_start(self, progress: Progress) -> StopReason:
        """Before the first step of this start of the run, when nothing of the last step is unfinished."""
        return StopReason.NONE

    def around_step(self, step: int) -> AbstractContextManager[None]:
        """Context in which optimizer step `step` (0-based) is computed."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """What the hook adds to the metrics of the step that has just been computed. Communication: none."""
        return {}

    def after_step(self, progress: Progress) -> StopReason:
        """After a step, or at the start of a run whose last step (or step 0) still needs its evaluation.

        Returns:
            Why the run stops here; NONE: it continues.
        """
        return StopReason.NONE

    def finish(self) -> None:
        """At the end of the run, also at an error that all ranks raise together: collective, unlike `close`."""

    def close(self) -> None:
        """Release what is held, however the run ends. Communication: none."""


class ProfileHook(StepHook):
    """Record the steps that `profile.start` and `profile.steps` name.

    Communication: none.
    """

    def __init__(self, trainer: Trainer, announce: Callable[[str], None] | None):
        """Take the steps from the configuration; `announce` shows a line to people."""
        config = trainer.config
        steps, directory = config.profile.traced_steps, config.output_dir / "profile"
        self._profiler = StepProfiler(steps, directory, dist.get_rank(), trainer.groups.device, announce)

    def around_step(self, step: int) -> AbstractContextManager[None]:
        """Record the step, if it is one of those."""
        return self._profiler.step(step)

    def close(self) -> None:
        """End a recording that is still running, without a file."""
        self._profiler.close()


class FirstStepHook(StepHook):
    """Say that the first step of a start is under way: it takes longer than the others.

    Communication: none.
    """

    def __init__(self, announcer: Announcer):
        """Say it with an announcer."""
        self._announcer = announcer
        self._has_begun = False

    def around_step(self, step: int) -> AbstractContextManager[None]:
        """Announce the first step, and say every five seconds that it lasts."""
        if self._has_begun:
            return nullcontext()
        self._has_begun = True
        words = "the first one of this start also compiles kernels, allocates memory and starts the readers of rows"
        return self._announced(f"step {step + 1}: {words}")

    @contextmanager
    def _announced(self, words: str) -> Iterator[None]:
        with self._announcer.phase(words):
            yield


class NoiseHook(StepHook):
    """Measure the noise of the gradient in the steps that `ebft.noise_interval` names.

    Communication: that of `NoiseProbe.around_step`.
    """

    def __init__(self, trainer: Trainer):
        """Use the probe of the trainer, if it has one."""
        self._probe = trainer.noise

    def around_step(self, step: int) -> AbstractContextManager[None]:
        """Look at the step's gradient, if it is one of those."""
        return nullcontext() if self._probe is None else self._probe.around_step(step)

    def metrics(self) -> dict[str, float]:
        """What was found, in the metrics of that step alone."""
        return {} if self._probe is None else self._probe.metrics()


class EvaluationHook(StepHook):
    """Evaluate the policy on held-out rows when it is due.

    A stop request interrupts an evaluation. It is then left to the resumed run, together with the report of the step.

    Communication: that of `evaluate_now`, and one all-reduce of four int64 over the world for each few micro-batches
        (`Boundary.stop_requested`).
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: HeldOut | None,
        total_steps: int,
        boundary: Boundary,
        observer: Observer | None,
        watchdog: Watchdog,
    ):
        """Evaluate `held_out` at its interval and after the last step; None: only the schedule is kept."""
        self._trainer, self._held_out, self._total_steps = trainer, held_out, total_steps
        self._boundary, self._observer, self._watchdog = boundary, observer, watchdog

    def after_step(self, progress: Progress) -> StopReason:
        """Evaluate if it is due or still pending, and add the figures to the step's metrics."""
        interval = self._held_out.interval if self._held_out else None
        is_first = progress.evaluation_pending
        if not (is_first or is_due(progress.step, interval, self._total_steps)):
            return StopReason.NONE
        progress.evaluation_pending = True
        assert progress.pending is not None, "metrics that an evaluation belongs to are not reported before it"
        with self._announced(progress.step, is_first) as count:
            figures = evaluate_now(
                self._trainer,
                self._held_out,
                progress.step,
                self._observer,
                is_interrupted=lambda: self._boundary.stop_requested(progress),
                count=count,
            )
        if figures is None:
            return StopReason.NONE  # the checkpoint hook stops the run
        if figures:
            progress.evaluations.append(EvaluationRecord(step=progress.step, metrics=figures))
        progress.pending |= figures
        progress.evaluation_pending = False
        self._watchdog.beat(f"evaluation after step {progress.step}")
        return StopReason.NONE

    def _announced(self, step: int, is_first: bool) -> AbstractContextManager[Count]:
        """The phase of an evaluation: the first and the last are announced, others only spoken of when they last."""
        if self._held_out is None:
            return SILENT.phase("")
        rows = self._held_out.num_rows
        words = f"evaluating the model of step {step}" + (f" on {rows} held-out rows" if rows else "")
        is_last = step == self._total_steps
        announcer = announcer_of(self._observer).of_part("start" if is_first else "end" if is_last else f"step {step}")
        return announcer.phase(words, rows, "rows", is_announced=is_first or is_last)


class ReportHook(StepHook):
    """Write a step's metrics, on the one rank that writes.

    Communication: none.
    """

    def __init__(self, observer: Observer | None):
        """Write to the observer; None on ranks that do not write."""
        self._observer = observer

    def after_step(self, progress: Progress) -> StopReason:
        """Report the metrics, unless an evaluation that belongs to them is still pending."""
        if progress.evaluation_pending:
            return StopReason.NONE
        if self._observer is not None and progress.pending:
            self._observer.writer.log(progress.step, progress.pending)
        progress.pending = None
        return StopReason.NONE


class CheckpointHook(StepHook):
    """Save checkpoints when they are due or requested, and stop the run on request.

    Communication: that of `Boundary.cross`.
    """

    def __init__(self, boundary: Boundary, interval: int | None, final: bool, total_steps: int):
        """Save every `interval` optimizer steps (None: never), and if it is `final` after the last one."""
        self._boundary, self._interval = boundary, interval
        self._final_step = total_steps if final else None

    def at_start(self, progress: Progress) -> StopReason:
        """Stop at once if a stop is requested; the state that a run starts from needs no new checkpoint."""
        return self._boundary.cross(progress, is_due=False)

    def metrics(self) -> dict[str, float]:
        """Seconds that the run has spent on checkpoints since the step before."""
        return {"perf/checkpoint_seconds": self._boundary.take_seconds()}

    def after_step(self, progress: Progress) -> StopReason:
        """Save a checkpoint if one is due."""
        at_interval = self._interval is not None and progress.step % self._interval == 0
        return self._boundary.cross(progress, progress.step > 0 and (at_interval or progress.step == self._final_step))

    def finish(self) -> None:
        """Commit a checkpoint that is still being written."""
        self._boundary.finish()


class StepHooks(StepHook):
    """Several hooks as one, each in its turn."""

    def __init__(self, hooks: Sequence[StepHook]):
        """Keep the hooks in the order in which they happen."""
        self._hooks = tuple(hooks)

    def at_start(self, progress: Progress) -> StopReason:
        """Begin with what is unfinished: step 0, or a step whose evaluation was interrupted."""
        if progress.evaluation_pending:
            return self.after_step(progress)
        return _first([hook.at_start(progress) for hook in self._hooks])

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        """All contexts, one within the other."""
        with ExitStack() as contexts:
            for hook in self._hooks:
                contexts.enter_context(hook.around_step(step))
            yield

    def metrics(self) -> dict[str, float]:
        """What all hooks add."""
        return {key: value for hook in self._hooks for key, value in hook.metrics().items()}

    def after_step(self, progress: Progress) -> StopReason:
        """Every hook, also when one of them stops the run."""
        return _first([hook.after_step(progress) for hook in self._hooks])

    def finish(self) -> None:
        """Finish all."""
        for hook in self._hooks:
            hook.finish()

    def close(self) -> None:
        """Close all."""
        for hook in self._hooks:
            hook.close()


def step_hooks(
    trainer: Trainer,
    held_out: HeldOut | None,
    total_steps: int,
    boundary: Boundary,
    observer: Observer | None,
    watchdog: Watchdog,
) -> StepHooks:
    """The hooks of a run, in the order in which they happen after a step."""
    announce = observer.writer.note if observer is not None else None
    checkpoint = trainer.config.checkpoint
    return StepHooks(
        (
            ProfileHook(trainer, announce),
            FirstStepHook(announcer_of(observer)),
            NoiseHook(trainer),
            EvaluationHook(trainer, held_out, total_steps, boundary, observer, watchdog),
            ReportHook(observer),
            CheckpointHook(boundary, checkpoint.interval, checkpoint.final, total_steps),
        )
    )


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Whether something that happens at every interval and at the end happens after a step; None: only at the end."""
    return step == total_steps or (interval is not None and step % interval == 0)


def evaluate_now(
    trainer: Trainer,
    held_out: HeldOut | None,
    step: int,
    observer: Observer | None,
    is_interrupted: Callable[[], bool] = lambda: False,
    count: Count = lambda _: None,
) -> dict[str, float] | None:
    """Held-out figures of the policy as it is.

    Args:
        held_out: None: there are none, and so no figures.
        is_interrupted: asked before each chunk of micro-batches, equally often on all ranks, which must answer alike.
        count: told of the rows that all replicas together have evaluated.
    Returns:
        `eval/*` figures by name; None if the evaluation was interrupted.
    Communication: that of `evaluate_chunk`, and one gathering of a few numbers per row.
    """
    if held_out is None:
        return {}
    parts = []
    with trainer.policy() as policy:
        for chunk in evaluation_chunks(held_out.rows, held_out.settings, trainer.groups.pipeline_size):
            if is_interrupted():
                return None
            parts.append(evaluate_chunk(policy, trainer.feature_network, chunk, held_out.settings))
            count(sum(len(rows.tokens) for rows in chunk) * trainer.groups.data_parallel_size)
    evaluation = gather(merge(parts), trainer.groups.data_parallel)
    if observer is not None:
        observer.show_blocks(step, evaluation)
    return evaluation.means


def _first(reasons: Sequence[StopReason]) -> StopReason:
    """The first reason to stop."""
    return next((reason for reason in reasons if reason), StopReason.NONE)
