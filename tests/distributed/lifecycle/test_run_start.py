"""What a start changes, and leaves alone, in a run directory that holds an earlier run."""

import hashlib
import json
import os
import shutil
import time

import pytest

from ebft_mega.data.store.opening import open_dataset
from ebft_mega.io.expanded_paths import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Setting, checkpoint, lines, make_datasets, run

ALONE = Setting(1, 1, 1)
PLUGIN = REPOSITORY / "examples" / "inverse_square_root.py"
EVERY_TWO = ("train.max_steps=4", "checkpoint.interval=2", "evaluation.interval=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The data, and a run of four steps with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("run-start")
    make_datasets(directory)
    assert run_ranks(1, run, str(directory), "first", ALONE, EVERY_TWO) == [0]
    return directory


def start(root, name, *overrides):
    """One start of a run."""
    assert run_ranks(1, run, str(root), name, ALONE, (*EVERY_TWO, *overrides)) == [0]


def refusal(root, name, *overrides):
    """The message of a start that is refused."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, run, str(root), name, ALONE, (*EVERY_TWO, *overrides))
    return str(caught.value)


def status(output):
    return json.loads((output / "status.json").read_text())


def contents(output):
    """Everything that a refused start must leave alone."""
    kept = [output / "metrics.jsonl", output / "samples.jsonl", output / "checkpoints" / "latest"]
    return [path.read_text() for path in kept], sorted(path.name for path in (output / "checkpoints").iterdir())


def without_model(root, name):
    """The first run as if it had been killed before it wrote its model."""
    shutil.copytree(root / "first", root / name)
    shutil.rmtree(root / name / "hf")
    return root / name


def test_refused_start_leaves_the_run_as_it_was(root):
    before = {path: path.stat().st_mtime_ns for path in (root / "first").rglob("*") if path.is_file()}
    for overrides in (("model.config.initializer_range=0.1",), (f"checkpoint.resume={checkpoint(root / 'first', 2)}",)):
        message = refusal(root, "first", *overrides)
        assert "output_dir: found" in message and "--fresh" in message
    assert {path: path.stat().st_mtime_ns for path in (root / "first").rglob("*") if path.is_file()} == before


def test_start_that_is_refused_late_leaves_no_results(root):
    """Refused for the initial model, whose weights are hashed only then."""
    resume = f"checkpoint.resume={checkpoint(root / 'first', 2)}"
    assert "expected the initial model of this run" in refusal(
        root, "late", "model.config.initializer_range=0.1", resume
    )
    assert sorted(path.name for path in (root / "late").iterdir()) == ["logs", "status.json"]
    assert status(root / "late") == {"state": "failed", "exit_code": 2, "checkpoint": None, "step": 2}


@pytest.mark.slow
def test_directory_of_another_run_becomes_this_run_s(root):
    resume = f"checkpoint.resume={checkpoint(root / 'first', 2)}"
    start(root, "taken", "model.config.initializer_range=0.1")
    other = (root / "taken" / "metrics.jsonl").read_text()
    assert "--fresh" in refusal(root, "taken", resume)
    assert run_ranks(1, run, str(root), "taken", ALONE, (*EVERY_TWO, resume), True) == [0]
    (aside,) = (root / "taken" / "previous").iterdir()
    assert (aside / "metrics.jsonl").read_text() == other and (aside / "hf" / "model.safetensors").exists()
    first = lines(root / "first")
    assert lines(root / "taken")[-2:] == first[3:]
    evaluations = lines(root / "taken")[:-2]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all(line.items() <= first[line["step"]].items() for line in evaluations)
    names = sorted(path.name for path in (root / "taken" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004"]
    # Started again the same way, as a requeued job is: there is nothing left to do.
    start(root, "taken", resume)
    assert lines(root / "taken")[-2:] == first[3:]


def test_latest_that_was_not_written_is_set_right(root):
    """With a plugin that the run did not have before, which is noted and recorded, and changes nothing by itself."""
    output = without_model(root, "pointing")
    latest = output / "checkpoints" / "latest"
    latest.write_text("step-00000002\n")
    start(root, "pointing", f"plugins=[{PLUGIN}]")
    sha256 = hashlib.sha256(PLUGIN.read_bytes()).hexdigest()
    notes = [json.loads(line)["text"] for line in (output / "notes.jsonl").read_text().splitlines()]
    assert f"the plugin {PLUGIN} (sha256 {sha256[:12]}) was not in use at the checkpoint" in notes
    for name in ("environment.json", "run.json", "hf/run.json"):
        recorded = json.loads((output / name).read_text())["plugins"]
        assert recorded == [{"name": str(PLUGIN), "file": str(PLUGIN), "sha256": sha256}]
    assert latest.read_text() == "step-00000004\n"
    assert status(output) == {"state": "done", "exit_code": 0, "checkpoint": "step-00000004", "step": 4}
    assert (output / "hf" / "model.safetensors").read_bytes() == (
        root / "first" / "hf" / "model.safetensors"
    ).read_bytes()


def test_broken_newest_checkpoint_is_passed_over_and_set_aside(root):
    without_model(root, "broken")
    (checkpoint(root / "broken", 4) / "state.json").write_text("{}")
    start(root, "broken")
    names = sorted(path.name for path in (root / "broken" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000002", "step-00000004", "step-00000004.broken"]
    assert lines(root / "broken") == lines(root / "first")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.max_steps=3",), "train.max_steps: found 3 optimizer steps; expected at least the 4 steps that are"),
        (
            ("train.max_steps=null", "train.max_tokens=960", "train.global_batch_size=2"),
            "train.global_batch_size: found 2, with train.max_tokens; expected as before (4 steps have read 16 rows)",
        ),
        (("seed=12",), "seed: found 12; expected 11, as in"),
        (("ebft.temperature=0.7",), "ebft.temperature: found 0.7; expected 0.8, as in"),
    ],
)
def test_what_does_not_go_with_the_checkpoint(root, overrides, words):
    before = contents(root / "first")
    assert words in refusal(root, "first", *overrides)
    assert contents(root / "first") == before


def test_fewer_rows_than_the_rest_of_the_run_reads(root):
    """So many steps of the smaller batch would fit the data, but not after what the larger ones have read."""
    source = "{only: {shards: %s, max_epochs: 0.5}}" % (root / "train")
    data = ("data.shards=null", f"data.sources={source}")
    start(root, "finite", *data, "train.global_batch_size=6")
    rows = open_dataset(root / "train").manifest.tokens // 2 // 24
    smaller = (*data, "train.global_batch_size=2", f"train.max_steps={rows // 2 - 1}")
    assert f"expected at least {24 + (rows // 2 - 5) * 2}: 24 that are read" in refusal(root, "finite", *smaller)


@pytest.mark.slow
def test_checkpoint_in_the_middle_of_an_evaluation(root):
    """Parameters are gathered then; what resumes from it makes the evaluation and logs it as the run itself did."""
    setting, steps = Setting(2, 1, 1), ("train.max_steps=2", "evaluation.interval=2")
    (root / "asked").mkdir()
    (root / "asked" / "SAVE").touch()
    later = time.time() + 3600  # no leftover of an earlier run
    os.utime(root / "asked" / "SAVE", (later, later))
    assert run_ranks(2, run, str(root), "asked", setting, steps) == [0, 0]
    folder = checkpoint(root / "asked", 0)
    assert json.loads((folder / "state.json").read_text())["pending_metrics"] == {}
    assert not (root / "asked" / "SAVE").exists()
    resume = f"checkpoint.resume={folder}"
    assert run_ranks(2, run, str(root), "answered", setting, (*steps, resume)) == [0, 0]
    assert lines(root / "answered") == lines(root / "asked") and len(lines(root / "asked")) == 3
