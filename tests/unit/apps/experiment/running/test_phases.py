"""Phases run, fail, and are reused with real (tiny) commands."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ebft_mega.apps.experiment.running.phases import PhaseFailed, PhaseRunner, source_fingerprint


@pytest.fixture
def said():
    return []


@pytest.fixture
def runner(tmp_path, said):
    return PhaseRunner(tmp_path, say=said.append, environment={"FROM_RUNNER": "7"})


def python(code):
    return [sys.executable, "-c", code]


def test_runs_in_the_root_with_the_environment(runner, tmp_path):
    runner.run("write", python("import os; open('out.txt', 'w').write(os.environ['FROM_RUNNER'])"))
    assert (tmp_path / "out.txt").read_text() == "7"
    assert "write" in runner.summary() and "total" in runner.summary()


def test_failure_keeps_the_exit_code_and_shows_the_command(runner):
    with pytest.raises(PhaseFailed, match=r"phase 'broken' failed \(exit code 4\)") as caught:
        runner.run("broken", python("raise SystemExit(4)"))
    assert caught.value.exit_code == 4
    assert "raise SystemExit(4)" in str(caught.value)
    assert runner.outcomes == []


def test_killed_command_is_a_failure(runner):
    with pytest.raises(PhaseFailed) as caught:
        runner.run("killed", python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert caught.value.exit_code == 1


def test_missing_program(runner):
    with pytest.raises(PhaseFailed, match="No such file"):
        runner.run("nothing", ["./no-such-program"])


def test_status_file_decides_and_not_the_launcher(runner, tmp_path):
    """A launcher that returns 0 after its processes were stopped does not pass for success."""
    with pytest.raises(PhaseFailed, match="no .*status.json"):
        runner.run("lost", python("pass"), status_of=tmp_path)
    status = {"state": "stopped", "exit_code": 75, "step": 3, "checkpoint": None}

    def leaving(outcome, code=0):
        return python(f"open('status.json', 'w').write({json.dumps(outcome)!r}); raise SystemExit({code})")

    (tmp_path / "status.json").write_text(json.dumps(status | {"state": "done", "exit_code": 0}))
    with pytest.raises(PhaseFailed, match="no .*status.json"):
        runner.run("refused", python("raise SystemExit(2)"), status_of=tmp_path)
    with pytest.raises(PhaseFailed, match="state 'stopped' after step 3") as caught:
        runner.run("stopped", leaving(status), status_of=tmp_path)
    assert caught.value.exit_code == 75
    runner.run("done", leaving(status | {"state": "done", "exit_code": 0}, code=1), status_of=tmp_path)


COUNTING = "import os; os.makedirs('made'); open('count', 'a').write('x')"


def count(tmp_path):
    return len((tmp_path / "count").read_text())


def test_output_is_reused_until_an_input_changes(runner, tmp_path, said):
    made = tmp_path / "made"
    first = runner.run_once("build", python(COUNTING), made, {"a": 1, "b": (1, 2)})
    assert runner.run_once("build", python(COUNTING), made, {"a": 1, "b": (1, 2)}) == first
    assert count(tmp_path) == 1
    assert "reused" in said[-1] and "reused" in runner.summary()

    (made / "left over").touch()
    assert runner.run_once("build", python(COUNTING), made, {"a": 2, "b": (1, 2)}) != first
    assert count(tmp_path) == 2
    assert not (made / "left over").exists()
    assert any("these inputs changed: a" in text for text in said)


def test_a_failed_build_is_not_reused(runner, tmp_path):
    made = tmp_path / "made"
    with pytest.raises(PhaseFailed):
        runner.run_once("build", python(COUNTING + "; raise SystemExit(1)"), made, {})
    runner.run_once("build", python(COUNTING), made, {})
    assert count(tmp_path) == 2


def test_fresh_builds_once_per_start(tmp_path, said):
    for expected in (1, 2):
        runner = PhaseRunner(tmp_path, say=said.append, fresh=True)
        runner.run_once("build", python(COUNTING), tmp_path / "made", {})
        runner.run_once("build", python(COUNTING), tmp_path / "made", {})
        assert count(tmp_path) == expected


def test_source_fingerprint_sees_names_and_contents(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1")
    (folder / "notes.txt").write_text("ignored")
    before = source_fingerprint([folder])
    (folder / "notes.txt").write_text("still ignored")
    assert source_fingerprint([folder]) == before
    (folder / "a.py").write_text("x = 2")
    changed = source_fingerprint([folder])
    (folder / "a.py").rename(folder / "b.py")
    assert len({before, changed, source_fingerprint([folder])}) == 3


STOPPED_IN_MID_START = """
import os, signal, subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from ebft_mega.apps.experiment.running import phases
from ebft_mega.io.command import run_command
start = subprocess.Popen
def start_and_be_stopped(*arguments, **options):
    child = start(*arguments, **options)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    return child
subprocess.Popen = start_and_be_stopped
sys.exit(run_command(lambda: phases.PhaseRunner(Path.cwd(), print).run("sleep", ["sleep", "60"])))
"""


def test_a_command_that_is_just_being_started_is_asked_to_stop(tmp_path):
    program = STOPPED_IN_MID_START.format(root=str(Path(__file__).resolve().parents[5]))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")
    child = int(done.stdout.splitlines()[-1])
    left = [process for process in psutil.process_iter() if process.pid == child]
    assert not psutil.wait_procs(left, timeout=10)[1]
