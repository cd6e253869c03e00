"""Signals that ask this process to stop, by one rule for ranks and tools. Imports next to nothing: it comes first.

Four signals ask for a stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP (a terminal that closes) and SIGUSR1 (a time limit that
comes near). What becomes of one depends on what the process is doing, its `Mode`. Two things hold in every mode: a
signal that was ignored when the process started stays ignored (`nohup`), and a second Ctrl-C within five seconds ends
the process at once.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from types import FrameType
from typing import Any, NoReturn

from ebft_mega.io.standard_streams import fill_closed_descriptors

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# Batch scripts shield launchers from SIGUSR1 by ignoring it; ranks that inherit this answer it all the same.
ALWAYS_ANSWERED = (signal.SIGUSR1,)
AGAIN_SECONDS = 5.0  # within which a second Ctrl-C ends the process
# torchrun's agent hands the SIGINT on that a terminal has sent to the whole process group: one Ctrl-C comes twice.
ECHO_SECONDS = 0.5
LEAVE_SECONDS = 3.5  # from a signal to the forced end of a process whose main thread does not leave
ENDING_SECONDS = 0.5  # for what is done before a forced end
LOOK_SECONDS = 1.0  # between two looks whether the launcher has gone
SHELL_OFFSET = 128  # a shell's exit code of a process that a signal has ended is this and the signal's number


class StopNow(BaseException):  # noqa: N818 (no error), and no Exception, so that nothing but its own handler takes it
    """The process was asked to stop and can at once, because nothing that it does has to be finished first."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Mode(Enum):
    """What a signal does."""

    EXIT = "ends the process where it is: while modules are imported"
    RAISE = "raises StopNow in the main thread, whatever it waits for: before the first step, and in tools"
    NOTE = "is noted, and the process asks for it when it suits: between steps"


