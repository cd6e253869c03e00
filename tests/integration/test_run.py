"""A run through the real launcher, from the configuration file to the files a person looks at."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import tokenizer_sha256
from ebft_mega.metrics.phase_memory import ResidentMemory
from tests.integration.conftest import REPOSITORY, launch, settings

CONFIG = ["--config", "configs/tiny_cpu.yaml"]
PHASES = ("data", "rollout", "features", "reward", "learn", "update")
SHARES = [f"{name}{end}" for name in ("policy", "head", "features") for end in ("", "_max")]
TRAIN_KEYS = {
    *(
        "ebft/alignment",
        "ebft/diversity",
        "ebft/mean_reward",
        "ebft/cfm_loss",
        "ebft/rl_loss",
        "ebft/ce_loss",
    ),
    *("ebft/advantages_std", "ebft/duplicate_share", "train/loss", "train/grad_norm", "train/lr"),
    *(f"perf/{phase}_seconds" for phase in PHASES),
    # Whether a process may set its high-water mark back is up to the kernel.
    *(f"memory/{phase}_peak_bytes" for phase in PHASES if ResidentMemory().can_restart),
    *(
        "perf/step_seconds",
        "perf/checkpoint_seconds",
        "perf/communication_seconds",
        "perf/documents_per_second",
        "perf/tokens_per_second",
        "perf/rollout_tokens_per_second",
        *(f"perf/distinct_rows_share/{name}" for name in SHARES),
        "memory/peak_bytes",
    ),
    *("train/skipped_steps", "perf/step_seconds_min", "perf/step_seconds_max"),
    *("data/rows", "data/tokens", "data/epochs"),
}
EVALUATION_KEYS = {
    *("eval/ce_loss", "eval/cfm_loss", "eval/feature_matching_loss", "eval/alignment", "eval/raw_cosine"),
    *("eval/duplicate_share", "eval/rows_left_out", "eval/blocks_left_out"),
}


SECRET = "kept-in-the-environment"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Four steps on two ranks, the second and the third of them with a profile."""
    output = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as environment:
        for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HTTPS_PROXY", "EBFT_ANYTHING"):
            environment.setenv(name, f"http://{SECRET}:{SECRET}@localhost")
        completed = launch([*CONFIG, *settings(data, output, "profile.start=1", "profile.steps=2")], ranks=2)
    assert completed.returncode == 0, completed.stdout
    return output, completed.stdout


def test_run_directory_holds_what_the_interfaces_name(run, data):
    output, console = run
    status = json.loads((output / "status.json").read_text())
    assert status == {"state": "done", "exit_code": 0, "checkpoint": "step-00000004", "step": 4}
    resolved = yaml.safe_load((output / "config.resolved.yaml").read_text())
    assert resolved["data"]["shards"] == str(data.train) and resolved["ebft"]["generate_max_len"] == 4
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2
    assert {path.name for path in (output / "logs").iterdir()} == {"rank-0000.log", "rank-0001.log"}
    assert any((output / "tensorboard").iterdir())
    assert "<img" in (output / "report.html").read_text()
    assert sum(line.startswith("step ") and "loss" in line for line in console.splitlines()) >= 4


def test_the_console_of_a_run_says_each_phase_once_and_in_order(run):
    """Through the launcher and on two ranks; `test_announcements.py` shows that each line comes before the work."""
    console = run[1].splitlines()
    parts = ("start: ", "step ", "end: ", "report: ", "model:  ")
    lines = [line for line in console if line.startswith(parts) and not re.search(r": \d+\.\d s|in \d+\.\d s", line)]
    expected = (
        "start: checking ",
        "start: looking at what is in ",
        "start: loading torch, megatron-core and DeepSpeed",
        "start: connecting 2 processes: ",
        "start: opening the datasets",
        "start: taking the run directory ",
        "start: looking for checkpoints ",
        "start: hashing the initial model, ",
        "start: building the feature network, ",
        "start: filling the feature network with weights, ",
        "start: building the policy, ",
        "start: filling the policy with weights, ",
        "start: reading ",
        "start: opening metrics and tensorboard in ",
        "start: waiting until all ranks are as far",
        "start: evaluating the model of step 0 on ",
        "step 0/4  held out: ",
        "start: step 1: ",
        "step 1/4  loss ",
    )
    assert [line[: len(beginning)] for line, beginning in zip(lines, expected, strict=False)] == list(expected), lines
    ending = ("end: evaluating ", "step 4/4  loss ", "step 4/4  held out: ", "end: waiting ", "end: writing ")
    ending += ("end: drawing report.html", "report: ", "model:  ")
    assert [line[: len(beginning)] for line, beginning in zip(lines[-8:], ending, strict=True)] == list(ending), lines
    found = re.search(r"  ([\d,]+) tokens/s  peak (\d+\.\d\d) GiB  row (\d+) of (\d+)  epoch \d\.\d\d$", lines[-7])
    assert found and float(found[2]) > 0 and found[3] == found[4], lines[-7]


