"""The lock of a run directory: one run writes to it at a time; a dead run's lock is taken over. Imports no torch."""

import contextlib
import hashlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from types import TracebackType

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.durable import write_bytes

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0  # ten heartbeats
# Each failed attempt means that another process took the lock meanwhile; so many in a row do not happen.
MAX_ATTEMPTS = 10
# Between looks at a lock file that is missing or damaged, until that is believed.
LOOK_AGAIN_SECONDS = (0.1, 1.0)


class Loss(IntEnum):
    """What a run may lose while it runs. Where ranks know different things the greatest one counts for all."""

    NONE = 0
    DIRECTORY = 1
    LOCK = 2

    @property
    def words(self) -> str:
        """What has happened, for messages."""
        return _LOSSES[self]


_LOSSES = {
    Loss.NONE: "the run has its directory",
    Loss.DIRECTORY: "the run directory was removed or renamed while the run was running",
    Loss.LOCK: "another run has taken the run directory over",
}


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file describes it."""

    host: str
    pid: int
    started: str  # UTC, ISO 8601
    token: str  # no two holders have the same
    process_start: int | None  # ticks between the machine's boot and the start of the process
    boot: str | None  # one boot of one machine; None where the system does not say
    pid_namespace: str | None  # process numbers mean something within it only
    slurm_job_id: str | None
    slurm_restart_count: int

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Describe this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
            process_start=process_start(os.getpid()),
            boot=boot_of_machine(),
            pid_namespace=_pid_namespace(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            slurm_restart_count=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    @classmethod
    def from_json(cls, text: str) -> "Holder | None":
        """The holder that a lock file describes; None if it does not describe one."""
        try:
            content = json.loads(text)
            holder = cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return holder if type(holder.pid) is int and type(holder.slurm_restart_count) is int else None

    def to_json(self) -> str:
        """The contents of the lock file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        job = f" of Slurm job {self.slurm_job_id}" if self.slurm_job_id is not None else ""
        return f"process {self.pid} on {self.host}{job}, started {self.started}"

    def lives_beside(self, other: "Holder") -> bool | None:
        """Whether the holder is running; None where `other`, the asking process, cannot see its processes."""
        if self.boot is None or (self.boot, self.pid_namespace) != (other.boot, other.pid_namespace):
            return None
        return self.process_start is not None and process_start(self.pid) == self.process_start

    def was_requeued_as(self, other: "Holder") -> bool:
        """Whether `other` is a later start of the same Slurm job, which means that the holder has ended."""
        is_same_job = self.slurm_job_id is not None and self.slurm_job_id == other.slurm_job_id
        return is_same_job and self.slurm_restart_count < other.slurm_restart_count


@dataclass(frozen=True)
class _Found:
    """A lock file at the moment it was judged."""

    text: str
    mtime_ns: int


