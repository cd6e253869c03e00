"""Signals to small processes that do all kinds of things: each ends in time, with its code and without a traceback."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ebft_mega.io import process_signals

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60  # on a busy machine; what is measured is stated where it is
HONOURED_SECONDS = 5.0
LEAVE_SECONDS = 0.5  # in programs here: the true figure is asserted
PRELUDE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from ebft_mega.io import process_signals
from ebft_mega.io.process_signals import StopNow
process_signals.LEAVE_SECONDS = {LEAVE_SECONDS}
process_signals.LOOK_SECONDS = 0.1
signals = process_signals.listen(75)
def ready():
    print("ready", flush=True)
"""
START = """
signals.before_forced_end(lambda: print("forced", flush=True))
try:
    signals.raise_from_now_on()
    {body}
except StopNow as stop:
    print("left", stop, flush=True)
    process_signals.leave(signals.code_of(stop.number))
"""
TRAINING = """
signals.note_from_now_on()
{body}
print("noted", *sorted(signal.Signals(number).name for number in signals.noted), flush=True)
"""


@contextmanager
def program(text, **options):
    """A process that has printed that it is ready; killed at the end, with what it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=SECONDS)
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate(timeout=SECONDS)


def end_of(process):
    """Exit code and output of a process, which has no traceback."""
    output, errors = process.communicate(timeout=SECONDS)
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return process.returncode, output, errors


# What a start may be doing, and whether the main thread can leave by itself.
OCCUPATIONS = {
    "a loop": ("ready()\n    while True: pass", True),
    "sleep": ("ready(); time.sleep(60)", True),
    "a FIFO": ("os.mkfifo(FIFO); ready(); open(FIFO)", True),
    "a pipe": ("ready(); os.read(os.pipe()[0], 1)", True),
    "a child": ("import subprocess; ready(); subprocess.run(['sleep', '60'], stdout=-3, stderr=-3)", True),
    "a lock": ("import threading; lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()", True),
    "a destructor": (
        "class Slow:\n        def __del__(self):\n            ready(); time.sleep(1)\n    slow = Slow(); del slow\n"
        "    time.sleep(60)",
        True,
    ),
    "a semaphore": (  # which the system would say leaks
        "import multiprocessing; lock = multiprocessing.get_context('spawn').Lock(); ready(); time.sleep(60)",
        True,
    ),
    "a long farewell": (
        "try: ready(); time.sleep(60)\n    finally:\n        signals.finish_without_interruption()\n"
        "        while True: pass",
        False,
    ),
    "swallowed": ("ready()\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass", False),
    "C code": ("import hashlib; ready(); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)", False),
    "a C call that waits": ("import ctypes; ready(); [ctypes.CDLL(None).pause() for _ in range(99)]", None),
}


def test_a_forced_end_comes_in_time():
    forced_seconds = process_signals.LEAVE_SECONDS + process_signals.ENDING_SECONDS
    assert process_signals.LOOK_SECONDS + forced_seconds <= HONOURED_SECONDS


@pytest.mark.parametrize("occupation", OCCUPATIONS)
def test_a_start_is_left_in_time_whatever_it_does(tmp_path, occupation):
    body, leaves = OCCUPATIONS[occupation]
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    name = names[list(OCCUPATIONS).index(occupation) % len(names)]
    fifo = f"FIFO = {str(tmp_path / 'fifo')!r}\n"
    with program(fifo + START.format(body=body)) as process:
        time.sleep(0.2 if leaves is False else 0.1)  # until it does what it is about to do
        started = time.monotonic()
        process.send_signal(signal.Signals[name])
        code, output, errors = end_of(process)
        assert code == 75 and time.monotonic() - started < HONOURED_SECONDS, output
    if leaves is not None:
        assert output.startswith("left" if leaves else "forced"), output
    assert errors == (f"stopped by {name}\n" if not output.startswith("left") else ""), output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_while_modules_are_imported_ends_the_process(name):
    with program("ready(); time.sleep(60)") as process:
        process.send_signal(signal.Signals[name])
        assert end_of(process) == (75, "", f"stopped by {name}\n")


def test_training_only_notes_signals_and_libraries_are_not_interrupted():
    body = "ready(); assert os.read(0, 1) == b'x'"
    with program(TRAINING.format(body=body), stdin=subprocess.PIPE) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.05)
        process.stdin.write("x")
        process.stdin.flush()
        assert end_of(process)[:2] == (0, "noted SIGHUP SIGINT SIGTERM SIGUSR1\n")


@pytest.mark.parametrize("phase", [START, TRAINING])
def test_a_second_ctrl_c_ends_at_once_even_what_does_not_listen(phase):
    body = "import hashlib; ready(); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"
    with program(phase.format(body=body)) as process:
        time.sleep(0.2)  # until it is in there
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, output, errors = end_of(process)
        assert (code, output, errors) == (
            130,
            "",
            "ended at once by a second Ctrl-C\n",
        ) and time.monotonic() - started < 2


def test_what_must_be_done_and_said_at_signals_is_done_and_said():
    before = "signals.words_when_noted = lambda number: f'noted {number}'"
    before += "; signals.before_end_at_once(lambda: os.write(1, b'left'))"
    with program(TRAINING.format(body=f"{before}; ready(); time.sleep(60)")) as process:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.2)
        assert end_of(process) == (130, "left", "SIGTERM: noted 15\nended at once by a second Ctrl-C\n")


def test_two_ctrl_c_that_lie_apart_and_a_sigterm_after_one_end_nothing():
    text = "process_signals.AGAIN_SECONDS = 0.1\n" + TRAINING.format(body="ready(); sys.stdin.readline()")
    with program(text, stdin=subprocess.PIPE) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.2)
        process.stdin.write("\n")
        process.stdin.flush()
        assert end_of(process)[:2] == (0, "noted SIGINT SIGTERM\n")


def test_what_torchrun_hands_on_is_no_second_ctrl_c():
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "7"}
    body = TRAINING.format(body="ready(); sys.stdin.readline()")
    with program(body, stdin=subprocess.PIPE, env=environment) as process:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert end_of(process)[:2] == (0, "noted SIGINT\n")


def ignore(*numbers):
    """For a child: ignore signals, as `nohup` does before it starts a program."""
    return lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers]


def test_what_is_ignored_at_the_start_stays_ignored_except_sigusr1():
    all_four = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    with program(START.format(body="ready(); time.sleep(60)"), preexec_fn=ignore(*all_four)) as process:
        for number in all_four[:3]:
            process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert end_of(process)[:2] == (75, "left SIGUSR1\n")


def test_a_signal_at_the_hand_over_is_neither_lost_nor_deadly():
    body = """
