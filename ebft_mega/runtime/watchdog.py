"""Watchdog thread: dump all stacks and exit when no progress was reported for too long."""

import datetime
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType

from ebft_mega.errors import EXIT_HANG

# Collectives give up later than the watchdog: it says where each thread waits, they only that they waited.
COLLECTIVE_MARGIN = datetime.timedelta(minutes=2)
# From the dump to the end of the process: peers that wait in the same collective dump their stacks in this time, and a
# full pipe or a dead file system cannot delay the end any further.
REPORT_SECONDS = 5.0
# A failed process whose libraries block its shutdown is ended after this time.
LEAVE_SECONDS = 60.0
LONGEST_NAP_SECONDS = 1.0
STANDARD_ERROR = 2


class Watchdog:
    """End this process with exit code 3 when `beat` was not called for too long.

    A thread, not a signal: a main thread that waits inside a collective handles no signals. Time is counted in naps of
    this thread, so a job that its scheduler suspends for an hour has not been hanging for an hour. What it cannot
    see is a thread that never releases the interpreter's lock; the watchdogs of the other ranks then end the job.

    Args:
        timeout: the longest time between two beats.
        log_path: file that the stacks are appended to, beside standard error; None: standard error alone.
        record: called once before the end; writes down the hang and returns the exit code that the run ends with.
    Communication: none, and it needs none: every rank of a job has its own.
    """

    def __init__(self, timeout: datetime.timedelta, log_path: Path | None, record: Callable[[], int]):
        self._timeout_seconds = timeout.total_seconds()
        # Opened now: a process that hangs may have no file descriptor left.
        self._log = _opened(log_path)
        self._record = record
        self._exit_code = EXIT_HANG
        self._beats = 0
        self._last_achievement = "start of the run"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._log is not None:
            self._log.close()

    def beat(self, achievement: str) -> None:
        """Start counting anew.

        Args:
            achievement: what has just ended, such as `step 12`.
        """
        self._last_achievement = achievement
        self._beats += 1

    def _watch(self) -> None:
        nap_seconds = min(LONGEST_NAP_SECONDS, self._timeout_seconds / 4)
        beats_seen, quiet_seconds = self._beats, 0.0
        while not self._stopped.wait(nap_seconds):
            quiet_seconds = quiet_seconds + nap_seconds if self._beats == beats_seen else 0.0
            beats_seen = self._beats
            if quiet_seconds >= self._timeout_seconds:
                self._end()

    def _end(self) -> None:
        """Report, in threads since any destination may be what the process hangs on, and end the process."""
        for report in (self._report_to_run_directory, self._report_to_standard_error):
            threading.Thread(target=report, daemon=True).start()
        time.sleep(REPORT_SECONDS)
        os._exit(self._exit_code)

    def _report_to_run_directory(self) -> None:
        try:
            if self._log is not None:
                self._dump(self._log.fileno())
        finally:
            self._exit_code = self._record()

    def _report_to_standard_error(self) -> None:
        self._dump(STANDARD_ERROR)

    def _dump(self, descriptor: int) -> None:
        # Not through logging, whose lock the thread that hangs may hold.
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        headline = (
            f"{now} watchdog of rank {os.environ.get('RANK', '0')}: nothing has ended for {self._timeout_seconds:g} s; "
            f"the last thing that ended: {self._last_achievement}. Stacks of all threads:\n"
        )
        os.write(descriptor, headline.encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)


def _opened(log_path: Path | None) -> FileIO | None:
    """A log file to append to; None where there is none, or it cannot be opened: there is standard error, too."""
    try:
        return open(log_path, "ab", buffering=0) if log_path else None
    except OSError:
        return None


def leave_soon() -> None:
    """Bound the time that a failed process takes to end: libraries may wait for peers while they shut down."""
    faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=STANDARD_ERROR)
