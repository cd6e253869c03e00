"""How a run ends: the outcome in `status.json` and the exit code, the same on every rank."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import CHECKPOINTS, newest, step_of
from ebft_mega.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_STOPPED,
    DirectoryLostError,
    EbftError,
    InputProblems,
    LockLostError,
    PeerFailedError,
    PeerLostError,
    ResultsLostError,
    ShortageError,
)
from ebft_mega.io.parse_boundary import shortage
from ebft_mega.io.process_signals import StopNow
from ebft_mega.model.weights.weight_sources import SafetensorsWeights
from ebft_mega.parallel.lost_peers import is_lost_connection
from ebft_mega.runtime.run_files import (
    METRICS_NAME,
    MODEL_FOLDER,
    RunState,
    failure_on_record,
    record_failure,
    stop_on_record,
    write_status,
)
from ebft_mega.runtime.run_lock import Loss
from ebft_mega.train.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What this rank records of how the run ended."""

    output: Path  # the run directory
    lost: Callable[[], Loss] = lambda: Loss.NONE  # what has become of the run directory, as far as this rank knows
    progress: Progress = field(default_factory=Progress)  # set once it is known where the run starts
    begun_step: int = 0  # where this start of the run begins

    def begin(self, progress: Progress) -> None:
        """Note where the run starts; `progress` moves on with it."""
        self.progress, self.begun_step = progress, progress.step

    def of_end(self, stopped: bool, is_writer: bool) -> int:
        """Record that the run is done or stopped on request.

        Args:
            is_writer: whether this rank writes `status.json`.
        Returns:
            The exit code.
        Communication: none.
        """
        exit_code = EXIT_STOPPED if stopped else EXIT_DONE
        if is_writer:
            state: RunState = "stopped" if stopped else "done"
            write_status(self.output, state, exit_code, self.progress.step, self._newest_checkpoint())
        return exit_code

    def of_stop_at_start(self) -> None:
        """Record that the start was stopped on request and has changed nothing, unless an outcome is on record.

        Communication: none; every rank that is stopped does it, since the others may not be.
        """
        if not (self.lost() or failure_on_record(self.output) or stop_on_record(self.output)):
            checkpoint = self._newest_checkpoint()
            step = self.progress.step or (step_of(checkpoint) if checkpoint is not None else None) or 0
            write_status(self.output, "stopped", EXIT_STOPPED, step, checkpoint)

    def of_hang(self) -> int:
        """Record that nothing moves any more; returns the exit code on record."""
        return self._record_failure(EXIT_HANG)

    def of_error(self, error: BaseException) -> BaseException:
        """Record this rank's failure, unless another rank's is on record.

        Returns:
            What to raise: the error, or `PeerFailedError` or `PeerLostError` where it only follows from a peer's end.
        """
        if isinstance(error, StopNow):
            logger.info("stopped during the start by %s", error)
            self.of_stop_at_start()
            peer_code = failure_on_record(self.output)  # a launcher ends all ranks once one has failed
            return error if peer_code is None else PeerFailedError(peer_code)
        logger.info("this rank failed", exc_info=error)  # below a warning: it is on its way to standard error
        if isinstance(error, LockLostError | DirectoryLostError):
            return error  # the directory and the outcome in it are another run's, or there is none
        if not self.output.is_dir():  # whatever the error says, this is why
            return DirectoryLostError(f"{self.output}: {Loss.DIRECTORY.words}")
        # A rank whose peer failed loses its connection; the failure that the peer recorded is the cause.
        peer_code = failure_on_record(self.output) or stop_on_record(self.output)
        if peer_code is not None and not isinstance(error, EbftError):
            return PeerFailedError(peer_code)  # or was stopped, with 75
        self._record_failure(error.exit_code if isinstance(error, EbftError) else EXIT_FAILED)
        if is_lost_connection(error):
            return PeerLostError()
        words = None if isinstance(error, EbftError) else shortage(error)
        return error if words is None else ShortageError(words)

    def require_results(self, stopped: bool) -> None:
        """Check that what the outcome is about to promise is there.

        Args:
            stopped: whether the run stopped on request, and not at its end.
        Raises:
            ResultsLostError: the model or the metrics are missing or not whole, or the checkpoint to resume from.
            DirectoryLostError: there is no run directory any more.
        Communication: none.
        """
        if not self.output.is_dir():
            raise DirectoryLostError(f"{self.output}: {Loss.DIRECTORY.words}")
        lost = list(self._lost_checkpoint() if stopped else self._lost_results())
        if lost:
            raise ResultsLostError(f"at the end of the run: {'; '.join(lost)}")

    def _lost_checkpoint(self) -> Iterator[str]:
        name = self._newest_checkpoint()
        if self.progress.step != self.begun_step and (name is None or step_of(name) != self.progress.step):
            yield f"{self.output / CHECKPOINTS}: found {name or 'no checkpoint'}, not that of step {self.progress.step}"

    def _lost_results(self) -> Iterator[str]:
        directory = self.output / MODEL_FOLDER
        try:
            SafetensorsWeights(directory, Architecture.from_directory(directory))
        except InputProblems as error:
            yield str(error)
        if not (self.output / METRICS_NAME).is_file():
            yield f"{self.output / METRICS_NAME}: no such file"

    def _record_failure(self, exit_code: int) -> int:
        try:
            return record_failure(self.output, exit_code, self.progress.step, self._newest_checkpoint())
        except OSError:  # the disk may be what has failed
            logger.exception("the outcome could not be recorded")
            return exit_code

    def _newest_checkpoint(self) -> str | None:
        """Name of the run's newest checkpoint; None if there is none or none can be listed."""
        try:
            return newest(self.output / CHECKPOINTS)
        except OSError:  # must not hide the outcome that it is recorded with
            return None
