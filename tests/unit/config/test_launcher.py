"""The launcher up to the start of a run, as a user calls it: exit codes, texts, speed, no heavy import."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "deepspeed", "megatron", "webdataset", "transformers", "sentencepiece")
# Runs the launcher in this interpreter and reports, last of all, which heavy packages it has imported.
PROBE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def launch(*arguments, directory=ROOT, **environment):
    """Run the launcher with the heavy-import probe."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT / "launcher" / "train.py"), *map(str, arguments)],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_dry_run(inputs):
    done = launch("--config", inputs.write(), "--dry-run", "--world-size", "4", "--set", "train.lr=1e-5", "seed=3")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert "lr: 1.0e-05" in done.stdout and "seed: 3" in done.stdout
    assert "micro-batches per replica and step 1" in " ".join(done.stdout.split())
    assert "peak (states and the largest phase)" in done.stdout
    assert not (inputs.root / "run").exists()


def test_arguments_start_at_the_working_directory_and_the_configuration_s_paths_at_the_repository(inputs, tmp_path):
    name = inputs.write(output_dir="$PLACE/run", evaluation__shards="data/of/nobody").name
    (tmp_path / "home").symlink_to(inputs.root)
    for config in (f"--config={name}", f"--config=~/{name}"):
        directory = inputs.root if "~" not in config else tmp_path
        surroundings = {"PLACE": str(inputs.root), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = launch(config, "--dry-run", "--set", "data.shards=~/train", directory=directory, **surroundings)
        (line,) = done.stderr.splitlines()[:-1]
        assert done.returncode == 2 and f"{name}:8: evaluation.shards: {ROOT}/data/of/nobody: " in line
        assert line.startswith(str(tmp_path / "home") if "~" in config else str(inputs.root))


def test_dry_run_takes_the_world_size_of_its_launcher(inputs):
    arguments = ("--config", inputs.write(), "--dry-run", "--local_rank=1")
    assert launch(*arguments, **RANKS, RANK="1").stdout == ""
    first_rank = launch(*arguments, **RANKS, RANK="0")
    assert "data-parallel size 2" in " ".join(first_rank.stdout.split())


STEP = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
RANKS = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_dry_run_in_slurm_tasks_prints_once(inputs):
    arguments = ("--config", inputs.write(), "--dry-run")
    texts = [launch(*arguments, **STEP | {"SLURM_NNODES": "1", "SLURM_PROCID": rank}).stdout for rank in "01"]
    assert "processes 4" in " ".join(texts[0].split()) and texts[1] == ""


def test_bad_configuration_and_bad_input(inputs):
    done = launch("--config", inputs.write(ebft__strde=1, train__lr="fast"))
    assert done.returncode == 2 and done.stdout == "" and "HEAVY []" in done.stderr
    assert "run.yaml:14: train.lr: found 'fast'" in done.stderr
    assert "run.yaml:16: ebft.strde: found an unknown key" in done.stderr
    (inputs.root / "train" / "index.npy").unlink()
    done = launch("--config", inputs.write())
    assert done.returncode == 2 and "HEAVY []" in done.stderr and "index.npy" in done.stderr
    assert not (inputs.root / "run").exists()
    assert launch("--config", inputs.write(), **RANKS, RANK="1").stderr.startswith("HEAVY")


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "abc"}, "environment: WORLD_SIZE: found 'abc'; expected an integer from 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "environment: MASTER_ADDR: found nothing, with WORLD_SIZE 2; expected"),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "environment: LC_ALL: found 'C', whose encoding is ascii; expected UTF-8: LC_ALL=C.UTF-8, or PYTHONUTF8=1",
        ),
    ],
)
@pytest.mark.parametrize("options", [("--dry-run",), ()])
def test_bad_surroundings(inputs, environment, text, options):
    done = launch("--config", inputs.write(), *options, **environment)
    first, *others = done.stderr.splitlines()
    assert (done.returncode, done.stdout, others) == (2, "", ["HEAVY []"]) and first.startswith(text)
    assert not (inputs.root / "run").exists()


@pytest.mark.parametrize("options", [("--dry-run",), ()])
def test_workspace_of_cublas_that_does_not_repeat_its_bits(inputs, options):
    done = launch("--config", inputs.write(deterministic=True), *options, CUBLAS_WORKSPACE_CONFIG=":0:0")
    first, *others = done.stderr.splitlines()
    assert (done.returncode, done.stdout, others) == (2, "", ["HEAVY []"])
    assert first.startswith("environment: CUBLAS_WORKSPACE_CONFIG: found ':0:0'; expected :4096:8 or :16:8, or nothing")
    assert not (inputs.root / "run").exists()


