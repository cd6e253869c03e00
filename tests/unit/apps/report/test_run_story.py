"""Head, warnings and checkpoints of a run's page; axes that show whole steps and no offset."""

import json
import logging
import os

import pytest

from ebft_mega.apps.report import evaluation_plot, plots
from ebft_mega.apps.report.plots import Chart, draw_chart, draw_intervals, draw_phases
from ebft_mega.apps.report.run_report import write_run_report
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.runtime.run_files import NOTES_NAME
from ebft_mega.train.observer import NotesSink
from tests.unit.apps.report.page_reader import PageReader
from tests.unit.apps.report.test_run_report import write_lines

DATE = 1_790_000_000  # 2026-09-21 14:13:20 UTC
LOGGED = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)]
RUN = {"model": "llama, 40,608 parameters, from models/tiny", "data": "data/train: 40 documents", "tokens": "576 in 24"}


def write_checkpoint(run, step, size):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {"state.json": {"bytes": size, "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "step": step, "files": files}))
    os.utime(folder / "manifest.json", (DATE + step, DATE + step))


def test_the_head_says_model_data_tokens_and_date(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 3, "train/loss": 1.0, "data/tokens": 393_216.0}])
    environment = {"run": RUN, "started": "2026-11-30 04:07:02 UTC"}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    html = write_run_report(tmp_path).read_text()
    head = PageReader(html).text.split("Training\n")[0]
    assert all(text in head for text in (*RUN.values(), "393,216", "2026-11-30 04:07:02 UTC"))
    assert write_run_report(tmp_path).read_text() == html, "the page says nothing of when it was drawn"


def test_a_damaged_record_of_the_head_leaves_the_rest(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", LOGGED)
    (tmp_path / "environment.json").write_text('{"run": [], "started": {"a": 1}}')
    text = PageReader(write_run_report(tmp_path).read_text()).text
    assert "{'a': 1}" in text and "3 optimizer steps" in text and "could not be made" not in text


def test_warnings_notes_skipped_steps_and_damaged_rows_are_shown(tmp_path):
    skipped = {1: 0.0, 2: 1.0, 3: 1.0, 4: 3.0}
    records = [{"step": step, "train/skipped_steps": count} for step, count in skipped.items()]
    write_lines(tmp_path / "metrics.jsonl", records)
    write_lines(tmp_path / "data_errors.jsonl", [{"step": 2, "shard": "a"}, {"step": 2}, {"step": 4}])
    notes = [{"step": step, "time": f"at {step}", "text": f"note {step}."} for step in range(70)]
    write_lines(tmp_path / NOTES_NAME, notes)
    text = PageReader(write_run_report(tmp_path).read_text()).text
    assert "2 steps were skipped, because something was not finite: 2, 4" in text
    assert "3 damaged rows were left out, first in steps 2, 4: data_errors.jsonl" in text
    assert "10 earlier notes are in notes.jsonl" in text and "note 9." not in text
    assert "at 10" in text and "note 69." in text


def test_a_run_without_warnings_or_checkpoints_says_nothing_of_them(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", LOGGED)
    text = PageReader(write_run_report(tmp_path).read_text()).text
    assert "Warnings" not in text and "Checkpoints" not in text


def test_checkpoints_are_listed_with_size_and_time_and_which_is_the_newest(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", LOGGED)
    write_checkpoint(tmp_path, 10, 2_500_000_000)
    write_checkpoint(tmp_path, 20, 1_000_000)
    (tmp_path / "checkpoints" / "step-00000015").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000020\n")
    cells = PageReader(write_run_report(tmp_path).read_text()).text.split("Checkpoints\n")[1].split()
    assert cells[4:12] == ["step-00000020", "newest", "2026-09-21", "14:13:40", "UTC", "20", "0.001", "GB"]
    assert cells[12:16] == ["step-00000015", "15", "not", "readable"]
    assert cells[16:23] == ["step-00000010", "2026-09-21", "14:13:30", "UTC", "10", "2.500", "GB"]


def test_warnings_of_the_logs_become_notes_until_the_run_ends(tmp_path):
    logger = logging.getLogger("ebft_mega.anything")
    sink = NotesSink(tmp_path / NOTES_NAME, step=4)
    sink.write("going on after step 4")
    logger.info("not for the page")
    sink.log(5, {})
    logger.warning("step %d: skipped", 6)
    sink.close()
    logger.warning("after the end")
    notes = [json.loads(line) for line in (tmp_path / NOTES_NAME).read_text().splitlines()]
    assert [(note["step"], note["text"]) for note in notes] == [
        (4, "going on after step 4"),
        (5, "warning: step 6: skipped"),
    ]
    broken = NotesSink(tmp_path / "none" / NOTES_NAME, step=0)
    broken.write("a place that cannot be written does no harm")
    broken.close()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their files."""
    figures = []

    def keep(path, figure, dots):
        figures.append(figure)

    for module in (plots, evaluation_plot):
        monkeypatch.setattr(module, "write_figure", keep)
    return figures


def axis_texts(axis):
    """Labels and the offset of an axis, as they are drawn."""
    axis.axes.figure.canvas.draw()
    return [label.get_text() for label in axis.get_ticklabels()], axis.get_offset_text().get_text()


# Values that matplotlib would otherwise show by an offset or a power of ten; steps that it would cut into halves.
CASES = (
    ([1, 2, 3], 2.300001),
    ([7], 0.0),
    ([1_000_000, 2_000_000, 3_000_000], 3e7),
    ([100_001, 100_002], 1e-6),
)


@pytest.mark.parametrize(("steps", "value"), CASES, ids=["three steps", "one step", "large", "near"])
def test_axes_show_whole_steps_and_no_offset(tmp_path, drawn, steps, value):
    values = [value * (1 + index * 1e-6) for index in range(len(steps))]
    curves = {"a": (steps, values), "whole": (steps, [1.0 + each for each in values])}
    assert draw_chart(Chart("a", "a", "a", (("a", "a"),)), curves, tmp_path / "a.png")
    assert draw_phases(curves, [("a", "a")], "whole", tmp_path / "b.png")
    for figure in drawn:
        (axes,) = figure.axes
        labels, offset = axis_texts(axes.xaxis)
        numbers = [label.replace(",", "").replace("\N{MINUS SIGN}", "-") for label in labels]
        assert offset == "" and numbers and all(number.lstrip("-").isdigit() for number in numbers), labels
        assert len(set(labels)) == len(labels) and set(map(int, numbers)) & set(range(steps[0], steps[-1] + 1))
        assert axis_texts(axes.yaxis)[1] == ""


def test_intervals_and_histograms_have_no_offsets_either(tmp_path, drawn):
    draw_intervals({"a": {"b - a": Interval(2.300001e-7, 2.3e-7, 2.300002e-7)}}, tmp_path / "a.png")
    content = {"a": 2.300001, "per_row": {"a": [2.300001, 2.300002, 2.300003]}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    evaluation_plot.plot_evaluation(tmp_path / "evaluation.json")
    assert len(drawn) == 2
    for figure in drawn:
        for axes in figure.axes:
            assert axis_texts(axes.xaxis)[1] == "" == axis_texts(axes.yaxis)[1]
    labels, _ = axis_texts(drawn[1].axes[0].yaxis)
    assert all(label.isdigit() for label in labels), "rows are whole"
