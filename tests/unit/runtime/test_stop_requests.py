"""Stop and save requests: signals, files, time, and chains of real processes whose upper ones are killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ebft_mega.runtime.stop_requests import Signals, StopReason, StopRequests, words_when_noted

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 30


@pytest.fixture
def signals():
    listening = Signals.listen()
    listening.train_from_now_on()
    yield listening
    listening.release()


def requests(directory, signals=None, started=None, minutes=None, watches_files=True):
    started = time.monotonic() if started is None else started
    return StopRequests(signals or Signals(), directory, started, minutes, watches_files)


def test_the_greatest_reason_counts():
    assert max(StopReason) is StopReason.SIGTERM and not StopReason.NONE
    assert [reason.words for reason in StopReason][1:] == [
        "train.max_run_minutes",
        "the file STOP",
        "the launcher is gone",
        "SIGUSR1",
        "SIGHUP",
        "SIGINT",
        "SIGTERM",
    ]


def test_nothing_is_requested_at_first(signals, tmp_path):
    local = requests(tmp_path, signals, minutes=1)
    assert local.stop_reason() is StopReason.NONE and not local.save_requested()


@pytest.mark.parametrize(
    "numbers",
    [
        *(("SIGTERM",), ("SIGUSR1",), ("SIGINT",), ("SIGHUP",)),
        *(("SIGTERM", "SIGUSR1", "SIGUSR1"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGTERM")),
    ],
)
def test_signals_are_noted_and_end_nothing(signals, tmp_path, numbers):
    for name in numbers:
        signal.raise_signal(signal.Signals[name])
    expected = max(StopReason[name] for name in numbers)
    assert signals.received is expected
    assert requests(tmp_path, signals).stop_reason() is expected


def test_handlers_are_put_back():
    def other(number, frame):
        pass

    before = signal.signal(signal.SIGUSR1, other)
    try:
        signals = Signals.listen()
        signals.train_from_now_on()
        assert signal.getsignal(signal.SIGUSR1) is not other
        signals.release()
        signals.release()
        assert signal.getsignal(signal.SIGUSR1) is other and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_library_that_waits_for_the_system_does_not_notice(signals):
    """A C function that reads from a pipe gets its byte, and no EINTR, when a signal comes in between."""
    reader, writer = os.pipe()
    main = threading.get_ident()
    about_to_read = threading.Event()

    def interrupt():
        about_to_read.wait(SECONDS)
        time.sleep(0.3)  # until it is in there; a thread that waits for its turn looks the same from outside
        signal.pthread_kill(main, signal.SIGUSR1)
        os.write(writer, b"x")

    thread = threading.Thread(target=interrupt)
    buffer = ctypes.create_string_buffer(1)
    read = ctypes.CDLL(None).read
    thread.start()
    about_to_read.set()
    assert read(reader, buffer, 1) == 1
    thread.join(SECONDS)
    assert signals.received is StopReason.SIGUSR1
    os.close(reader), os.close(writer)


@pytest.mark.parametrize(
    ("launcher", "name", "may_be_killed"),
    [
        *(("", "SIGINT", False), ("", "SIGTERM", False)),
        *(("deepspeed", "SIGINT", True), ("deepspeed", "SIGTERM", True), ("deepspeed", "SIGHUP", False)),
        *(("torchrun", "SIGINT", True), ("torchrun", "SIGHUP", True), ("torchrun", "SIGUSR1", False)),
    ],
)
def test_what_is_said_at_a_signal_promises_no_checkpoint_where_the_launcher_may_kill(launcher, name, may_be_killed):
    variables = {"deepspeed": ("CROSS_SIZE", "LOCAL_SIZE"), "torchrun": ("TORCHELASTIC_RUN_ID",), "": ()}[launcher]
    environment = dict.fromkeys(variables, "1")
    words = words_when_noted(signal.Signals[name], environment, Path("/runs/my run\x1b"))
    limit = (
        f", unless that takes more than 30 s and {launcher} was sent the signal, too: it kills the ranks then, and "
        r"what they did since the last checkpoint is lost (the safe way to stop: touch '/runs/my run\u001b/STOP')"
    )
    expected = f"the step under way ends first, then a checkpoint is written{limit * may_be_killed}; a second Ctrl-C"
    assert words == f"{expected} within 5 s ends at once without one"


def test_the_time_limit(tmp_path):
    started = time.monotonic() - 90
    assert requests(tmp_path, started=started, minutes=1.4).stop_reason() is StopReason.TIME_LIMIT
    assert requests(tmp_path, started=started, minutes=2.0).stop_reason() is StopReason.NONE
    assert requests(tmp_path, started=started).stop_reason() is StopReason.NONE


def test_files_are_requests_until_they_are_taken(tmp_path):
    local, deaf, nowhere = requests(tmp_path), requests(tmp_path, watches_files=False), requests(None)
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    assert local.save_requested() and local.stop_reason() is StopReason.STOP_FILE
    for other in (deaf, nowhere):
        assert not other.save_requested() and other.stop_reason() is StopReason.NONE
        other.take_save(), other.take_stop()
        assert other.clear() == []
    local.take_save()
    assert not local.save_requested() and local.stop_reason() is StopReason.STOP_FILE
    local.take_stop()
    local.take_stop()
    assert local.stop_reason() is StopReason.NONE and list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_deleted_is_one_request(tmp_path, monkeypatch, caplog):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "SAVE").touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    local = requests(tmp_path)
    assert local.save_requested()
    local.take_save()
    assert not local.save_requested() and "cannot be deleted" in caplog.text
    os.utime(tmp_path / "SAVE", (1, 1))
    assert local.save_requested()
    # To the next start it is an old one, even though nobody could delete it.
    later = requests(tmp_path, started_at(tmp_path))
    assert later.clear() == [] and not later.save_requested()


def started_at(directory):
    """The signals of a process that starts now."""
    signals = Signals()
    signals.remember_files(directory)
    return signals


@pytest.mark.parametrize("jump", [-3600, 0, 3600])
def test_files_from_before_the_start_are_no_requests_whatever_the_clock_says(tmp_path, jump):
    for name in ("SAVE", "STOP"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() + jump,) * 2)
    assert requests(tmp_path, started_at(tmp_path)).clear() == ["SAVE", "STOP"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jump", [-3600, 0, 3600])
def test_files_that_come_during_the_start_are_requests(tmp_path, jump):
    (tmp_path / "STOP").touch()
    signals = started_at(tmp_path)
    for name in ("SAVE", "STOP"):  # made, and made again
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() + jump,) * 2)
    local = requests(tmp_path, signals)
    assert local.clear() == [] and local.save_requested() and local.stop_reason() is StopReason.STOP_FILE


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_plain_file_asks_for_nothing_and_is_said_once(tmp_path, caplog, make):
    make(tmp_path / "STOP")
    local = requests(tmp_path)
    assert [local.stop_reason() for _ in range(3)] == [StopReason.NONE] * 3
    assert caplog.text.count("is no plain file") == 1
    # To the next start it is no earlier request either, and nothing that could be deleted.
    later = requests(tmp_path, started_at(tmp_path))
    assert later.clear() == [] and (tmp_path / "STOP").lstat() and "cannot be deleted" not in caplog.text
    assert later.stop_reason() is StopReason.NONE


RANK = """
import os, sys
sys.path.insert(0, {root!r})
from ebft_mega.runtime.stop_requests import Signals
signals = Signals.listen()
print(os.getpid(), flush=True)
for question in sys.stdin:
    print(signals.launcher_is_gone, flush=True)