def test_text_that_a_stream_does_not_have_is_escaped(inputs):
    path = inputs.write(output_dir=str(inputs.root / "r\u00e9sultats"))
    done = launch("--config", path, "--dry-run", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "r\\xe9sultats" in done.stdout.splitlines()[2], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--confg", "x"),
        (),
        ("--config", "x", "--world-size", "2"),
        ("--config", "x", "y"),
        ("--config", "x", "--without-data"),
        ("--config", "x", "--gpu-memory", "80"),
        ("--config", "x", "--distinct-shares", "0.5"),
        *(("--config", "x", "--dry-run", "--distinct-shares", *values) for values in (["1.1"], ["-1"], ["1"] * 4)),
        *(("--config", "x", option, "1") for option in ("--trace-warmup", "--trace-noise")),
        *(
            ("--config", "x", "--trace-step", "y", option, value)
            for option in ("--trace-warmup", "--trace-noise")
            for value in ("-1", "1.5", "one")
        ),
        *(("--config", "x", "--dry-run", "--gpu-memory", value) for value in ("0", "-1", "nan", "80GB", "1e300")),
    ],
)
def test_command_line_mistakes(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and "usage:" in done.stderr and "HEAVY []" in done.stderr


def test_help_and_dry_run_answer_at_once(inputs):
    assert "HEAVY []" in launch("--help").stderr
    path = inputs.write(
        data__sequence_length=8,
        ebft={"context_length": 2, "generate_max_len": 2, "stride": 2},
        train__global_batch_size=64,
        train__micro_batch_size=1,
        parallel={"tensor_parallel_size": 4, "pipeline_parallel_size": 4},
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = launch("--config", path, "--dry-run", "--world-size", "1024")
        times.append(time.perf_counter() - start)
        assert "771, 775, ... 1023" in done.stdout, done.stderr
    assert min(times) < 3  # half a second on a quiet machine


PLUGIN = """\
import torch

from ebft_mega.extension.reward_term import RewardTerm

print("of the plugin")


class Own(RewardTerm):
    \"\"\"Is zero.\"\"\"

    name = "own"

    def values(self, inputs):
        return torch.zeros(())
"""


def test_a_plugin_in_the_dry_run_and_one_that_is_missing_on_another_machine(inputs):
    (inputs.root / "own.py").write_text(PLUGIN)
    path = inputs.write(plugins=["own.py"], ebft__reward_terms={"own": 0.5})
    done = launch("--config", path, "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("of the plugin\n"), done.stderr
    sha256 = hashlib.sha256(PLUGIN.encode()).hexdigest()[:12]
    assert f"\nown.py             {inputs.root}/own.py, sha256 {sha256}\n  reward term own  Is zero.\n" in done.stdout
    assert "\nplugins: own.py imports torch, which a dry run waits for (" in done.stdout
    (inputs.root / "own.py").unlink()
    for local_rank, lines in (("0", 1), ("1", 0)):
        environment = {"RANK": f"{8 + int(local_rank)}", "LOCAL_RANK": local_rank, "WORLD_SIZE": "16"}
        done = launch("--config", path, "--dry-run", "--world-size", "16", **environment)
        assert done.returncode == 2 and done.stderr.count("own.py: no such file") == lines, done.stderr


def test_a_plan_without_data_for_a_memory(inputs):
    """Exit code 2 without the option, and where something is wrong with the rest."""
    shutil.rmtree(inputs.root / "train")
    path = inputs.write()
    assert launch("--config", path, "--dry-run").returncode == 2
    done = launch("--config", path, "--dry-run", "--without-data", "--gpu-memory", "0.5")
    assert done.returncode == 0 and "HEAVY []" in done.stderr, done.stderr
    assert "On accelerators of 0.5 GB" in done.stdout and "To be supplied before a start" in done.stdout
    assert "The run in short" not in done.stdout
    done = launch("--config", inputs.write(train__lr="fast"), "--dry-run", "--without-data")
    assert done.returncode == 2 and done.stdout == "" and "train.lr" in done.stderr


# Ends the launcher where it would import what trains, and says so.
UP_TO_THE_START = PROBE.replace("import runpy, sys", "import runpy, sys\nsys.modules['ebft_mega.lifecycle.run'] = None")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_start_says_in_short_what_it_does(inputs, rank):
    """Before anything heavy is loaded, and on one rank."""
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_THE_START, "launcher/train.py", "--config", str(inputs.write())],
        cwd=ROOT,
        env=os.environ | RANKS | {"RANK": rank},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "HEAVY []" in done.stderr and "ebft_mega.lifecycle.run" in done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith("start:")]
    expected = ["The", "model", "layout", "data", "tokens", "steps", "place", "checkpoints"]
    assert lines == (expected if rank == "0" else [])
