"""What becomes of standard output and standard error never ends a program or changes its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebft_mega.io import standard_streams
from ebft_mega.io.standard_streams import ForgivingFile

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, os, sys, warnings
from ebft_mega.io.standard_streams import protect_standard_streams, output_failures
protect_standard_streams()
logging.basicConfig(stream=sys.stderr)
sys.stdin.read()  # until the other ends are closed
for number in range(3):
    print("line", number, "caf\\xe9", flush=True)
    print("error", number, file=sys.stderr)
    logging.warning("warning %d", number)
    warnings.warn(f"warned {number}")
print("not flushed by the program")
with open(sys.argv[1], "w") as file:
    print(*sorted(f"{name} {error.errno}" for name, error in output_failures().items()), file=file)
sys.exit(75)
"""


def run(tmp_path, environment=None, **streams):
    """Run the program; returns its exit code and what it says of its streams."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "said")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})}
    code = subprocess.run(command, input=b"", env=environment, timeout=60, check=False, **streams).returncode
    return code, (tmp_path / "said").read_text().strip()


def unread_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_pipes_that_nobody_reads(tmp_path):
    pipe = unread_pipe()
    assert run(tmp_path, stdout=pipe, stderr=pipe) == (75, "stderr 32 stdout 32")
    os.close(pipe)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        assert run(tmp_path, stdout=full, stderr=full) == (75, "stderr 28 stdout 28")


def test_streams_that_were_closed_before_the_start(tmp_path):
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "said")]
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *program]
    # Python makes standard input None then.
    command[5] = command[5].replace("sys.stdin.read()", "assert os.fstat(0) and os.fstat(1) and os.fstat(2)")
    code = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=60, check=False
    ).returncode
    assert (code, (tmp_path / "said").read_text()) == (75, "\n")


LISTENER = """
import os, sys
from ebft_mega.io import process_signals
from ebft_mega.io.standard_streams import protect_standard_streams
process_signals.listen(exit_code=75).note_from_now_on()
protect_standard_streams()
print("lines whose ends have the number of SIGUSR1\\n" * 20000)
sys.exit(len({os.fstat(descriptor).st_rdev for descriptor in (0, 1, 2)} - {os.stat(os.devnull).st_rdev}))
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_what_listens_to_signals_does_not_get_the_number_of_a_closed_stream(closed):
    command = ["sh", "-c", f'exec "$0" "$@" </dev/null >/dev/null 2>/dev/null {closed}', sys.executable, "-c", LISTENER]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=20, check=False).returncode == 0


def test_characters_that_the_console_lacks(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        assert run(tmp_path, {"PYTHONIOENCODING": "ascii"}, stdout=out, stderr=out) == (75, "")
    assert "line 2 caf\\xe9\n" in (tmp_path / "out").read_text()


def test_a_reader_that_stands_still_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(standard_streams, "STALLED_SECONDS", 0.2)
    reading, writing = os.pipe()
    file = ForgivingFile(writing)
    line = b"x" * 1000
    while file.failure is None:
        assert file.write(line) == len(line)
    monkeypatch.setattr(standard_streams, "STALLED_SECONDS", 1000.0)
    file.write(line)  # at once
    taken = os.read(reading, 1 << 20)
    file.write(b"again")
    assert os.read(reading, 100) == b"again" and set(taken) == {ord("x")}
    os.close(reading)
    os.close(writing)


def test_a_disk_that_has_room_again_is_written_again(monkeypatch, tmp_path):
    path = tmp_path / "log"
    with open(path, "wb") as target:
        file = ForgivingFile(target.fileno())
        full = os.open("/dev/full", os.O_WRONLY)
        kept = os.dup(target.fileno())
        os.dup2(full, target.fileno())
        assert file.write(b"lost") == 4 and file.failure is not None
        os.dup2(kept, target.fileno())
        file.write(b"found")
        os.close(full)
        os.close(kept)
    assert path.read_bytes() == b"found"


TOOL = """
import sys
from ebft_mega.io.command import run_command
from ebft_mega.errors import InputError, Problem

def main():
    sys.stdin.read()
    print("result " * 5000)
    if {fails}:
        raise InputError([Problem("here", "key", "this", "that")])
    return {code}

sys.exit(run_command(main, prints_its_result={prints}))
"""


@pytest.mark.parametrize(
    ("prints", "code", "fails", "expected"),
    [
        (True, 0, False, 141),
        (False, 0, False, 0),
        (False, 1, False, 1),
        (False, 0, True, 2),
    ],
)
def test_a_tool_whose_reader_has_gone(tmp_path, prints, code, fails, expected):
    """Tools that print their result end as other programs do; the others do their work to the end. No traceback."""
    pipe = unread_pipe()
    program = TOOL.format(prints=prints, code=code, fails=fails)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, input=b"", stdout=pipe, stderr=subprocess.PIPE, env=environment, timeout=60, check=False
    )
    os.close(pipe)
    assert (done.returncode, b"Traceback" in done.stderr) == (expected, False)


def test_a_tool_on_a_full_disk_says_so():
    program = TOOL.format(prints=True, code=0, fails=False)
    command = [sys.executable, "-c", program]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command,
            input=b"",
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"error: system: No space left on device\n")