def test_everything_that_a_run_makes_is_its_owner_s_alone(run):
    output = run[0]
    assert [path for path in (output, *output.rglob("*")) if path.stat().st_mode & 0o077] == []


def test_no_secret_of_the_environment_is_written(run):
    output, console = run
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 10 and SECRET not in console
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert SECRET.encode() not in content, path


SAME = ("profile.start=1", "profile.steps=2")


def files(output):
    """Contents and times of everything in a run directory."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*") if path.is_file()}


def test_started_again_it_has_nothing_to_do_and_says_so_before_torch_is_imported(run, data):
    output, before = run[0], files(run[0])
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, "launcher/train.py", *CONFIG, *settings(data, output, *SAME)]
    for more, code, words in (
        ((), 0, "done at step 4, nothing to do"),
        (("--dry-run",), 0, "done at step 4, nothing to do"),
        (("--set", "seed=5"), 2, "another output_dir, or --fresh"),
        (("--dry-run", "--set", "seed=5"), 2, "another output_dir, or --fresh"),
    ):
        done = subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.stdout.endswith("False\n") and files(output) == before


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_started_again_under_a_launcher(run, data, tmp_path, ranks):
    output = tmp_path / "out"
    shutil.copytree(run[0], output)
    arguments = [*CONFIG, *settings(data, output, *SAME)]
    before = files(output)
    for _ in range(2):  # at once, when ranks have to agree, and when everything is old enough
        completed = launch(arguments, ranks=ranks)
        assert completed.returncode == 0 and completed.stdout.count("done at step 4, nothing to do") == 1
        assert files(output) == before
        for path in (output, *output.rglob("*")):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))
        before = files(output)
    completed = launch([*arguments, "--set", "seed=5"], ranks=ranks)
    assert completed.returncode == 2 and files(output) == before, completed.stdout
    model = (output / "hf" / "model.safetensors").read_bytes()
    (output / "status.json").unlink()
    completed = launch([*CONFIG, *settings(data, output, *SAME, "train.max_steps=6")], ranks=ranks)
    assert completed.returncode == 0 and "going on after step 4 from" in completed.stdout, completed.stdout
    assert (output / "hf" / "model.safetensors").read_bytes() != model
    completed = launch([*CONFIG, *settings(data, output, *SAME, "train.max_steps=3"), "--fresh"], ranks=ranks)
    assert completed.returncode == 0, completed.stdout
    (aside,) = (output / "previous").iterdir()
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 7
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4


def test_metrics_have_every_key_in_every_step(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        expected = {"step"}
        if line["step"] > 0:
            expected |= TRAIN_KEYS
        if line["step"] % 2 == 0:
            expected |= EVALUATION_KEYS
        assert set(line) == expected, line["step"]
    samples = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4}
    assert all(len(sample["rollouts"]) == 3 and isinstance(sample["target"], str) for sample in samples)


def test_ranks_communicate_for_a_part_of_the_step(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["perf/communication_seconds"] < line["perf/step_seconds"] for line in lines[1:])


def test_profile_has_the_phases_of_its_steps_on_every_rank(run):
    output, console = run
    assert f"profile of steps 2 to 3: {output / 'profile'}" in console
    assert {path.name for path in (output / "profile").iterdir()} == {"rank-0000.json.gz", "rank-0001.json.gz"}
    for path in (output / "profile").iterdir():
        with gzip.open(path, "rt") as file:
            ranges = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
        names = [event["name"] for event in ranges]
        assert sorted(name for name in names if name.startswith("step ")) == ["step 2", "step 3"]
        assert all(names.count(phase) == 2 for phase in PHASES)


def test_final_model_loads_with_transformers(run, data):
    model = AutoModelForCausalLM.from_pretrained(run[0] / "hf")
    tokens = torch.from_numpy(open_dataset(data.held_out).tokens(0)[:33].astype("int64"))[None]
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert 3.0 < loss < 7.0
    assert tokenizer_sha256(run[0] / "hf") == open_dataset(data.train).manifest.tokenizer_sha256


@pytest.mark.slow
def test_evaluating_the_final_model_gives_the_run_s_own_figures(run, data, tmp_path):
    command = ["tools/evaluate.py", "--model", str(run[0] / "hf"), "--data", str(data.held_out)]
    command += ["--output", str(tmp_path), *CONFIG, "--rows", "4"]
    completed = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert EVALUATION_KEYS <= set(evaluation) and (tmp_path / "evaluation.png").exists()
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    # The same rows, noise and policy; the frozen network differs (the run's initial model), cross-entropy
    # and duplicates do not need it.
    assert evaluation["eval/ce_loss"] == pytest.approx(last["eval/ce_loss"], abs=1e-5)
    assert evaluation["eval/duplicate_share"] == last["eval/duplicate_share"]
    assert all(len(values) == 4 for values in evaluation["per_row"].values())
    assert evaluation["eval/alignment"] == pytest.approx(sum(evaluation["per_row"]["eval/alignment"]) / 4)


@pytest.mark.slow
def test_evaluation_without_a_configuration_takes_rows_as_long_as_the_model_reads(run, data, tmp_path):
    command = ["tools/evaluate.py", "--model", str(run[0] / "hf"), "--data", str(data.held_out)]
    command += ["--output", str(tmp_path), "--rows", "2"]
    completed = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["sequence_length"] == 128 and evaluation["rows"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "key", "more"),
    [
        (None, "model.init_from", ("train.dtype=bfloat16",)),
        (2, "model.init_from", ("ebft.rl_coef=0", "ebft.ce_coef=1")),
        (2, "model.init_from", ("parallel.tensor_parallel_size=2", "zero.stage=1")),
        (2, "ebft.feature_model", ("parallel.pipeline_parallel_size=2", "ebft.feature_layers=[1.0]")),
    ],
    ids=["one", "data", "tensor", "pipeline"],
)
def test_weights_that_are_not_finite_are_named_with_their_file_at_the_start(run, data, tmp_path, ranks, key, more):
    broken, name = tmp_path / "model", "model.layers.3.mlp.up_proj.weight"  # on the last stage, in the last slice
    shutil.copytree(run[0] / "hf", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    initial = broken if key == "model.init_from" else run[0] / "hf"
    models = (f"model.init_from={initial}", "model.config=null", f"ebft.feature_model={broken}")
    completed = launch([*CONFIG, *settings(data, tmp_path / "out", *models, *more)], ranks=ranks)
    assert completed.returncode == 2, completed.stdout
    assert f"{broken / 'model.safetensors'}: {name}: found values that are infinite or no numbers" in completed.stdout
    assert "Traceback" not in completed.stdout and not list((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["exit_code"] == 2


@pytest.mark.slow
def test_a_run_without_any_finite_gradient_stops_and_says_so(run, data, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(run[0] / "hf", broken)
    tensors = load_file(broken / "model.safetensors")
    for part in ("up", "gate"):  # finite, but not what comes of it
        tensors[f"model.layers.2.mlp.{part}_proj.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors")
    more = (f"model.init_from={broken}", "model.config=null", "ebft.rl_coef=0", "ebft.ce_coef=1", "train.max_steps=30")
    completed = launch([*CONFIG, *settings(data, tmp_path / "out", *more)], ranks=None)
    assert completed.returncode == 1, completed.stdout
    assert "10 updates in a row" in completed.stdout
    assert "A restart will meet the same rows. To leave them out: --set 'data.skip_rows=[[0,39]]'" in completed.stdout
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 10


@pytest.mark.slow
def test_trace_has_the_named_tensors_and_leaves_no_run_directory(run, data, tmp_path):
    hf = run[0] / "hf"
    more = (f"model.init_from={hf}", "model.config=null")
    completed = launch(
        [*CONFIG, *settings(data, tmp_path / "run", *more), "--trace-step", str(tmp_path / "trace")],
        ranks=None,
    )
    assert completed.returncode == 0, completed.stdout
    assert not (tmp_path / "run").exists()
    assert {path.name for path in (tmp_path / "trace").iterdir()} == {"step.safetensors", "step.json"}
    tensors = load_file(tmp_path / "trace" / "step.safetensors")
    b, p, n, k, g = 4, 32, 3, 7, 4
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert described == {
        "tokens": (torch.int64, (b, p)),
        "rollouts": (torch.int64, (b, n, k, g)),
        "logprobs": (torch.float32, (b, n, k, g)),
        "target_logprobs": (torch.float32, (b, p - 1)),
        "gram": (torch.float64, (b, k, n + 1, n + 1)),
        **dict.fromkeys(("alignment", "diversity", "reward", "advantage"), (torch.float64, (b, n, k))),
    }
    numbers = json.loads((tmp_path / "trace" / "step.json").read_text())
    rl = -(tensors["advantage"][..., None] * tensors["logprobs"]).mean().item()
    ce = -tensors["target_logprobs"].mean().item()
    assert numbers["rl_loss"] == pytest.approx(rl, abs=1e-6)
    assert numbers["ce_loss"] == pytest.approx(ce, abs=1e-5)
    assert numbers["loss"] == pytest.approx(rl + 0.1 * ce, abs=1e-5)
    with safe_open(hf / "model.safetensors", "pt") as weights:
        checksum = sum(weights.get_tensor(name).double().abs().sum().item() for name in weights.keys())
    assert numbers["parameter_checksum_before"] == pytest.approx(checksum, rel=1e-9)
    assert numbers["update_norm"] > 0 and numbers["parameter_checksum_after"] != checksum


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_with_code_4(data, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(data.train, damaged)
    shard = next(damaged.glob("*.tar"))
    dataset = open_dataset(damaged)
    record = dataset.index[0]
    dataset.close()
    content = bytearray(shard.read_bytes())
    content[int(record["offset"]) + 600] ^= 1
    shard.write_bytes(content)
    output = tmp_path / "out"
    # Enough rows that the damaged document is met.
    more = ("train.max_steps=60", "evaluation.interval=1000", "ebft.rl_coef=0", "ebft.ce_coef=1")
    completed = launch([*CONFIG, *settings(data, output, f"data.shards={damaged}", *more)], ranks=2)
    assert completed.returncode == 4, completed.stdout
    assert json.loads((output / "status.json").read_text())["exit_code"] == 4
    assert shard.name in completed.stdout and "expected" in completed.stdout and "offset" in completed.stdout


def test_bad_input_starts_nothing(data, tmp_path):
    output = tmp_path / "out"
    arguments = [*CONFIG, *settings(data, output, "ebft.strde=3", "data.sequence_length=6")]
    completed = launch(arguments, ranks=1)
    assert completed.returncode == 2, completed.stdout
    assert "ebft.strde" in completed.stdout and "stride" in completed.stdout
    assert not output.exists()


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_made_is_bad_input(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    completed = launch([*CONFIG, *settings(data, tmp_path / "file" / "out")], ranks=None)
    assert completed.returncode == 2 and "output_dir" in completed.stdout, completed.stdout


def test_configs_of_the_repository_pass_a_dry_run_on_this_data(data, tmp_path):
    names = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))
    assert "quickstart.yaml" in names
    for name in ("tiny_cpu.yaml", "debug_2rank.yaml", "quickstart_warmstart.yaml"):
        arguments = [
            "--config",
            f"configs/{name}",
            *settings(data, tmp_path / "out"),
            "--dry-run",
            "--world-size",
            "2",
        ]
        completed = launch(arguments, ranks=None)
        assert completed.returncode == 0 and "Memory per rank" in completed.stdout, completed.stdout