"""
STARTER = """
import os, subprocess, sys
print(os.getpid(), flush=True)  # before those of the processes below it
subprocess.run(sys.argv[1:])
"""


class Chain:
    """Processes of which each has started the next; the last one is a rank.

    Args:
        directory: for the programs.
        names: of the upper processes; `launch` is taken for DeepSpeed's, `deepspeed` is a program of that name.
        environment: of all of them.
    """

    def __init__(self, directory, names, environment):
        command = [sys.executable, "-c", RANK.format(root=str(ROOT))]
        for name in reversed(names):
            program = directory / name
            program.write_text(STARTER)
            # `launch` is told by an argument that names its module; here one of Python's own options carries it.
            options = ["-X", "deepspeed.launcher.launch"] if name == "launch" else []
            command = [sys.executable, *options, str(program), *command]
        environment = {name: value for name, value in os.environ.items() if name != "RANK"} | environment
        self._first = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pids = {name: int(self._first.stdout.readline()) for name in (*names, "rank")}
        self._rank = psutil.Process(self.pids["rank"])

    def kill(self, name):
        """Kill one and wait until the next one has another parent."""
        pid, names = self.pids[name], list(self.pids)
        child = psutil.Process(self.pids[names[names.index(name) + 1]])
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while child.ppid() == pid:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def launcher_is_gone(self):
        """What the rank says."""
        self._first.stdin.write("?\n")
        return self._first.stdout.readline() == "True\n"

    def close(self):
        """End the rank, and with it the others."""
        self._first.stdin.close()
        try:
            assert not psutil.wait_procs([self._rank], timeout=SECONDS)[1]
        finally:
            for process in [*self._first_and_its_children(), self._rank]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._first.wait(SECONDS)
            self._first.stdout.close()

    def _first_and_its_children(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._first.pid)
            return [first, *first.children(recursive=True)]
        return []


@pytest.mark.parametrize(
    ("names", "killed", "environment", "is_gone"),
    [
        (("shell", "deepspeed", "launch"), "launch", {"RANK": "0"}, True),
        (("shell", "deepspeed", "launch"), "deepspeed", {"RANK": "0"}, True),
        (("shell", "deepspeed", "launch"), "shell", {"RANK": "0"}, False),
        (("shell", "launch"), "shell", {"RANK": "0"}, False),  # started by hand: jobs outlive their shells
        (("shell", "torchrun"), "torchrun", {"RANK": "1"}, True),
        (("deepspeed", "torchrun"), "deepspeed", {"RANK": "1"}, False),
        (("shell",), "shell", {}, False),
    ],
)
def test_a_launcher_that_is_gone(tmp_path, names, killed, environment, is_gone):
    chain = Chain(tmp_path, names, environment)
    try:
        assert not chain.launcher_is_gone()
        chain.kill(killed)
        assert chain.launcher_is_gone() == is_gone
    finally:
        chain.close()
