"""Processes that work for this one: they leave the signals of a person or a launcher to it, and never outlive it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ebft_mega.io.process_signals import STOP_SIGNALS, uninterrupted

PARENT_CHECK_SECONDS = 1.0  # how often a child looks whether its parent still runs


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals that ask for a stop in this thread, and with it in the processes that are started meanwhile.

    A child begins with what its parent blocks, so none of them is delivered before it is ready for it. To this process
    they are delivered afterwards, or at once in another thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with uninterrupted():  # a child that has not got all it needs would complain
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_parent_only(parent: int) -> None:
    """Make a process that was started with signals blocked end when its parent ends, or sends it a SIGTERM itself.

    With that one torch and Python terminate a worker that does not exit by itself, and then wait for it. Terminals and
    launchers may send signals to all processes of a job; only the parent answers them.

    Args:
        parent: process id, from before this process was started: the parent may have been killed since, and whatever
            process adopts its children must not be taken for it.
    """

    def watch() -> None:
        while True:
            received = signal.sigtimedwait([signal.SIGTERM], PARENT_CHECK_SECONDS)
            if os.getppid() != parent or (received is not None and received.si_pid == parent):
                os._exit(0)

    # The signals stay blocked, as they were in the parent when it started this process.
    threading.Thread(target=watch, name="worker-signals", daemon=True).start()
