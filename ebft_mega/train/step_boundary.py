"""Between two steps: ranks exchange stop and save requests, and checkpoints are begun and committed."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ebft_mega.checkpoint.saver import CheckpointSaver, Outcome
from ebft_mega.checkpoint.snapshot import StateShard, critic_shards
from ebft_mega.checkpoint.tensor_index import STATE_BYTES
from ebft_mega.errors import CheckpointError, DirectoryLostError, LockLostError
from ebft_mega.io.progress_bar import BYTES
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.runtime.run_lock import LOCK_NAME, Loss
from ebft_mega.runtime.stop_requests import StopReason, StopRequests
from ebft_mega.train.progress import Progress
from ebft_mega.train.trainer import Trainer

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0  # between two looks at how far the writing of a checkpoint has come


@dataclass(frozen=True)
class Agreed:
    """What any rank was asked for or still does, the same on every rank."""

    stop: StopReason
    save: bool
    is_writing: bool


class Boundary:
    """What a run does between two optimizer steps, beside evaluating.

    Args:
        trainer: whose state is saved.
        saver: writes checkpoints.
        requests: what this rank is asked for.
        lost: what this rank knows to have become of the run directory.
        small_files: contents of the files of a checkpoint beside its tensors, when it begins.
        announcer: shows lines to people, on one rank.
        beat: told that something moves while the run waits for disks.
        begun: where this start of the run begins; to stop there needs no checkpoint.
        saved: the same, if that very state lies in its own run directory.
    Communication: every method is collective over the world.
    """

    def __init__(
        self,
        trainer: Trainer,
        saver: CheckpointSaver,
        requests: StopRequests,
        lost: Callable[[], Loss],
        small_files: Callable[[Progress], Mapping[str, bytes]],
        announcer: Announcer,
        beat: Callable[[str], None],
        begun: Progress,
        saved: Progress | None,
    ):
        self._trainer, self._saver, self._requests = trainer, saver, requests
        self._lost = lost
        self._small_files = small_files
        self._announcer, self._beat = announcer, beat
        self._saved = None if saved is None else _key(saved)  # state of the newest checkpoint, begun or complete
        self._begun = _key(begun)
        self._stop = StopReason.NONE
        self._seconds = 0.0

    def stop_requested(self, progress: Progress) -> bool:
        """Whether the run is to stop, asked in the middle of an evaluation; a requested checkpoint is taken.

        Args:
            progress: after the last step, with what the evaluation belongs to still pending.
        Communication: one all-reduce of four int64 over the world, and that of a checkpoint that begins.
        """
        agreed = self._agree()
        if agreed.save and not agreed.stop:
            self._requests.take_save()
            self._save(progress)
        return agreed.stop != StopReason.NONE

    def cross(self, progress: Progress, is_due: bool) -> StopReason:
        """Do what has to be done before the next step.

        Args:
            progress: after the last step.
            is_due: a checkpoint was to be taken here.
        Returns:
            Why the run stops here, with its state in a complete checkpoint unless it has not begun; NONE: it continues.
        Raises:
            CheckpointError: a checkpoint failed, and the run was to stop with it or cannot do without it.
            LockLostError: another run has the directory now; nothing more is written there.
            DirectoryLostError: there is no such directory any more.
        Communication: one all-reduce of four int64 over the world; when a checkpoint is begun or committed, that of
            `CheckpointSaver.begin` and `settle`.
        """
        started = time.perf_counter()
        agreed = self._agree()
        if self._saver.in_flight and not agreed.is_writing:
            self._settle()
        is_stopping = self._stop != StopReason.NONE
        needs_checkpoint = is_stopping and _key(progress) != self._begun
        if agreed.save:
            self._requests.take_save()
        if is_due or agreed.save or needs_checkpoint:
            self._save(progress)
        if is_stopping:
            self._settle(is_last=True)
            if self._saved is None and needs_checkpoint:
                reason = f"the run was asked to stop ({self._stop.words}) at step {progress.step}"
                raise CheckpointError(f"{reason}, and its state could not be saved")
            self._requests.take_stop()
        self._seconds += time.perf_counter() - started
        return self._stop

    def finish(self) -> None:
        """Commit a checkpoint in flight, at the end of the run.

        Raises:
            CheckpointError: as for `cross`.
        """
        self._settle(is_last=True)
        self._saver.finish()

    def take_seconds(self) -> float:
        """Time that the run has spent here since it was last asked, in seconds. Communication: none."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _agree(self) -> Agreed:
        """Hear what all ranks are asked for; a rank that was asked to stop is enough."""
        requests = self._requests
        own = (requests.stop_reason(), requests.save_requested(), self._saver.is_writing, self._lost())
        heard = torch.tensor(own, dtype=torch.long, device=self._trainer.groups.device)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        stop, save, is_writing, lost = heard.tolist()
        if lost:
            message = f"{self._trainer.config.output_dir}: {Loss(lost).words}"
            raise LockLostError(f"{message}: see its {LOCK_NAME}") if lost == Loss.LOCK else DirectoryLostError(message)
        if stop and not self._stop:
            self._stop = StopReason(stop)
            logger.warning("asked to stop: %s", self._stop.words)
        return Agreed(self._stop, bool(save), bool(is_writing))

    def _save(self, progress: Progress) -> None:
        """Begin a checkpoint, unless this very state has one."""
        if self._saved == _key(progress):
            return
        self._settle()
        self._saved = _key(progress)
        words = f"copying the state to host memory for a checkpoint, {self._size_words}"
        with self._announcer.of_part(f"step {progress.step}").phase(words, is_announced=False):
            trainer, small_files = self._trainer, self._small_files(progress)
            others: tuple[StateShard, ...] = ()
            if trainer.critic is not None:
                others = critic_shards(trainer.critic.state, trainer.own_channels, trainer.groups)
            failure = self._saver.begin(
                progress.step, trainer.engine, trainer.stage, small_files, others, self._critic_bytes
            )
        if failure is not None:
            self._report(failure)

    @property
    def _size_bytes(self) -> int:
        """Size of a checkpoint's tensors."""
        kinds = len(self._trainer.engine.state_kinds)
        return self._trainer.stage.architecture.num_parameters * STATE_BYTES * kinds + self._critic_bytes

    @property
    def _critic_bytes(self) -> int:
        record = self._trainer.critic_record
        return 0 if record is None else record.num_bytes

    @property
    def _size_words(self) -> str:
        return f"{self._size_bytes / 1e9:.3f} GB"

    def _settle(self, is_last: bool = False) -> None:
        """Wait until all ranks have written, and commit the checkpoint in flight.

        Args:
            is_last: the run ends with it.
        Communication: an all-reduce of two int64 over the world about every second, then that of
            `CheckpointSaver.settle`.
        """
        if not self._saver.in_flight:
            return
        step = self._saved[0] if self._saved is not None else 0
        announcer = self._announcer.of_part("end" if is_last else f"step {step}")
        words = f"waiting until the checkpoint of step {step} is written, {self._size_words}"
        with announcer.phase(words, self._size_bytes, BYTES, is_announced=is_last) as count:
            seen, is_writing = -1, True
            while is_writing:
                self._saver.wait(PATIENCE_SECONDS)
                own = (self._saver.is_writing, self._saver.written_bytes)
                heard = torch.tensor(own, dtype=torch.long, device=self._trainer.groups.device)
                dist.all_reduce(heard)
                is_writing, written = heard.tolist()
                if written != seen:
                    self._beat("writing of a part of a checkpoint")
                    count(written - max(seen, 0))
                    seen = written
            outcome = self._saver.settle()
        if outcome is not None:
            self._report(outcome)

    def _report(self, outcome: Outcome) -> None:
        """Tell of a checkpoint; one that failed is as if it had never begun."""
        if outcome.error is None:
            size = f"{outcome.num_bytes / 1e9:.3f} GB in {outcome.seconds:.1f} s"
            self._announcer.note(f"checkpoint of step {outcome.step}: complete, {size}")
            return
        self._saved = None
        logger.error("checkpoint of step %d failed: %s", outcome.step, outcome.error)
        self._announcer.note(f"checkpoint of step {outcome.step} FAILED: {outcome.error}")
        if self._trainer.config.checkpoint.on_error == "stop":
            raise CheckpointError(f"the checkpoint of step {outcome.step} could not be written: {outcome.error}")


def _key(progress: Progress) -> tuple[int, bool]:
    """What of a state can change while the weights stay the same: the evaluation after a step comes later."""
    return progress.step, progress.pending is None
