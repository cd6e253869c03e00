"""The watchdog in real processes: what it prints, what it writes, the code that the process ends with."""

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START = """
import datetime, json, sys, threading, time
from pathlib import Path
from ebft_mega.runtime.run_files import failure_on_record, record_failure
from ebft_mega.runtime import watchdog
watchdog.REPORT_SECONDS = 0.5
directory = Path(sys.argv[1])
def record():
    return record_failure(directory, 3, 7)
def guard(seconds, record=record):
    return watchdog.Watchdog(datetime.timedelta(seconds=seconds), directory / "rank.log", record)
"""


def run(tmp_path, body, timeout=20):
    """Run a program with the watchdog at hand."""
    return subprocess.run(
        [sys.executable, "-c", START + body, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def test_a_hang_ends_with_code_3_and_the_stacks_of_all_threads(tmp_path):
    done = run(
        tmp_path,
        """
def waits_in_the_background():
    time.sleep(100)
def waits_for_ever():
    threading.Event().wait()
threading.Thread(target=waits_in_the_background, daemon=True).start()
with guard(1) as dog:
    dog.beat("step 12")
    waits_for_ever()
""",
    )
    assert done.returncode == 3, done.stderr
    for text in (done.stderr, (tmp_path / "rank.log").read_text()):
        assert "watchdog of rank 0: nothing has ended for 1 s; the last thing that ended: step 12" in text
        assert "in waits_for_ever" in text and "in waits_in_the_background" in text
    assert '"exit_code": 3' in (tmp_path / "status.json").read_text()


def test_beats_keep_a_process_alive(tmp_path):
    done = run(
        tmp_path,
        """
with guard(0.8) as dog:
    for step in range(8):
        time.sleep(0.3)
        dog.beat(f"step {step}")
time.sleep(1.5)
""",
    )
    assert done.returncode == 0 and not (tmp_path / "status.json").exists(), done.stderr


def test_the_first_failure_gives_the_code(tmp_path):
    """A peer that failed with code 4 is why this one hangs."""
    done = run(tmp_path, "record_failure(directory, 4, 2)\nwith guard(0.4):\n    time.sleep(100)\n")
    assert done.returncode == 4
    assert '"exit_code": 4' in (tmp_path / "status.json").read_text()


def test_a_record_that_never_ends_does_not_hold_the_process(tmp_path):
    """As on a file system that is gone."""
    started = time.monotonic()
    done = run(tmp_path, "with guard(0.4, record=lambda: time.sleep(100)):\n    time.sleep(100)\n")
    assert done.returncode == 3 and time.monotonic() - started < 15
    assert "Stacks of all threads" in done.stderr


def test_standard_error_that_nobody_reads_does_not_hold_the_process(tmp_path):
    """A full pipe is one of the things that a run may hang on."""
    program = START + "import os\nwith guard(0.4):\n    os.write(2, b'x' * 10_000_000)\n"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        assert process.wait(timeout=20) == 3
    finally:
        process.kill()
        process.stderr.close()
    assert "Stacks of all threads" in (tmp_path / "rank.log").read_text()


def test_a_suspended_process_has_not_been_hanging(tmp_path):
    """`scontrol suspend` stops every process of a job and continues them later."""
    program = (
        START + "with guard(1.5) as dog:\n    print('ready', flush=True)\n    time.sleep(1)\n    dog.beat('nap')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_failed_process_that_cannot_end_is_ended(tmp_path):
    done = run(
        tmp_path,
        """
watchdog.LEAVE_SECONDS = 1.0
try:
    raise ValueError("the cause")
finally:
    watchdog.leave_soon()
    threading.Thread(target=time.sleep, args=(100,)).start()  # not a daemon: the interpreter waits for it
""",
    )
    assert done.returncode == 1 and "ValueError: the cause" in done.stderr and "Timeout" in done.stderr