for _ in range(100):
    signals = process_signals.listen(75)
    signals.raise_from_now_on()
    caught = False
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.note_from_now_on()
    except StopNow:
        caught = True
    assert caught or signals.noted
    signals.release()
ready()
"""
    with program(body) as process:
        assert end_of(process)[0] == 0


def test_a_fork_is_heard_by_nobody_else():
    body = """
child = os.fork()
if not child:
    time.sleep(60)
os.kill(child, signal.SIGTERM)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.5)  # longer than a process stays that has heard a signal
""".replace("\n", "\n    ")
    with program("process_signals.LEAVE_SECONDS = 0.1\n" + START.format(body="ready()" + body)) as process:
        assert end_of(process)[:2] == (0, "child 143\n")


def test_a_start_whose_launcher_has_gone_is_left():
    body = START.format(body="signals.is_orphaned = lambda: True; ready(); time.sleep(60)")
    with program(body) as process:
        assert end_of(process)[:2] == (75, "left SIGTERM\n")


@pytest.mark.parametrize("block", ["process_signals.uninterrupted", "signals_blocked"])
def test_starting_a_process_is_not_left_half_way(block):
    body = f"""from ebft_mega.io.child_processes import signals_blocked
    with {block}():
        ready()
        time.sleep(0.3)
        print("whole", flush=True)
    time.sleep(60)"""
    with program(START.format(body=body)) as process:
        process.send_signal(signal.SIGTERM)
        assert end_of(process)[:2] == (75, "whole\nleft SIGTERM\n")


@pytest.mark.parametrize("end", ["finish_without_interruption", "ignore_from_now_on"])
def test_a_process_that_ends_is_not_interrupted(end):
    body = f"signals.{end}(); ready(); sys.stdin.readline(); print('finished', flush=True)"
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]
    with program(START.format(body=body), stdin=subprocess.PIPE) as process:
        for number in numbers + numbers[3:] * (end == "ignore_from_now_on"):  # a second Ctrl-C, too
            process.send_signal(number)
            time.sleep(0.05)
        process.stdin.write("\n")
        process.stdin.flush()
        assert end_of(process)[:2] == (0, "finished\n")
