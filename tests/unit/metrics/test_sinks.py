"""Metrics reach every sink, and a sink that fails never stops the training."""

import contextlib
import io
import json
import logging
import math
import shutil

import pytest

from ebft_mega.errors import ResultsLostError
from ebft_mega.metrics import sinks
from ebft_mega.metrics.sinks import JsonlSink, MetricsWriter, cut_after


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=3, console=False)
    writer.log(1, {"train/loss": 2.5, "train/lr": 1e-3})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5, "train/lr": 1e-3}]
    writer.log(2, {"train/loss": math.nan})
    assert read_lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "train/loss": None}
    writer.close()
    writer.close()


def test_tensorboard_holds_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, total_steps=2, console=False)
    writer.log(1, {"ebft/alignment": 0.25})
    writer.log(2, {"ebft/alignment": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("ebft/alignment")] == [(1, 0.25), (2, 0.5)]


def test_resume_cuts_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a')
    writer = MetricsWriter(tmp_path, total_steps=4, console=False, resumed_step=2)
    writer.log(3, {"a": 30.0})
    writer.close()
    assert read_lines(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 30.0}]


def test_a_fresh_start_drops_an_older_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    MetricsWriter(tmp_path, total_steps=4, console=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_cut_after_reports_what_it_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_after(path, 0) == 0
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n[1]\n{"step": 1}\n')
    assert cut_after(path, 0) == 3
    assert path.read_bytes() == b'{"step": 0}\n'


class FullDisk:
    name = "tensorboard"

    def __init__(self, *_):
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_failing_sink_warns_once_and_the_others_continue(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sinks, "TensorboardSink", FullDisk)
    writer = MetricsWriter(tmp_path, total_steps=3, console=False)
    with caplog.at_level(logging.WARNING, logger="ebft_mega"):
        monkeypatch.setattr(logging.getLogger("ebft_mega"), "propagate", True)
        for step in (1, 2, 3):
            writer.log(step, {"train/loss": 1.0})
        writer.close()
    assert [record.message for record in caplog.records] == [
        "metrics are not reaching tensorboard ([Errno 28] No space left on device); training continues"
    ]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class ShortFile(io.FileIO):
    """A file on a full disk: takes only the first bytes of a line."""

    full = False

    def write(self, data):
        return super().write(data[:4] if self.full else data)


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.close()
    sink._file = ShortFile(tmp_path / "metrics.jsonl", "a+")
    sink.log(1, {"a": 1.0})
    sink._file.full = True
    for step in (2, 3):
        with pytest.raises(OSError, match="only 4 of"):
            sink.log(step, {"a": float(step)})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "a": 1.0}\n', "no torn line"
    assert sink.unwritten_lines == 2
    sink._file.full = False
    sink.close()
    assert sink.unwritten_lines == 0
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": step, "a": float(step)} for step in (1, 2, 3)]


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced", "removed at the end"])
def test_metrics_whose_file_changes_meanwhile_are_whole(tmp_path, change, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ebft_mega"), "propagate", True)
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, total_steps=3, console=False)
    writer.log(1, {"a": 1.0})
    if change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(tmp_path / "old")
    elif change == "replaced":
        (tmp_path / "new").write_text('{"step": 1, "edited": 1}\n')
        (tmp_path / "new").rename(path)
    writer.log(2, {"a": 2.0})
    if change == "removed at the end":
        path.unlink()
    writer.close()
    first = {"step": 1, "edited": 1} if change == "replaced" else {"step": 1, "a": 1.0}
    assert read_lines(path) == [first, {"step": 2, "a": 2.0}]
    words = "was replaced" if change == "replaced" else "was removed or renamed"
    assert sum(words in record.message for record in caplog.records) == 1


def test_metrics_without_their_directory_wait(tmp_path):
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(tmp_path / "run", total_steps=3, console=False)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    writer.log(1, {"a": 1.0})
    with pytest.raises(ResultsLostError, match="lacks its last 1 lines"):
        writer.require_whole()
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    writer.close()
    writer.require_whole()
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def make_unwritable(directory, how):
    """Put something in the place of a tensorboard directory, or take it away in mid-run."""
    if how == "a file":
        directory.write_text("notes")
    elif how == "a link to nothing":
        directory.symlink_to(directory / "nothing" / "there")
    elif how == "a library's own error":
        return RuntimeError("of a library")
    return None


@pytest.mark.parametrize("how", ["a file", "a link to nothing", "a library's own error"])
def test_a_tensorboard_directory_that_cannot_be_made(tmp_path, how, monkeypatch):
    failure = make_unwritable(tmp_path / "tensorboard", how)
    if failure is not None:

        def fail(*_):
            raise failure

        monkeypatch.setattr(sinks, "TensorboardSink", fail)
    writer = MetricsWriter(tmp_path, total_steps=2, console=False)
    writer.log(1, {"a": 1.0})
    writer.close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tensorboard_directory_that_is_removed_meanwhile(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=2, console=False)
    writer.log(1, {"a": 1.0})
    tensorboard = next(sink for sink in writer._sinks if sink.name == "tensorboard")
    tensorboard._writer.flush()
    shutil.rmtree(tmp_path / "tensorboard")
    writer.log(2, {"a": 2.0})
    with contextlib.suppress(OSError):
        tensorboard._writer.flush()
    writer.log(3, {"a": 3.0})
    writer.close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3