class RunLock:
    """Hold `<output_dir>/run.lock` for one process of a run, within a `with` statement.

    A lock whose process is known to have ended is taken over: this machine does not run it any more, or Slurm has
    requeued its job. Processes on other machines or in other containers cannot be seen; their lock is taken over when
    its file, which the holder touches every 30 seconds, is five minutes old. Both times come from the file system, so
    the clocks of machines need not agree. Of two processes that take over at once only one succeeds.

    Args:
        output_dir: the run directory, which exists.
    Raises:
        InputError: on entering: another run holds the directory, or the lock cannot be written.
    """

    def __init__(self, output_dir: Path):
        self._path = output_dir / LOCK_NAME
        self._holder = Holder.of_this_process()
        self._notes: list[str] = []
        self._leaving = threading.Event()
        self._looking = threading.Lock()  # the heartbeat and the run look, too
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self._acquire()
        except OSError as error:
            found = f"a file that cannot be made, read or replaced ({error.strerror})"
            raise InputError([Problem(str(self._path), "output_dir", found, "a writable directory")]) from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        self.delete()

    def delete(self) -> None:
        """Delete the lock file, unless another run has it; for a process that is ended without leaving."""
        self._leaving.set()
        try:
            found = self._found()
            if found is Loss.LOCK:
                logger.warning("%s is another run's by now and stays", self._path)
            elif found is Loss.NONE:
                self._path.unlink(missing_ok=True)
        except OSError as failure:
            logger.warning("%s cannot be deleted (%s); the next start takes it over", self._path, failure)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user: which lock was taken over, and why."""
        return tuple(self._notes)

    @property
    def lost(self) -> Loss:
        """What has become of the lock; a lock file that was only deleted or damaged is made anew.

        Reads one small file. A file system that does not answer is no loss, and no lock of another rank is this one's.
        """
        if self._thread.ident is None:
            return Loss.NONE
        with self._looking:
            for wait_seconds in (0.0, *LOOK_AGAIN_SECONDS):
                # A name may be missing for a moment (a file system that is mounted anew), or a file empty.
                time.sleep(wait_seconds)
                found = self._found()
                if found in (Loss.NONE, Loss.LOCK):
                    return found or Loss.NONE
            if not self._path.parent.is_dir():
                return Loss.DIRECTORY
            return Loss.NONE if self._leaving.is_set() else self._restored()

    def _found(self) -> Loss | None:
        """What the lock file says; None: that no run has the directory, because it is missing or damaged."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError:
            return Loss.NONE
        if text == self._holder.to_json():
            return Loss.NONE
        return None if Holder.from_json(text) is None else Loss.LOCK

    def _restored(self) -> Loss:
        """Make the lock file anew where it is missing or damaged; another start that is quicker has the lock."""
        try:
            if not self._create(self._path):
                return self._replaced_damaged()
        except OSError:  # a full disk
            return Loss.NONE
        logger.warning("%s was deleted while the run was running: made anew", self._path)
        return Loss.NONE

    def _replaced_damaged(self) -> Loss:
        found = self._found()
        if found is not None:
            return found
        write_bytes(self._path, self._holder.to_json().encode())
        logger.warning("%s was damaged while the run was running: made anew", self._path)
        return Loss.NONE

    def _acquire(self) -> None:
        for _ in range(MAX_ATTEMPTS):
            if self._create(self._path):
                return
            found = _find(self._path)
            if found is not None:
                reason = self._reason_to_take(found)
                if self._take_over(found):
                    holder = Holder.from_json(found.text)
                    self._notes.append(f"took over the lock of {holder or 'an unknown run'}: {reason}")
                    return
        raise InputError([self._problem("many starts at once", "one run at a time")])

    def _create(self, path: Path) -> bool:
        """Make a file that names this process; False if there is one."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self._holder.to_json())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _reason_to_take(self, found: _Found) -> str:
        """Why a lock may be taken over.

        Raises:
            InputError: it may not.
        """
        holder = Holder.from_json(found.text)
        if holder is not None:
            lives = holder.lives_beside(self._holder)
            if lives:
                expected = "another output_dir, or the end of that run"
                raise InputError([self._problem(f"the lock of {holder}, which is running", expected)])
            if lives is False:
                return "that process has ended"
            if holder.was_requeued_as(self._holder):
                return "its job was requeued"
        age_seconds = self._age_seconds(found)
        if age_seconds >= STALE_SECONDS:
            return f"it was not renewed for {age_seconds:.0f} s"
        left_seconds = STALE_SECONDS - age_seconds
        whose = f"of {holder}" if holder is not None else "of a run that it does not name"
        expected = (
            f"another output_dir, or the end of that run; if it has ended without a word, start again in "
            f"{left_seconds:.0f} s or delete the file"
        )
        raise InputError([self._problem(f"the lock {whose}, renewed {age_seconds:.0f} s ago", expected)])

    def _take_over(self, judged: _Found) -> bool:
        """Replace the lock that was judged by this process's own; False if it has become another one since.

        The lock file exists at every moment, so no other process can create one in between.

        Raises:
            InputError: another process is taking over the same lock.
        """
        claims = self._claim(judged)
        try:
            if _find(self._path) != judged:
                return False
            os.replace(claims[-1], self._path)
            return True
        finally:
            for claim in claims:
                claim.unlink(missing_ok=True)

    def _claim(self, judged: _Found) -> list[Path]:
        """Claim the right to replace a lock: of all processes that try, only one can create the claim file.

        Returns:
            Claim files: those of processes that died before they replaced the lock, and last this process's own, which
            is a complete lock file.
        """
        name = hashlib.sha256(f"{judged.mtime_ns} {judged.text}".encode()).hexdigest()[:16]
        claims: list[Path] = []
        while True:
            claims.append(self._path.with_name(f"{LOCK_NAME}.{name}.{len(claims)}"))
            if self._create(claims[-1]):
                return claims
            other = _find(claims[-1])
            if other is None or self._age_seconds(other) < STALE_SECONDS:
                raise InputError([self._problem("a lock that another start is taking over", "one run at a time")])

    def _age_seconds(self, found: _Found) -> float:
        return max(0.0, clock_of(self._path.parent) - found.mtime_ns / 1e9)

    def _problem(self, found: str, expected: str) -> Problem:
        return Problem(str(self._path), "output_dir", found, expected)

    def _renew(self) -> None:
        while not self._leaving.wait(HEARTBEAT_SECONDS):
            if lost := self.lost:
                logger.warning("%s: %s", self._path, lost.words)
                return
            try:
                os.utime(self._path)
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", self._path, error)


def clock_of(directory: Path) -> float:
    """The time by the clock of a directory's file system, in seconds: clocks of machines that share it may differ.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{LOCK_NAME}.") as file:
        file.write(b"\n")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _find(path: Path) -> _Found | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _Found(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def process_start(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is none, or only its exit code is left.

    Unlike a time of day it stays the same when somebody sets the clock.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        state: list[str] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state[0] in "ZX" else int(state[19])
    return None


def boot_of_machine() -> str | None:
    """Name one boot of this machine; None where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _pid_namespace() -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None
