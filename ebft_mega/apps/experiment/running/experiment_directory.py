"""An experiment's directory: one process at a time, and old results are set aside, never deleted. No torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ebft_mega.apps.experiment.running.phases import inputs_stamp
from ebft_mega.errors import InputError, Problem
from ebft_mega.lifecycle.findings import PREVIOUS
from ebft_mega.lifecycle.setting_aside import DATE_FORMAT

LOCK_NAME = ".experiment.lock"
EVALUATIONS = "evaluations"
DATA = "data"  # where an experiment's file may let its commands put datasets, which have stamps of their own


@contextmanager
def experiment_lock(output: Path) -> Iterator[None]:
    """Hold the experiment's directory, which is made if needed; the system releases it however the process ends.

    Raises:
        InputError: another process runs the experiment.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK_NAME, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        found = "another process that runs this experiment"
        raise InputError([Problem(str(output), "output_dir", found, "one process at a time")]) from None
    try:
        yield
    finally:
        lock.release()


def set_aside(output: Path, say: Callable[[str], None], names: Sequence[str] = (), but: Sequence[str] = ()) -> None:
    """Move what is in an experiment's directory into a new folder of `previous/`; nothing is deleted.

    Args:
        names: what is moved; empty: everything.
        but: what stays.
    """
    items = list(output.iterdir()) if output.is_dir() else []
    # What stays is there with the stamp of what it was made from.
    stays = {PREVIOUS, LOCK_NAME, *but, *(inputs_stamp(output / name).name for name in but)}
    found = [item for item in items if item.name not in stays and (not names or item.name in names)]
    if not found:
        return
    date, number = f"{datetime.now(UTC):{DATE_FORMAT}}", 1
    while (aside := output / PREVIOUS / (date if number == 1 else f"{date}-{number}")).exists():
        number += 1  # twice within a second
    aside.mkdir(parents=True)
    for item in found:
        item.rename(aside / item.name)
    say(f"{', '.join(sorted(item.name for item in found))} of {output} set aside in {aside}")
