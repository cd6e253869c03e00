"""What a start changes, and leaves alone, in a run directory that holds an earlier run."""

import json
import os
import shutil
import time

import pytest

from ebft_mega.data.store.opening import open_dataset
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Setting, checkpoint, lines, make_datasets, run

ALONE = Setting(1, 1, 1)
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


def test_refused_start_leaves_the_run_as_it_was(root):
    """Refused for the initial model, which is looked at late."""
    start(root, "other", "model.config.initializer_range=0.1")
    before = contents(root / "other")
    resume = f"checkpoint.resume={checkpoint(root / 'first', 2)}"
    message = refusal(root, "other", "model.config.initializer_range=0.1", resume)
    assert "expected the initial model of this run" in message
    assert contents(root / "other") == before
    outcome = {"state": "failed", "exit_code": 2, "checkpoint": "step-00000004", "step": 2}
    assert status(root / "other") == outcome


@pytest.mark.slow
def test_directory_of_another_run_becomes_this_run_s(root):
    start(root, "taken", "model.config.initializer_range=0.1")
    start(root, "taken", f"checkpoint.resume={checkpoint(root / 'first', 2)}")
    first = lines(root / "first")
    assert lines(root / "taken")[-2:] == first[3:]
    evaluations = lines(root / "taken")[:-2]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all(line.items() <= first[line["step"]].items() for line in evaluations)
    names = sorted(path.name for path in (root / "taken" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000002.abandoned", "step-00000004", "step-00000004.abandoned"]
    # Started again the same way, as a requeued job is: there is nothing left to do.
    start(root, "taken", f"checkpoint.resume={checkpoint(root / 'first', 2)}")
    assert lines(root / "taken")[-2:] == first[3:]


def test_latest_that_was_not_written_is_set_right(root):
    shutil.copytree(root / "first", root / "pointing")
    latest = root / "pointing" / "checkpoints" / "latest"
    latest.write_text("step-00000002\n")
    start(root, "pointing")
    assert latest.read_text() == "step-00000004\n"
    assert status(root / "pointing") == {"state": "done", "exit_code": 0, "checkpoint": "step-00000004", "step": 4}


def test_broken_newest_checkpoint_is_passed_over_and_set_aside(root):
    shutil.copytree(root / "first", root / "broken")
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
