"""One process at a time makes a directory, and the next one can resume its work."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_mega.errors import InputError
from ebft_mega.io.output_directory import unfinished_directory

REPOSITORY = Path(__file__).resolve().parents[3]

# Holds the lock until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from ebft_mega.io.output_directory import unfinished_directory
with unfinished_directory(Path(sys.argv[1]), "marker", False, "work") as (partial, result):
    (partial / "half").write_text("done")
    print("held", flush=True)
    time.sleep(600)
"""


def finish(output: Path) -> list[str]:
    """Finish the work; what an earlier process left."""
    with unfinished_directory(output, "marker", False, "work") as (partial, result):
        found = sorted(path.name for path in partial.iterdir())
        result.mkdir()
        (result / "marker").touch()
    return found


def test_another_process_is_refused_until_it_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="found another process that is making it; expected one process"):
                finish(tmp_path / "out")
            assert (tmp_path / ".out.partial" / "half").read_text() == "done"
        finally:
            holder.kill()
    assert holder.returncode == -signal.SIGKILL
    assert finish(tmp_path / "out") == ["half", "identity.json", "lock"]
    assert "note: resuming what" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found File name too long; expected a place to write to"):
        finish(tmp_path / ("x" * 300))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"out\.partial.*file system without locks .*a local disk"):
        finish(tmp_path / "out")


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "lock").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        finish(tmp_path / "out")
    assert str(caught.value.filename) == str(tmp_path / ".out.partial" / "lock")


def replace(lock_file: Path) -> None:
    lock_file.with_name("other").touch()
    lock_file.with_name("other").replace(lock_file)


@pytest.mark.parametrize("change", [Path.unlink, replace])
def test_the_lock_of_a_file_that_was_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    lock = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        change(tmp_path / ".out.partial" / "lock")  # between opening and locking, as the process that held it would
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="another process"):
        finish(tmp_path / "out")
    finish(tmp_path / "out")
