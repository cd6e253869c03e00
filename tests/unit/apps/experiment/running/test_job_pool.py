"""Jobs side by side: as many as are allowed, stopped with this process, and what they took."""

import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from ebft_mega.apps.experiment.running import job_pool
from ebft_mega.apps.experiment.running.job_pool import JobFailed, JobPool
from ebft_mega.apps.experiment.runs.jobs import Chain, Job
from ebft_mega.apps.experiment.runs.stamps import read_stamp
from ebft_mega.io.process_signals import StopNow

WORK = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
LEAVE = "import sys, pathlib; pathlib.Path(sys.argv[2], 'evaluation.json').write_text('{}')"


@pytest.fixture
def said():
    return []


@pytest.fixture
def pool(said):
    return JobPool(2, said.append, {"FROM_POOL": "7"})


def job(tmp_path, name, program):
    output = tmp_path / name
    command = [sys.executable, "-S", "-c", program, "--output", str(output)]
    return Chain(name, (Job(name, "evaluate", output, lambda: command, {"name": name}),))


def test_what_a_job_takes_is_counted_over_all_its_starts(pool, said, tmp_path):
    chain = job(tmp_path, "one", f"import sys\n{WORK}sys.exit(3)")
    (one,) = chain.jobs
    with pytest.raises(JobFailed):
        pool.run([chain])
    assert not one.is_done()
    again = job(tmp_path, "one", WORK + LEAVE)
    pool.run([again])
    stamp = read_stamp(one.output)
    assert stamp.is_done and [start.exit_code for start in stamp.starts] == [3, 0]
    assert 0.5 < stamp.cpu_seconds < 3 and stamp.wall_seconds >= stamp.cpu_seconds / 2
    pool.run([again])
    assert said[-1] == "1 of 1 were done before"


def test_the_environment_reaches_a_job_and_its_words_its_log(pool, tmp_path):
    chain = job(tmp_path, "one", f"import os; print('found', os.environ['FROM_POOL']); {LEAVE}")
    pool.run([chain])
    assert chain.jobs[0].log.read_text() == "found 7\n"


def test_no_more_run_at_a_time_than_are_allowed_and_a_failure_starts_no_more(pool, said, tmp_path):
    wait = f"import time; time.sleep(0.4); {LEAVE}"
    chains = [job(tmp_path, "bad", "import sys; sys.exit(9)"), *(job(tmp_path, f"good{n}", wait) for n in range(3))]
    with pytest.raises(JobFailed, match=r"bad: failed \(exit code 9\)"):
        pool.run(chains)
    done = [chain.jobs[0].is_done() for chain in chains]
    assert done == [False, True, False, False]  # what was running has ended, and nothing else has begun
    assert not (tmp_path / "good2").exists() and "no more are started" in said[0]


def test_a_program_that_is_not_there(pool, tmp_path):
    chain = Chain("x", (Job("x", "evaluate", tmp_path / "x", lambda: ["./no-such-program"], {}),))
    with pytest.raises(JobFailed, match="No such file"):
        pool.run([chain])


def test_children_stop_with_this_process_and_it_is_noted(pool, tmp_path, monkeypatch):
    """The signal comes while the pool waits."""
    chains = [job(tmp_path, name, "import time; time.sleep(60)") for name in ("one", "two")]
    waits = iter([None, None, StopNow(signal.SIGTERM)])

    def sleep(seconds):
        if (error := next(waits, None)) is not None:
            raise error
        time.sleep(seconds)

    monkeypatch.setattr(job_pool, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    others = set(psutil.Process().children())  # of tests before this one
    started = time.monotonic()
    with pytest.raises(StopNow):
        pool.run(chains)
    assert time.monotonic() - started < 20
    assert set(psutil.Process().children()) <= others
    for chain in chains:
        (start,) = read_stamp(chain.jobs[0].output).starts
        assert start.exit_code == -signal.SIGTERM and start.cpu_seconds is not None


def test_a_start_whose_end_nobody_noted_makes_the_cost_unknown(pool, tmp_path):
    chain = job(tmp_path, "one", LEAVE)
    pool._start(chain, list(chain.jobs), {})
    pool._running.pop().process.wait(timeout=60)  # as if this process had been killed
    pool.run([chain])
    stamp = read_stamp(chain.jobs[0].output)
    assert stamp.is_done and len(stamp.starts) == 2 and stamp.cpu_seconds is None
