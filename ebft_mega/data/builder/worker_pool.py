"""A pool of processes that work on work units, with one progress line."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from ebft_mega.errors import EbftError
from ebft_mega.io.child_processes import obey_the_parent_only, signals_blocked
from ebft_mega.io.progress_bar import Meter

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Job = Callable[[Argument, Advance], Result]

_SHOW_SECONDS = 0.5


class WorkerDiedError(EbftError):
    """A worker process ended without an answer."""


class _StoppedError(Exception):
    """The process that asked for the work has stopped waiting for it."""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of processes that is started by the first call with more than one work unit.

    Workers end with the process that started them, however that ends.

    Args:
        processes: at most so many work at a time; with 1 everything happens in the caller's process.
        prepare: called once in each other process before its first job; pickled.
    """

    def __init__(self, processes: int, prepare: Callable[[], None] | None = None):
        self._processes = processes
        self._prepare = prepare
        self._pool: ProcessPoolExecutor | None = None
        # Shared with the processes of the pool: what they have done, and whether to give up.
        self._count: Any = None
        self._stop: Any = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        self._stop.value = int(kind is not None)
        if kind is not None and not issubclass(kind, Exception):
            # Asked to stop: what a work unit has done counts only when all of it is done, so nobody waits for one.
            for process in tuple((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        # The process may end with this frame still alive, and the system would complain of semaphores.
        self._pool = self._count = self._stop = None

    def run(
        self,
        job: Callable[[Argument, Advance], Result],
        arguments: Sequence[Argument],
        total: int | None,
        description: str,
    ) -> Iterator[Result]:
        """Do a job for each of its arguments.

        Args:
            job: takes one argument and a function that it calls with counts of what it has done. With several
                processes all three of job, argument and result are pickled.
            arguments: one for each work unit.
            total: sum of these counts, None where it is not known.
            description: for the progress line.

        Yields:
            The results in the order in which they are ready, which may be any.

        Raises:
            WorkerDiedError: a process ended without an answer.
            InputError: and whatever else a job raises.
        """
        if not arguments:
            return
        with Meter(total, description) as meter:
            if self._processes == 1 or len(arguments) == 1:
                yield from _run_here(job, arguments, meter)
            else:
                yield from self._run_in_pool(job, arguments, meter)

    def _run_in_pool(
        self, job: Callable[[Argument, Advance], Result], arguments: Sequence[Argument], meter: Meter
    ) -> Iterator[Result]:
        if self._pool is None:
            # Fresh interpreters: a forked one would inherit threads' locks in whatever state they are.
            context = multiprocessing.get_context("spawn")
            with signals_blocked():  # creating them starts a process of Python's own
                self._count, self._stop = context.Value("Q", 0), context.Value("b", 0)
            # Processes start as they are needed, so a later call with more work units still gets more processes.
            started_with = (os.getpid(), self._count, self._stop, self._prepare)
            self._pool = ProcessPoolExecutor(self._processes, context, _start_worker, started_with)
        self._count.get_obj().value = 0
        try:
            with signals_blocked():
                pending: set[Future[Result]] = {self._pool.submit(_run_there, job, argument) for argument in arguments}
            while pending:
                done, pending = wait(pending, _SHOW_SECONDS, FIRST_COMPLETED)
                # Without the lock: a worker that was killed may hold it forever.
                meter.show(self._count.get_obj().value)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDiedError("a worker process died, perhaps for want of memory (try fewer processes)") from error


def _run_here(
    job: Callable[[Argument, Advance], Result], arguments: Sequence[Argument], meter: Meter
) -> Iterator[Result]:
    count = 0

    def advance(done: int) -> None:
        nonlocal count
        count += done
        meter.show(count)

    for argument in arguments:
        yield job(argument, advance)


# Set once in each worker process: a counter and a flag that the parent shares; what is called before the first job.
_shared: tuple[Any, Any] | None = None
_prepare: Callable[[], None] | None = None


def _start_worker(parent: int, count: Any, stop: Any, prepare: Callable[[], None] | None) -> None:
    global _shared, _prepare
    _shared, _prepare = (count, stop), prepare
    obey_the_parent_only(parent)


def _run_there(job: Callable[[Argument, Advance], Result], argument: Argument) -> Result:
    global _prepare
    assert _shared is not None  # set when the process started
    if _prepare is not None:  # here, so that its errors are those of the job
        _prepare()
        _prepare = None
    count, stop = _shared

    def advance(done: int) -> None:
        if stop.value:
            raise _StoppedError
        with count.get_lock():
            count.value += done

    return job(argument, advance)
