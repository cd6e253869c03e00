"""External save and stop requests: signals, files, the time limit, loss of the launcher. Imports no torch."""

import logging
import os
import shlex
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import psutil

from ebft_mega.errors import EXIT_STOPPED
from ebft_mega.io import process_signals
from ebft_mega.io.process_signals import ProcessSignals
from ebft_mega.runtime.launch_environment import DEEPSPEED, TORCHRUN, launching_program
from ebft_mega.shown_text import LONGEST_NOTE, shown

logger = logging.getLogger(__name__)

SAVE_NAME = "SAVE"
STOP_NAME = "STOP"
SECONDS_PER_MINUTE = 60.0
# After these signals to itself a launcher stops all ranks, and kills those that have not ended in time.
KILLED_AFTER = {
    DEEPSPEED: (signal.SIGINT, signal.SIGTERM),
    TORCHRUN: (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
}
KILLED_AFTER_SECONDS = 30
LAUNCHER_SECONDS = 3.0  # in which a launcher stops all ranks, once one of them has ended


class StopReason(IntEnum):
    """Why a run should stop. Where ranks have different reasons the greatest one is used by all."""

    NONE = 0
    TIME_LIMIT = 1
    STOP_FILE = 2
    LAUNCHER_GONE = 3
    SIGUSR1 = 4
    SIGHUP = 5
    SIGINT = 6
    SIGTERM = 7

    @property
    def words(self) -> str:
        """The reason in words, for messages."""
        return _WORDS[self]


_WORDS = {
    StopReason.NONE: "nothing",
    StopReason.TIME_LIMIT: "train.max_run_minutes",
    StopReason.STOP_FILE: f"the file {STOP_NAME}",
    StopReason.LAUNCHER_GONE: "the launcher is gone",
    StopReason.SIGUSR1: "SIGUSR1",
    StopReason.SIGHUP: "SIGHUP",
    StopReason.SIGINT: "SIGINT",
    StopReason.SIGTERM: "SIGTERM",
}


def words_when_noted(number: int, environment: Mapping[str, str], output_dir: Path) -> str:
    """What is said at a signal in training: what happens, and what the launcher does where it got the signal, too.

    Whether it did a rank cannot tell: Ctrl-C in a terminal reaches both, `kill` one of them.

    Args:
        number: of the signal.
        environment: of this process.
        output_dir: in which a file STOP asks for a stop that no launcher hears of.
    """
    words, again = "the step under way ends first, then a checkpoint is written", "a second Ctrl-C within 5 s ends"
    program = launching_program(environment)
    if number in KILLED_AFTER.get(program, ()):
        stop = f"touch {shlex.quote(str(output_dir / STOP_NAME))}"
        words += (
            f", unless that takes more than {KILLED_AFTER_SECONDS} s and {program} was sent the signal, too: it kills "
            f"the ranks then, and what they did since the last checkpoint is lost (the safe way to stop: {stop})"
        )
    return shown(f"{words}; {again} at once without one", LONGEST_NOTE)


class Launcher:
    """The processes that started this rank. Their end is a stop request: nobody is left to pass on another one.

    These are the parent and, under the `deepspeed` command, the parent's parent: that command starts a
    `deepspeed.launcher.launch`, which starts the ranks, and a signal that ends the command leaves the others running.
    Never a process further up: a job outlives the shell that it was started from.

    Args:
        parent: of this process; None: no launcher is watched.
        command_pid: of the `deepspeed` command; None where the parent is another launcher.
    """

    def __init__(self, parent: psutil.Process | None = None, command_pid: int | None = None):
        self._parent = parent
        self._command_pid = command_pid

    @classmethod
    def of_this_rank(cls) -> "Launcher":
        """Find the launcher of this process; without RANK in the environment there is none, and nothing is watched."""
        if "RANK" not in os.environ:
            return cls()
        try:
            parent = psutil.Process(os.getppid())
            command = parent.parent() if "deepspeed.launcher.launch" in parent.cmdline() else None
            if command is not None and any(Path(part).name == "deepspeed" for part in command.cmdline()[:2]):
                return cls(parent, command.pid)
        except psutil.Error:  # it is just ending, or belongs to another user
            return cls()
        return cls(parent)

    @property
    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        if self._parent is None:
            return False
        if os.getppid() != self._parent.pid:
            return True
        try:
            return self._command_pid is not None and self._parent.ppid() != self._command_pid
        except psutil.Error:
            return True


class Signals:
    """The signals that ask this rank to stop, and the loss of its launcher. Without `listen` there are none.

    Until `train_from_now_on` a signal, or the loss of the launcher, ends the start within five seconds by raising
    `StopNow`: nothing is lost, because nothing has been trained. From then on it is noted, and ranks agree on it.
    """

    def __init__(self, launcher: Launcher | None = None, process: ProcessSignals | None = None) -> None:
        self._process = process or ProcessSignals()  # one that does not listen
        self._launcher = launcher or Launcher()
        self.earlier_files: dict[str, _Identity] = {}
        self._output_dir = Path()

    @classmethod
    def listen(cls) -> "Signals":
        """Answer signals from now on, and remember which processes have started this one.

        Call it in the main thread, before anything that takes long. A forked child inherits the handlers, but not what
        they note.

        Raises:
            StopNow: from now on, at any place.
        """
        launcher, process = Launcher.of_this_rank(), process_signals.listen(EXIT_STOPPED)
        process.is_orphaned = lambda: launcher.is_gone
        process.raise_from_now_on()
        return cls(launcher, process)

    def remember_files(self, output_dir: Path) -> None:
        """Remember the files SAVE and STOP that are there already: they were meant for an earlier run."""
        self._output_dir = output_dir
        found = {name: _identity(output_dir / name) for name in (SAVE_NAME, STOP_NAME)}
        self.earlier_files = {name: identity for name, identity in found.items() if identity is not None}

    def train_from_now_on(self) -> None:
        """Only note signals: the start is over.

        Raises:
            StopNow: one has come before.
        """
        if os.environ.get("RANK", "0") == "0":  # one rank speaks for the job
            self._process.words_when_noted = lambda number: words_when_noted(number, os.environ, self._output_dir)
        self._process.note_from_now_on()

    @contextmanager
    def stopped_with_peers(self) -> Iterator[None]:
        """Wait a moment at the loss of a connection: where another rank was stopped, the launcher stops this one, too.

        For the time before there is a run directory in which the other one can say so.

        Raises:
            StopNow: this rank was stopped as well.
        """
        try:
            yield
        except RuntimeError:
            if "RANK" in os.environ:
                time.sleep(LAUNCHER_SECONDS)
            raise

    def fail_undisturbed(self) -> None:
        """Raise nothing any more: this rank has failed and records how."""
        self._process.finish_without_interruption()

    def done(self) -> None:
        """Ignore signals: the outcome is recorded, and the process ends."""
        self._process.ignore_from_now_on()

    def before_forced_end(self, act: Callable[[], object]) -> None:
        """Let something be done when a start that is asked to stop does not end by itself."""
        self._process.before_forced_end(act)

    def before_end_at_once(self, act: Callable[[], object]) -> None:
        """Let something be done, which must not wait for anything, before a second Ctrl-C ends this process."""
        self._process.before_end_at_once(act)

    def release(self) -> None:
        """Put the handlers back that were there before."""
        self._process.release()

    @property
    def received(self) -> StopReason:
        """The strongest signal so far, `NONE` if there was none. A second one of the same kind changes nothing."""
        noted = tuple(self._process.noted)
        return max((StopReason[signal.Signals(number).name] for number in noted), default=StopReason.NONE)

    @property
    def launcher_is_gone(self) -> bool:
        """Whether the processes that have started this rank have ended."""
        return self._launcher.is_gone


class _Identity(NamedTuple):
    """Changes when a file is made anew or touched, whatever the clocks of machines say meanwhile."""

    inode: int
    mtime_ns: int
    mode: int


class StopRequests:
    """The stop and save requests that this rank knows of; all ranks have to agree on them before acting.

    Args:
        signals: of this process.
        output_dir: the run directory, in which people create the files SAVE and STOP; None: there are none.
        started_monotonic: `time.monotonic()` when the process started.
        max_run_minutes: time after which to stop; None: no limit.
        watches_files: whether this rank looks for the files; one of the job is enough.
    """

    def __init__(
        self,
        signals: Signals,
        output_dir: Path | None,
        started_monotonic: float,
        max_run_minutes: float | None,
        watches_files: bool,
    ):
        self._signals = signals
        self._directory = output_dir if watches_files else None
        self._started = started_monotonic
        self._limit_seconds = None if max_run_minutes is None else max_run_minutes * SECONDS_PER_MINUTE
        # Files that could not be deleted: the request was served, and must not be served again at every step.
        self._served: dict[str, _Identity] = {}

    def stop_reason(self) -> StopReason:
        """The strongest stop request that this rank knows of, `NONE` without any. Costs a few system calls."""
        reason = self._signals.received
        if self._signals.launcher_is_gone:
            reason = max(reason, StopReason.LAUNCHER_GONE)
        if self._is_requested(STOP_NAME):
            reason = max(reason, StopReason.STOP_FILE)
        if self._limit_seconds is not None and time.monotonic() - self._started >= self._limit_seconds:
            reason = max(reason, StopReason.TIME_LIMIT)
        return reason

    def save_requested(self) -> bool:
        """Whether somebody has created the file SAVE."""
        return self._is_requested(SAVE_NAME)

    def take_save(self) -> None:
        """Delete the file SAVE; to be called when the checkpoint begins, so that a later request stays."""
        self._take(SAVE_NAME)

    def take_stop(self) -> None:
        """Delete the file STOP, so that the next start does not stop at once."""
        self._take(STOP_NAME)

    def clear(self) -> list[str]:
        """Delete the files SAVE and STOP that were there when this process started: requests to an earlier run.

        Returns:
            Names of the files.
        """
        leftovers = []
        for name, identity in self._signals.earlier_files.items():
            if not stat.S_ISREG(identity.mode):
                continue
            if self._directory is not None and _identity(self._directory / name) == identity:
                self._take(name)
                leftovers += [name] * (name not in self._served)
        return leftovers

    def _is_requested(self, name: str) -> bool:
        if self._directory is None:
            return False
        path = self._directory / name
        identity = _identity(path)
        if identity is None or identity == self._served.get(name):
            return False
        if not stat.S_ISREG(identity.mode):  # nothing that a person makes by `touch`, or that could be deleted as such
            self._served[name] = identity
            logger.warning("%s is no plain file and asks for nothing", path)
            return False
        return True

    def _take(self, name: str) -> None:
        if self._directory is None:
            return
        path = self._directory / name
        identity = _identity(path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if identity is not None:
                self._served[name] = identity
            logger.warning("%s has been read, but cannot be deleted (%s): touch it to be heard again", path, error)


def _identity(path: Path) -> _Identity | None:
    """What is there, links not followed; None if nothing is."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return _Identity(status.st_ino, status.st_mtime_ns, status.st_mode)
