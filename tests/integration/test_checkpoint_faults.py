"""Kills, signals, full disks and damage: a run resumed afterwards equals the run that nothing had happened to."""

import os
import pickle
import random
import shutil
import signal

import pytest

from ebft_mega.checkpoint.commit import complete_folders
from ebft_mega.checkpoint.manifest import file_problems, read_manifest
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from tests.distributed.runs import checkpoint
from tests.integration.jobs import RANKS, SECONDS_TO_END, Site, assert_same_outcome, finish, forked, launched
from tests.integration.rank_with_faults import STAGES

STAGES_BEFORE_THE_COMMIT = tuple(STAGES)[: tuple(STAGES).index("renamed")]
EVERY = 2
# Each stage after the rename leaves one more checkpoint.
STEPS = EVERY * (len(STAGES) - len(STAGES_BEFORE_THE_COMMIT) + 1)
# Two runs with deterministic kernels are equal bit for bit, also where one of them was killed and resumed.
KERNELS = "deterministic=true"
LENGTH = (f"train.max_steps={STEPS}", f"checkpoint.interval={EVERY}", "checkpoint.keep_last=2", KERNELS)
ON_REQUEST_ONLY = (f"train.max_steps={STEPS}", "checkpoint.interval=1000", KERNELS)  # and at the end
KEPT = ["latest", f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data and a configuration."""
    return Site.made_in(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def clean(site):
    """A run that nothing happens to."""
    output = site.directory / "clean"
    finish(site, output, *LENGTH)
    assert entries(output) == KEPT
    return output


@pytest.fixture
def copy(clean, tmp_path):
    """The same as if it had been killed before it wrote its model, to be damaged: its last two checkpoints."""
    output = shutil.copytree(clean, tmp_path / "out")
    shutil.rmtree(output / "hf")
    return output


def entries(output):
    """Names of a run's checkpoints, and of whatever lies beside them."""
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def stopped_at(step):
    """What `status.json` says of a run that was asked to stop; before the first step nothing needs a checkpoint."""
    return {"state": "stopped", "exit_code": 75, "checkpoint": f"step-{step:08d}" if step else None, "step": step}


def kill_all(site, output, settings, stage, last):
    """Start, kill all ranks at a stage of the first checkpoint that is written, and look at what is left.

    Args:
        last: steps of the newest complete checkpoint before.
    Returns:
        Steps of the one after.
    """
    with forked(site, output, *settings, stage=stage) as job:
        job.wait_until_holding(STAGES[stage][2][0])
        job.kill()
        assert not last or f"going on after step {last} from" in job.console
    interval = int(settings[1].split("=")[1])
    last += 0 if stage in STAGES_BEFORE_THE_COMMIT else interval
    whole = complete_folders(output / "checkpoints")
    assert [folder.name for folder in whole][:1] == ([f"step-{last:08d}"] if last else [])
    for folder in whole:
        manifest = read_manifest(folder)
        assert file_problems(folder, manifest, manifest.files) == []
    return last


@pytest.mark.slow
def test_all_ranks_are_killed_at_every_stage_of_a_save(site, clean, tmp_path):
    last = 0
    for stage in STAGES:
        last = kill_all(site, tmp_path / "out", LENGTH, stage, last)
    console = finish(site, tmp_path / "out", *LENGTH)
    assert f"going on after step {last} from" in console
    assert entries(tmp_path / "out") == KEPT
    assert_same_outcome(clean, tmp_path / "out", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_all_ranks_are_killed_in_another_order(site, clean, tmp_path, seed):
    choice = random.Random(seed)
    order = choice.sample(tuple(STAGES), len(STAGES))
    order.sort(key=lambda stage: stage == "old one half deleted")  # last: there has to be an old one
    settings = (LENGTH[0], f"checkpoint.interval={choice.choice((1, EVERY))}", "checkpoint.keep_last=1", KERNELS)
    last = 0
    for stage in order:
        last = kill_all(site, tmp_path / "out", settings, stage, last)
    finish(site, tmp_path / "out", *settings)
    assert_same_outcome(clean, tmp_path / "out", STEPS)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_one_rank_is_killed(site, clean, tmp_path, seed):
    choice = random.Random(seed)
    phase = choice.choice(("rollout", "learning", "evaluation"))
    call = choice.randint(2, 3 if phase == "evaluation" else STEPS)
    victim = choice.randrange(RANKS)
    output = tmp_path / "out"
    with forked(site, output, *LENGTH, f"data.workers={seed % 2}", phase=phase, call=call) as job:
        job.wait_until_holding(*range(RANKS))
        job.rank(victim).kill()
        job.go()
        codes = job.end()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (phase, call, codes, job.console)
        assert job.status["state"] == "failed" and job.status["exit_code"] == 1, (job.status, job.console)
    finish(site, output, *LENGTH)
    assert_same_outcome(clean, output, STEPS)


def end_the_command(job):
    """Which ends at once and leaves everybody behind."""
    job.processes[0].terminate()
    job.processes[0].wait(SECONDS_TO_END)


# What is done to a job, and the code that the `deepspeed` command then ends with.
STOP_REQUESTS = {
    "SIGTERM to a rank": (lambda job: job.rank(1).terminate(), 75),
    "SIGUSR1 to a rank": (lambda job: job.rank(1).send_signal(signal.SIGUSR1), 75),
    "SIGINT to a rank": (lambda job: job.rank(1).send_signal(signal.SIGINT), 75),
    "SIGHUP to a rank": (lambda job: job.rank(0).send_signal(signal.SIGHUP), 75),
    "Ctrl-C": (lambda job: os.killpg(job.processes[0].pid, signal.SIGINT), -signal.SIGINT),
    "a terminal that closes": (lambda job: os.killpg(job.processes[0].pid, signal.SIGHUP), -signal.SIGHUP),
    "SIGTERM to launch.py": (lambda job: job.launch_py.terminate(), 1),
    "SIGTERM to deepspeed": (
        lambda job: (job.processes[0].terminate(), job.processes[0].wait(SECONDS_TO_END)),
        -signal.SIGTERM,
    ),
    "SIGTERM to the process group": (lambda job: os.killpg(job.processes[0].pid, signal.SIGTERM), -signal.SIGTERM),
    "the file STOP": (lambda job: (job.output / "STOP").touch(), 75),
    "the time limit": (lambda job: None, 75),
}
# When it happens: the phase, for which time it is entered, and the steps that are done when the run stops.
MOMENTS = {"start": (1, 0), "rollout": (3, 3), "learning": (3, 3), "evaluation": (2, 4)}
TIME_LIMIT = ("train.max_run_minutes=30",)


def stop_and_resume(site, clean, output, start, how, phase, codes, *settings, **options):
    """Ask a run to stop, look at what it leaves, and resume it.

    Args:
        start: `forked` or `launched`; takes `options`.
        codes: expected of what was started.
        settings: of the run until it stops.
    """
    call, step = MOMENTS[phase]
    clock_seconds = 3600.0 if how == "the time limit" else 0.0
    with start(
        site, output, *ON_REQUEST_ONLY, *TIME_LIMIT, *settings, phase=phase, call=call, clock=clock_seconds, **options
    ) as job:
        job.wait_until_holding(*range(RANKS))
        STOP_REQUESTS[how][0](job)
        job.go()
        assert job.end() == codes, job.console
    assert job.status == stopped_at(step), job.console
    assert entries(output) == ["latest", f"step-{step:08d}"] if step else not (output / "checkpoints").exists()
    assert not (output / "STOP").exists() and not (output / "run.lock").exists()
    console = finish(site, output, *ON_REQUEST_ONLY)
    assert (f"going on after step {step} from" in console) == bool(step)
    assert_same_outcome(clean, output, STEPS)


def test_a_signal_to_one_rank_in_mid_step_stops_all(site, clean, tmp_path):
    stop_and_resume(site, clean, tmp_path / "out", forked, "SIGUSR1 to a rank", "rollout", [75, 75])


def test_a_stop_during_the_start_leaves_a_checkpoint_as_it_was(site, copy):
    """The rank that is asked leaves at once; the other one, which is building, finds out when it looks for it."""
    settings = (f"train.max_steps={2 * STEPS}", *LENGTH[1:])
    with forked(site, copy, *settings, phase="start", call=1) as job:
        job.wait_until_holding(*range(RANKS))
        job.rank(1).send_signal(signal.SIGINT)
        assert job.processes[1].join(5) is None and job.processes[1].exitcode == 75, job.console
        assert job.status == stopped_at(STEPS)
        job.go()
        assert job.end() == [75, 75], job.console
    assert job.status == stopped_at(STEPS) and entries(copy) == KEPT
    assert "Traceback" not in job.console and not (copy / "run.lock").exists()


@pytest.mark.slow
def test_ranks_whose_launcher_has_gone_stop_in_mid_evaluation(site, clean, tmp_path):
    """The `deepspeed` command ends at once and leaves everybody behind; data are read by processes of their own."""
    how, settings = "SIGTERM to deepspeed", ("data.workers=1",)
    stop_and_resume(site, clean, tmp_path / "out", launched, how, "evaluation", [STOP_REQUESTS[how][1]], *settings)


@pytest.mark.slow
@pytest.mark.parametrize("phase", MOMENTS)
@pytest.mark.parametrize("how", STOP_REQUESTS)
def test_every_stop_request_in_every_phase(site, clean, tmp_path, how, phase):
    settings = ("data.workers=1",)
    stop_and_resume(site, clean, tmp_path / "out", launched, how, phase, [STOP_REQUESTS[how][1]], *settings)


@pytest.mark.slow
def test_a_signal_that_also_ends_the_reader_of_the_output(site, clean, tmp_path):
    """As in `deepspeed ... | tee log`: nobody reads any more what the ranks print."""
    how = "SIGTERM to the process group"
    stop_and_resume(site, clean, tmp_path / "out", launched, how, "learning", [STOP_REQUESTS[how][1]], pipe=True)


@pytest.mark.slow
def test_a_second_job_is_refused_and_a_checkpoint_taken_on_request(site, clean, tmp_path):
    output = tmp_path / "out"
    with forked(site, output, *ON_REQUEST_ONLY, phase="learning", call=3) as job:
        job.wait_until_holding(*range(RANKS))
        with forked(site, output, *ON_REQUEST_ONLY) as second:
            assert second.end() == [2] * RANKS
            assert f"process {job.rank(0).pid} on " in second.console and "which is running" in second.console
        (output / "SAVE").touch()
        job.go()
        assert job.end() == [0] * RANKS, job.console
    assert entries(output) == ["latest", "step-00000003", f"step-{STEPS:08d}"] and not (output / "SAVE").exists()
    assert_same_outcome(clean, output, STEPS)


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint(site, clean, tmp_path):
    output = tmp_path / "out"
    console = finish(site, output, *LENGTH, full=1)
    assert f"checkpoint of step {EVERY} FAILED: rank 1: " in console and "File too large" in console
    assert console.count("FAILED") == 1 and entries(output) == KEPT
    assert_same_outcome(clean, output, STEPS)


def test_a_disk_without_room_is_seen_before_anything_is_written(site, copy):
    shutil.rmtree(checkpoint(copy, STEPS))
    with forked(site, copy, *LENGTH, "checkpoint.on_error=stop", room=1000) as job:
        assert job.end() == [1] * RANKS, job.console
    assert f"the checkpoint of step {STEPS} could not be written: no room on the disk" in job.console
    assert "are needed, 0.000 GB are free" in job.console
    assert (copy / "hf" / "model.safetensors").exists(), "the model is written all the same"
    last = f"step-{STEPS - EVERY:08d}"
    assert job.status == {"state": "failed", "exit_code": 1, "checkpoint": last, "step": STEPS}
    assert entries(copy) == ["latest", last]


def test_a_directory_that_cannot_be_written_is_refused_at_once(site, tmp_path):
    with forked(site, tmp_path / "out", *LENGTH, "output_dir=/proc/ebft") as job:
        assert job.end() == [2] * RANKS
    assert "output_dir: found /proc/ebft, which cannot be written" in job.console


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("weights/rank-00001.safetensors", truncate),
    ("exp_avg/rank-00000.safetensors", flip_a_bit),
    ("exp_avg_sq/rank-00001.safetensors", os.unlink),
    ("manifest.json", truncate),
    ("state.json", flip_a_bit),
    ("tokenizer.model", os.unlink),
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [DAMAGES[1], *(pytest.param(*case, marks=pytest.mark.slow) for case in DAMAGES if case != DAMAGES[1])],
)
def test_a_damaged_checkpoint_is_passed_over_or_refused(site, clean, copy, name, damage):
    newest = checkpoint(copy, STEPS)
    damage(newest / name)
    with forked(site, copy, *LENGTH, f"checkpoint.resume={newest}") as job:
        assert job.end() == [2] * RANKS
    assert str(newest) in job.console and name in job.console
    console = finish(site, copy, *LENGTH)
    (note,) = [line for line in console.splitlines() if "passed over" in line]
    assert note.count(str(newest)) == 1 and note.count(name) == 1, "each is named once"
    assert f"going on after step {STEPS - EVERY} from" in console
    assert entries(copy) == sorted([*KEPT, f"{newest.name}.broken"])
    assert_same_outcome(clean, copy, STEPS)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(site, copy):
    for step in (STEPS - EVERY, STEPS):
        truncate(checkpoint(copy, step) / DAMAGES[0][0])
    before = (copy / "metrics.jsonl").read_bytes()
    with forked(site, copy, *LENGTH) as job:
        assert job.end() == [2] * RANKS
    assert job.console.count(DAMAGES[0][0]) >= 2 and "checkpoint.resume: never" in job.console
    assert entries(copy) == KEPT and (copy / "metrics.jsonl").read_bytes() == before


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_foreign_files_are_named_and_not_touched(site, clean, copy, tmp_path):
    folder = checkpoint(copy, STEPS)
    names = (".metadata", "weights/.metadata", "weights/rank-00009.safetensors", "pytorch_model.bin", "optimizer.pt")
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    console = finish(site, copy, *LENGTH)
    assert f"going on after step {STEPS} from" in console and all(name in console for name in names)
    assert not (tmp_path / "sprung").exists()
    assert_same_outcome(clean, copy, STEPS)
    pickle.loads((folder / names[0]).read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


@pytest.fixture(scope="module")
def others(site):
    """Datasets that are not the run's: of other text, and of other text with a tokenizer made of it."""
    directory = site.directory / "others"
    shutil.copytree(site.directory / "text" / "train", directory / "text")
    (directory / "text" / "more.py").write_text("".join(f"zebra{number} = quagga\n" for number in range(300)))
    train_tokenizer(directory / "text", 300, directory / "tokenizer")
    build_dataset(directory / "text", load_tokenizer(site.directory / "tokenizer"), directory / "text-only")
    for split in ("train", "held_out"):
        build_dataset(site.directory / "text" / split, load_tokenizer(directory / "tokenizer"), directory / split)
    return directory


@pytest.mark.parametrize(
    ("settings", "key", "old", "new"),
    [
        (("data.shards={others}/text-only",), "fingerprint", "", ""),
        (("data.shards={others}/train", "evaluation.shards={others}/held_out"), "tokenizer", "", ""),
        (("data.sequence_length=32",), "sequence_length", "24", "32"),
        (("model.config.intermediate_size=64",), "intermediate_size", "48", "64"),
        (("seed=12",), "seed", "11", "12"),
        (("ebft.temperature=0.7",), "ebft.temperature", "0.8", "0.7"),
    ],
    ids=["text", "tokenizer", "sequence", "architecture", "seed", "ebft"],
)
def test_a_checkpoint_of_another_run_is_refused(site, others, copy, settings, key, old, new):
    before = (copy / "metrics.jsonl").read_bytes()
    with forked(site, copy, *LENGTH, *(setting.format(others=others) for setting in settings)) as job:
        assert job.end() == [2] * RANKS, job.console
    problem = next(line for line in job.console.splitlines() if key in line)
    assert old in problem and new in problem
    assert entries(copy) == KEPT and (copy / "metrics.jsonl").read_bytes() == before
