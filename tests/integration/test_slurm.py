"""The batch scripts, with programs on PATH that stand for Slurm's and start real local ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebft_mega.data.store.opening import open_dataset
from tests.integration.conftest import LAUNCH_TIMEOUT_SECONDS, REPOSITORY, settings

SCRIPTS = REPOSITORY / "launcher" / "slurm"
CONFIG = ["--config", "configs/tiny_cpu.yaml"]
SHORT = ("train.max_steps=2", "evaluation.interval=1000")
STAND_INS = REPOSITORY / "tests" / "integration" / "slurm_stand_ins.py"


class Cluster:
    """One batch job after another on stand-ins for Slurm."""

    def __init__(self, root: Path):
        self.root = root
        self.notes = root / "notes"
        self.programs = root / "programs"
        for directory in (self.notes, self.programs):
            directory.mkdir()
        for name in ("srun", "scontrol"):
            program = self.programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_INS}" {name} "$@"\n')
            program.chmod(0o755)
        self.job_id = random.randrange(10_000, 1_000_000)  # the port follows from it

    def start(self, script: str, *arguments: str, repository: Path = REPOSITORY, **variables: str) -> subprocess.Popen:
        """Run a batch script as Slurm does: a copy of it, from elsewhere, with the job's variables."""
        copy = self.root / "spooled_script"
        shutil.copy(SCRIPTS / script, copy)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment |= {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STAND_IN_NOTES": str(self.notes),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_SUBMIT_DIR": str(repository),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.Popen(
            [str(copy), *arguments],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **options) -> tuple[int, str]:
        """Exit code and output of a batch script."""
        return finish(self.start(script, *arguments, **options))

    def noted(self, program: str) -> list:
        """What a stand-in was called with."""
        path = self.notes / program
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(job: subprocess.Popen) -> tuple[int, str]:
    """Wait for a batch script."""
    try:
        output, _ = job.communicate(timeout=LAUNCH_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)  # its trap hands it on to the step
        output, _ = job.communicate(timeout=60)
        raise AssertionError(f"no end:\n{output}") from None
    return job.returncode, output


def ended(job: subprocess.Popen) -> str:
    """Stop a batch script that is of no use any more, and return what it has printed."""
    job.send_signal(signal.SIGTERM)
    return job.communicate(timeout=60)[0]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def status_of(output: Path) -> dict:
    return json.loads((output / "status.json").read_text())


def test_the_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(map(str, [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")]))
    assert len(scripts) == 5
    done = subprocess.run(
        [shellcheck, "--external-sources", *scripts], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("permissions, umask", [("private", "0077"), ("group", "0007"), ("umask", "0022")])
def test_what_the_scripts_make_is_for_those_who_may_read_the_run(permissions, umask):
    script = f"""
set -euo pipefail
umask 022
unset SLURM_UMASK
source {SCRIPTS / "common.sh"}
step() {{ printf 'output_dir: here\\npermissions: {permissions}\\n'; }}
check 2 --config any.yaml
echo "$(umask) ${{SLURM_UMASK:-0022}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{umask} {umask}"), done


@pytest.mark.slow
def test_many_nodes(cluster, data):
    """Two machines with a task each: two ranks that find each other at the first machine."""
    output = cluster.root / "out"
    output.mkdir()
    (output / "status.json").write_text('{\n  "state": "failed",\n  "exit_code": 1,\n  "step": 9\n}\n')
    code, text = cluster.run(
        "many_nodes.sbatch",
        *CONFIG,
        *settings(data, output, *SHORT),
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS_PER_NODE="1",
    )
    logs = {path.name: path.read_text() for path in (output / "logs").iterdir()}
    assert code == 0, (text, logs)
    assert "data-parallel size 2" in " ".join(text.split()), "the plan comes first"
    assert status_of(output) == {"state": "done", "exit_code": 0, "checkpoint": "step-00000002", "step": 2}
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2
    assert "step 2/2" in logs[f"slurm-{cluster.job_id}-rank-0.out"]
    assert set(logs) == {
        *(f"slurm-{cluster.job_id}-rank-{rank}.out" for rank in range(2)),
        *(f"rank-000{rank}.log" for rank in range(2)),
    }
    dry_run, training = cluster.noted("srun")
    assert dry_run["ntasks"] == 1 and training["ntasks"] == 2 and training["kill_on_bad_exit"] == 1
    assert training["master"] == f"127.0.0.1:{20000 + cluster.job_id % 10000}"
    assert cluster.noted("scontrol") == []


@pytest.mark.slow
def test_one_node(cluster, data):
    output = cluster.root / "out"
    code, text = cluster.run("one_node.sbatch", *CONFIG, *settings(data, output, *SHORT))
    assert code == 0, text
    assert "step 2/2" in text and status_of(output)["state"] == "done"
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2
    assert [oct(path.stat().st_mode & 0o777) for path in (output, output / "logs")] == ["0o700"] * 2


@pytest.mark.slow
def test_sweep(cluster, data):
    """Two lines, one array task each."""
    overrides = cluster.root / "sweep.txt"
    common = " ".join((f"data.shards={data.train}", f"evaluation.shards={data.held_out}", *SHORT))
    overrides.write_text(
        f'# learning rates\n\n{common} train.lr=1e-5\n  # features\n{common} "ebft.feature_layers=[0.5, 1.0]"\n'
    )
    arguments = ("sweep.sbatch", "configs/tiny_cpu.yaml", str(overrides))
    results = []
    for index in range(2):
        code, text = cluster.run(
            *arguments,
            SLURM_ARRAY_JOB_ID="77",
            SLURM_ARRAY_TASK_ID=str(index),
            SLURM_GPUS_ON_NODE="1",
            SWEEP_DIR=str(cluster.root / "a user's #1 $$USER"),  # $$ as in every path of a configuration
        )
        assert code == 0, text
        directory = cluster.root / "a user's #1 $USER" / f"000{index}"
        assert status_of(directory)["state"] == "done"
        results.append((directory / "config.resolved.yaml").read_text())
    assert "lr: 1.0e-05" in results[0] and "lr: 1.0e-05" not in results[1]
    assert results[1].split("feature_layers:")[1].split()[:4] == ["-", "0.5", "-", "1.0"]


def test_arguments_start_where_the_job_was_submitted(cluster, data, stand_in_job):
    """The repository lies elsewhere, and is named."""
    (cluster.root / "elsewhere").mkdir()
    (cluster.root / "elsewhere" / "mine.yaml").write_text("")
    (cluster.root / "elsewhere" / "sweep.txt").write_text("a=1\nb=2\n")
    launcher = stand_in_job / "launcher" / "train.py"
    launcher.write_text(
        "import sys, pathlib\nprint('output_dir: runs/x', pathlib.Path(sys.argv[2]).resolve(), sys.argv)\nsys.exit(2)\n"
    )
    code, text = cluster.run(
        *("sweep.sbatch", "mine.yaml", "sweep.txt"),
        repository=cluster.root / "elsewhere",
        EBFT_REPOSITORY=str(stand_in_job),
        **{"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"},
    )
    assert code == 2 and f" {cluster.root}/elsewhere/mine.yaml " in text and f"'{launcher}'" in text
    assert "'b=2', \"output_dir='runs/sweep-77/0001'\"" in text


def test_an_array_task_without_a_line_is_refused(cluster):
    overrides = cluster.root / "sweep.txt"
    overrides.write_text("train.lr=1e-5\n\n# nothing else\n")
    code, text = cluster.run(
        "sweep.sbatch", "configs/tiny_cpu.yaml", str(overrides), SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="1"
    )
    assert code == 2 and "array task 1 has no line" in text and cluster.noted("srun") == []


def test_a_bad_configuration_ends_before_anything_starts(cluster, data):
    output = cluster.root / "out"
    code, text = cluster.run("one_node.sbatch", *CONFIG, *settings(data, output, "ebft.strde=3"))
    assert code == 2 and "ebft.strde" in text
    assert len(cluster.noted("srun")) == 1 and not output.exists() and cluster.noted("scontrol") == []


@pytest.mark.parametrize("options", [("--without-data",), ("--gpu-memory", "80"), ("--gpu-memory=80",)])
def test_a_job_is_not_planned_without_its_data(cluster, options):
    code, text = cluster.run("one_node.sbatch", *CONFIG, *options)
    assert code == 2 and f"{options[0]} goes with --dry-run" in text and cluster.noted("srun") == []


@pytest.mark.slow
def test_damaged_data_in_mid_run_is_not_tried_again(cluster, data):
    damaged, output = cluster.root / "damaged", cluster.root / "out"
    shutil.copytree(data.train, damaged)
    shard = next(damaged.glob("*.tar"))
    dataset = open_dataset(damaged)
    offset = int(dataset.index[0]["offset"])
    dataset.close()
    content = bytearray(shard.read_bytes())
    content[offset + 600] ^= 1
    shard.write_bytes(content)
    more = (f"data.shards={damaged}", "train.max_steps=60", "ebft.rl_coef=0", "ebft.ce_coef=1")
    code, text = cluster.run("many_nodes.sbatch", *CONFIG, *settings(data, output, *more), SLURM_NTASKS_PER_NODE="2")
    assert code == 4 and status_of(output)["exit_code"] == 4, text
    assert cluster.noted("scontrol") == []


STAND_IN_JOB = """
import json, os, signal, sys, time
from pathlib import Path
assert "OUTPUT" in os.environ
output = Path(os.environ["OUTPUT"])
if "--dry-run" in sys.argv:
    print("plan\\noutput_dir:", output)
    sys.exit(0)
rank, script = os.environ["SLURM_PROCID"], os.environ["SCRIPT"]
def end(exit_code, step):
    if rank == "0":
        status = {"state": "stopped", "exit_code": exit_code, "checkpoint": f"step-{step:08d}", "step": step}
        (output / "status.json").write_text(json.dumps(status, indent=2))
    sys.exit(exit_code)
def save(number, frame):
    end(75, int(os.environ.get("STEP", "5")))
if script == "dies":
    sys.exit(0)
if script == "stopped in the start":
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))  # of srun, once the other rank has ended
    (output / f"started-{rank}").touch()
    for _ in range(600):
        if all((output / f"started-{other}").exists() for other in range(2)):
            os._exit(75)  # at its own end Python would give the handler up
        time.sleep(0.1)
if script == "swallowed":
    if rank == "0":
        (output / "status.json").write_text(json.dumps({"state": "failed", "exit_code": 3, "step": 1}, indent=2))
    sys.exit(0)
(output / f"started-{rank}").touch()
time.sleep(1)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
(output / f"ready-{rank}").touch()
time.sleep(100)
"""


@pytest.fixture
def stand_in_job(tmp_path):
    """A repository whose launcher is a program that stops when it is asked to, sooner than a run would."""
    repository = tmp_path / "repository"
    (repository / "launcher").mkdir(parents=True)
    (repository / "launcher" / "slurm").symlink_to(SCRIPTS)
    (repository / "launcher" / "train.py").write_text(STAND_IN_JOB)
    return repository


def wait_for_ranks(job, output, what):
    """Wait until both ranks have left a file."""
    deadline = time.monotonic() + 60
    while not all((output / f"{what}-{rank}").exists() for rank in range(2)):
        assert job.poll() is None and time.monotonic() < deadline, ended(job)
        time.sleep(0.05)


def run_stand_in_job(cluster, repository, script, number=None, **variables):
    """Run the job on two nodes with a task each; the batch script gets the signal once the ranks can handle it."""
    output = cluster.root / "out"
    for file in (*output.glob("started-*"), *output.glob("ready-*")):
        file.unlink()
    job = cluster.start(
        "many_nodes.sbatch",
        repository=repository,
        OUTPUT=str(output),
        SCRIPT=script,
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS_PER_NODE="1",
        **variables,
    )
    if number is not None:
        wait_for_ranks(job, output, "started")
        job.send_signal(signal.SIGUSR1)  # too early for a handler: it must not kill the ranks
        wait_for_ranks(job, output, "ready")
        job.send_signal(number)
    return finish(job)


def test_a_run_that_was_stopped_in_time_is_requeued(cluster, stand_in_job):
    code, text = run_stand_in_job(cluster, stand_in_job, "saves", signal.SIGUSR1)
    assert code == 75 and "says 75" in text, text
    assert cluster.noted("scontrol") == [["requeue", str(cluster.job_id)]]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["one_node.sbatch", "many_nodes.sbatch"])
def test_a_requeued_run_resumes_where_it_was_stopped(cluster, data, script):
    """No stand-in but for Slurm itself."""
    output = cluster.root / "out"
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1"} if script == "many_nodes.sbatch" else {}
    arguments = [*CONFIG, *settings(data, output, "evaluation.interval=1000", "train.max_steps=100000")]
    job = cluster.start(script, *arguments, **nodes)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert job.poll() is None and time.monotonic() < deadline, ended(job)
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    code, text = finish(job)
    status = status_of(output)
    assert code == 75 and status["exit_code"] == 75 and status["state"] == "stopped", text
    assert status["checkpoint"] == f"step-{status['step']:08d}"
    assert cluster.noted("scontrol") == [["requeue", str(cluster.job_id)]]
    arguments[-1] = f"train.max_steps={status['step'] + 2}"
    code, text = cluster.run(script, *arguments, SLURM_RESTART_COUNT="1", **nodes)
    assert code == 0 and f"The run resumes from {output / 'checkpoints' / status['checkpoint']}" in text, text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(status["step"] + 3))


@pytest.mark.slow
def test_a_run_that_makes_no_progress_is_requeued_once(cluster, stand_in_job):
    for step, requeued in (("5", 1), ("6", 2), ("6", 2)):
        code, text = run_stand_in_job(cluster, stand_in_job, "saves", signal.SIGUSR1, STEP=step)
        assert code == 75 and len(cluster.noted("scontrol")) == requeued, text
    assert "stopped twice at step 6" in text


def test_a_run_that_was_stopped_during_the_start_is_requeued_once(cluster, stand_in_job):
    """Before there is anything that could say so in `status.json`."""
    (cluster.root / "out").mkdir()
    for requeued in (1, 1):
        code, text = run_stand_in_job(cluster, stand_in_job, "stopped in the start")
        assert code == 75 and len(cluster.noted("scontrol")) == requeued, text
    assert "stopped twice at the start" in text


def test_a_cancelled_job_is_not_requeued(cluster, stand_in_job):
    code, text = run_stand_in_job(cluster, stand_in_job, "saves", signal.SIGTERM)
    assert code == 75 and cluster.noted("scontrol") == [], text


def test_an_old_outcome_is_not_taken_for_this_one_s(cluster, stand_in_job):
    """A step that dies without a word, with an exit code of 0, after an earlier start was stopped."""
    output = cluster.root / "out"
    output.mkdir()
    (output / "status.json").write_text('{\n  "state": "stopped",\n  "exit_code": 75,\n  "step": 2\n}\n')
    code, text = run_stand_in_job(cluster, stand_in_job, "dies")
    assert code == 1 and "left no" in text and cluster.noted("scontrol") == []


def test_the_status_file_wins_over_the_launcher_s_code(cluster, stand_in_job):
    code, text = run_stand_in_job(cluster, stand_in_job, "swallowed")
    assert code == 3 and "says 3" in text


def test_a_container_gets_the_repository_unless_told_otherwise(cluster, stand_in_job):
    run_stand_in_job(cluster, stand_in_job, "dies", CONTAINER_IMAGE="ebft.sqsh")
    run_stand_in_job(cluster, stand_in_job, "dies", CONTAINER_IMAGE="ebft.sqsh", CONTAINER_MOUNTS="/data:/data")
    here = str(stand_in_job)
    for call, mounts in zip(cluster.noted("srun"), [f"{here}:{here}"] * 2 + ["/data:/data"] * 2, strict=True):
        assert call["container_image"] == "ebft.sqsh" and call["container_workdir"] == here
        assert call["container_mounts"] == mounts