class ProcessSignals:
    """The handlers of this process, and a thread that hears signals when the main thread cannot.

    Python runs handlers in the main thread, which may be in a collective, in a long computation or in a system call
    that never returns. The thread ends the process by `os._exit` when the main thread has not left in time.

    Args:
        exit_code: of a process that a signal has stopped; None: 128 and the number of the signal.
    """

    def __init__(self, exit_code: int | None = None):
        self.exit_code = exit_code
        self.mode = Mode.EXIT
        self.is_orphaned: Callable[[], bool] = lambda: False  # whether whoever would pass a signal on has gone
        self.noted: dict[int, float] = {}  # signals so far and when each came last, by time.monotonic()
        # Of the number of the first signal that is only noted: what is then said, once.
        self.words_when_noted: Callable[[int], str] | None = None
        self._before_end: list[Callable[[], object]] = []
        self._before_end_at_once: list[Callable[[], object]] = []
        self._raised: int | None = None  # the signal that has raised StopNow
        self._uninterrupted = 0  # contexts that must not be left half way
        self._put_off: int | None = None  # the signal that came in one of them
        self._swallowed = False  # it was raised where nothing can be raised, such as in a destructor
        self._deadline: float | None = None
        self._last_interrupt: float | None = None
        self._process = os.getpid()
        self._replaced: dict[int, Any] = {}

    def listen(self) -> "ProcessSignals":
        """Install the handlers; call it in the main thread. A forked child inherits them and ends by a signal."""
        fill_closed_descriptors()  # the pipe would get their numbers, and then what is printed
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._replaced_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._replaced_hook, sys.unraisablehook = sys.unraisablehook, self._take_swallowed
        for number in STOP_SIGNALS:
            if number in ALWAYS_ANSWERED or signal.getsignal(number) is not signal.SIG_IGN:
                # System calls of the main thread return with EINTR, so that the handler runs.
                self._replaced[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Put everything back as it was."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        if self._replaced:
            signal.set_wakeup_fd(self._replaced_wakeup)
            sys.unraisablehook = self._replaced_hook
            os.close(self._writer)
            self._thread.join()
            os.close(self._reader)
        self._replaced.clear()

    def raise_from_now_on(self) -> None:
        """Let signals raise `StopNow` in the main thread.

        Raises:
            StopNow: one has come already.
        """
        self.mode = Mode.RAISE

    def note_from_now_on(self) -> None:
        """Only note signals. System calls of libraries are restarted, whether these expect interruptions or not.

        Raises:
            StopNow: one was raised before, and something has swallowed it.
        """
        if self._raised is not None:
            raise StopNow(self._raised)
        self.mode = Mode.NOTE
        for number in self._replaced:
            signal.siginterrupt(number, False)

    def finish_without_interruption(self) -> None:
        """Raise nothing any more: this process is ending. One that leaves because of a signal keeps its time limit."""
        if self._raised is None:
            self.mode = Mode.NOTE

    def ignore_from_now_on(self) -> None:
        """Ignore signals: everything is done and recorded, and the interpreter ends."""
        self.mode = Mode.NOTE
        for number in self._replaced:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Put `StopNow` off until the end of the block, which is short: a process is started in it, say."""
        self._uninterrupted += 1
        try:
            yield
        finally:
            self._uninterrupted -= 1
        if self._put_off is not None and not self._uninterrupted and self._raised is None:
            self._raise(self._put_off)

    def before_forced_end(self, act: Callable[[], object]) -> None:
        """Let something be done when the process has to be ended because its main thread does not leave."""
        self._before_end.append(act)

    def before_end_at_once(self, act: Callable[[], object]) -> None:
        """Let something be done, which must not wait for anything, before a second Ctrl-C ends the process."""
        self._before_end_at_once.append(act)

    def code_of(self, number: int) -> int:
        """The exit code of a process that this signal has stopped."""
        return SHELL_OFFSET + number if self.exit_code is None else self.exit_code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork that has no rule of its own
            os._exit(SHELL_OFFSET + number)
        self.noted[number] = time.monotonic()
        if self.mode is Mode.EXIT:
            _say(_stopped_by(number))
            os._exit(self.code_of(number))
        if self.mode is Mode.RAISE and self._raised is None:
            if self._uninterrupted:
                self._put_off = number
            else:
                self._raise(number)

    def _raise(self, number: int) -> None:
        self._raised = number
        raise StopNow(number)

    def _take_swallowed(self, unraisable: Any) -> None:
        if unraisable.exc_type is StopNow:
            self._swallowed = True
        else:
            self._replaced_hook(unraisable)

    def _watch(self) -> None:
        while True:
            if not self._wait():
                return
            if self.mode is Mode.NOTE:
                self._deadline = None
            elif self._deadline is not None and time.monotonic() >= self._deadline:
                self._end()
            elif self._deadline is None and self.mode is Mode.RAISE and self.is_orphaned():
                os.kill(self._process, signal.SIGTERM)
            elif self._swallowed and self._raised is not None:
                self._raised, self._swallowed = None, False
                os.kill(self._process, signal.SIGTERM)  # raised again; never a second Ctrl-C

    def _wait(self) -> bool:
        """Wait for signals or for the time to look after something; False: the handlers have been released."""
        seconds = LOOK_SECONDS if self._deadline is None else 0.1
        if select.select([self._reader], [], [], None if self.mode is Mode.NOTE else seconds)[0]:
            numbers = os.read(self._reader, 4096)
            if not numbers:
                return False
            for number in numbers:
                self._hear(number)
        return True

    def _hear(self, number: int) -> None:
        if number not in self._replaced:
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            echo_seconds = ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
            if self._last_interrupt is not None and echo_seconds <= now - self._last_interrupt < AGAIN_SECONDS:
                self._end_at_once(number)
            self._last_interrupt = now
        if self.mode is Mode.NOTE and self.words_when_noted is not None:
            words, self.words_when_noted = f"{signal.Signals(number).name}: {self.words_when_noted(number)}", None
            threading.Thread(target=_say, args=(words,), daemon=True).start()  # whose reader may stand still
        if self._deadline is None:
            self._deadline, self._number = now + LEAVE_SECONDS, number

    def _end_at_once(self, number: int) -> NoReturn:
        for before_end in self._before_end_at_once:
            before_end()
        thread = threading.Thread(target=_say, args=("ended at once by a second Ctrl-C",), daemon=True)
        thread.start()
        thread.join(ENDING_SECONDS)
        os._exit(SHELL_OFFSET + number)

    def _end(self) -> None:
        """End the process; what is done before may hang on a file system or a full pipe, as the main thread does."""

        def act() -> None:
            _say(_stopped_by(self._number))
            for before_end in self._before_end:
                before_end()

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(ENDING_SECONDS)
        os._exit(self.code_of(self._number))


def _stopped_by(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}"


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{words}\n".encode())


_current: ProcessSignals | None = None


def listen(exit_code: int | None = None) -> ProcessSignals:
    """The handlers of this process, installed by the first call.

    Args:
        exit_code: see `ProcessSignals`.
    """
    global _current
    if _current is None or not _current._replaced:
        _current = ProcessSignals(exit_code).listen()
    return _current


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """A block that no signal leaves half way; see `ProcessSignals.uninterrupted`."""
    return contextlib.nullcontext() if _current is None else _current.uninterrupted()


def leave(code: int) -> NoReturn:
    """End a process that was asked to stop, with all that it has printed and nothing that libraries do at an end.

    They may wait for peers, and complain of what was interrupted.
    """
    if "multiprocessing.util" in sys.modules:  # hands semaphores back, of which the system would say that they leak
        sys.modules["multiprocessing.util"]._run_finalizers(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


_forking = threading.local()  # the mask of a thread that is forking


def _before_fork() -> None:
    # Until it has forgotten the pipe, a fork would tell its parent of what it is sent itself, and not know of it.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    global _current
    if _current is not None and _current._replaced:
        signal.set_wakeup_fd(-1)
    _current = None
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
