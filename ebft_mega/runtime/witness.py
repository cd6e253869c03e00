"""Let a small process beside this rank say how the rank died, should it be killed. Imports no torch."""

import json
import logging
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ebft_mega.io import process_signals
from ebft_mega.runtime import witness_process
from ebft_mega.runtime.witness_process import IDLE, LEFT, PHASE_BYTES, SHARED_BYTES, STATE_BYTE, WATCHED

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "Cannot allocate memory")


class Witness:
    """The process beside this rank, and the page of memory that both share: telling it something takes no system call.

    Args:
        rank: of this process; log_path: its log; status_path: the run's outcome.
        needs: by phase of a step, in words, what the plan needs for it.
    """

    def __init__(self, rank: int, log_path: Path, status_path: Path, needs: Mapping[str, str]):
        self.needs = dict(needs)
        self.phase = ""
        facts = {"rank": rank, "process": os.getpid(), "log": str(log_path), "status": str(status_path)}
        text = json.dumps({**facts, "needs": self.needs}).encode()
        assert len(text) <= SHARED_BYTES - PHASE_BYTES.stop, "paths and a few phases fit"
        descriptor = os.memfd_create("witness")
        try:
            os.truncate(descriptor, SHARED_BYTES)
            self._shared = mmap.mmap(descriptor, SHARED_BYTES)
            self._shared[PHASE_BYTES.stop : PHASE_BYTES.stop + len(text)] = text
            self._shared[STATE_BYTE] = IDLE
            self._process: subprocess.Popen[bytes] | None = _start(descriptor)
        finally:
            os.close(descriptor)

    def watch(self) -> None:
        """From now on a death without a word is told."""
        self._shared[STATE_BYTE] = WATCHED

    def leave(self) -> None:
        """This rank ends, or has said itself why it fails."""
        self._shared[STATE_BYTE] = LEFT

    def enter(self, phase: str) -> None:
        """Note the phase of the step that begins; empty: none."""
        self.phase = phase
        self._shared[PHASE_BYTES] = phase.encode()[:63].ljust(63, b"\0")

    def words_for(self, error: BaseException) -> str:
        """Say what the plan needs for the phase in which memory ran out; empty for an error of another kind."""
        text = str(error)
        if not isinstance(error, MemoryError) and not any(part in text for part in OUT_OF_MEMORY_TEXTS):
            return ""
        first = (text or "MemoryError").splitlines()[0][:300]
        needs = self.needs.get(self.phase, "")
        when = f"in phase {self.phase}" if self.phase else "outside of a phase of a step"
        return f"memory ran out {when}: {first}{needs and f'; {needs}'}"


def _start(descriptor: int) -> "subprocess.Popen[bytes] | None":
    """Start the process; a system that has no room for it has other worries than a missing witness."""
    command = [sys.executable, "-S", "-E", witness_process.__file__, str(descriptor), str(os.getpid())]
    nothing = subprocess.DEVNULL
    try:
        with process_signals.uninterrupted():
            # Blocked in the witness from its first moment on: launchers and terminals signal all that is there.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, process_signals.STOP_SIGNALS)
            try:
                return subprocess.Popen(command, stdin=nothing, stdout=nothing, pass_fds=(descriptor,))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    except OSError as error:
        logger.warning("no witness beside this rank: %s", error)
        return None


_current: Witness | None = None


@contextmanager
def watched_by(witness: Witness) -> Iterator[Witness]:
    """Let a witness watch this process during the block; phases are noted by `phase`."""
    global _current
    _current = witness
    witness.watch()
    try:
        yield witness
    finally:
        witness.leave()
        _current = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Tell the witness, if there is one, that the block is a phase of a step. One that raises stays the last one."""
    witness = _current
    if witness is None:
        yield
        return
    outer = witness.phase
    witness.enter(name)
    yield
    witness.enter(outer)
