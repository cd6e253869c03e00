"""The page of a run: everything logged is shown, nothing missing breaks it, every text is escaped."""

import json
import re
import sys

import numpy as np
import pytest

from ebft_mega.apps.report.plots import smooth
from ebft_mega.apps.report.run_records import curves, read_good_lines
from ebft_mega.apps.report.run_report import write_run_report
from tests.unit.apps.report.page_reader import PageReader


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def ebft_records(num_steps):
    keys = ("ebft/alignment", "ebft/diversity", "ebft/mean_reward", "ebft/cfm_loss", "ebft/rl_loss")
    keys += ("ebft/ce_loss", "ebft/advantages_std", "train/loss", "train/grad_norm", "train/lr")
    keys += ("perf/step_seconds", "perf/rollout_seconds", "perf/features_seconds", "perf/learn_seconds")
    yield {"step": 0, "eval/ce_loss": 3.0, "eval/alignment": 0.5}
    for step in range(1, num_steps + 1):
        yield {"step": step} | {key: 1.0 + 0.01 * step for key in keys}
    yield {"step": num_steps, "eval/ce_loss": 2.25, "eval/alignment": 0.75}


def test_full_run(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", ebft_records(60))
    sample = {
        "row": 1,
        "block": 2,
        "context": "x" * 1000,
        "target": "\n    return <b>",
        "alignment": [0.5, -0.25],
    }
    samples = [sample | {"step": step, "rollouts": [f"  a & {step}", "\tdone\n"]} for step in (0, 30, 60)]
    write_lines(tmp_path / "samples.jsonl", samples)
    (tmp_path / "config.resolved.yaml").write_text("seed: 0 # <i>\n")
    (tmp_path / "status.json").write_text('{"state": "done"}')

    html = write_run_report(tmp_path).read_text()
    page = PageReader(html)
    assert len(page.names(tmp_path)) == len(set(page.images)) >= 10
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 16_000 for picture in page.pictures)
    assert len(html) < 320_000, "small enough to be sent"
    text = page.text
    assert "strided EBFT, 60 optimizer steps, median 1.31 s per step" in text
    for shown in ("3.0000 (step 0)", "2.2500 (step 60)", "-0.7500", "+0.2500", "seed: 0 # <i>"):
        assert shown in text
    assert "↵\n    return <b>" in text, "whitespace and markup of a rollout are kept"
    assert "  a & 0" in text and "  a & 60" in text and "a & 30" not in text
    assert text.count("x" * 400) == 1 and "x" * 401 not in text
    assert not re.search(r"(src|href)=\"(https?:|/)", html), "the page is self-contained"


def test_every_further_term_of_the_reward_has_a_curve(tmp_path):
    keys = ("ebft/alignment", "ebft/edit_distance", "ebft/../up", "ebft/rl_loss", "ebft/word_count")
    write_lines(tmp_path / "metrics.jsonl", [dict.fromkeys(keys, 0.5) | {"step": step} for step in (1, 2)])
    page = PageReader(write_run_report(tmp_path).read_text())
    names = ["reward", "rl_loss", "term_edit_distance", "term_word_count"]
    assert page.names(tmp_path) == [f"plots/{name}.png" for name in names]
    assert "Mean over the rollouts, without the term's coefficient." in page.text


def test_cross_entropy_run_has_no_rollout_charts(tmp_path):
    records = [{"step": step, "train/loss": 2.0, "ebft/ce_loss": 2.0, "train/lr": 0.1} for step in (1, 2, 3)]
    write_lines(tmp_path / "metrics.jsonl", records)
    page = PageReader(write_run_report(tmp_path).read_text())
    assert page.names(tmp_path) == ["plots/loss.png", "plots/lr.png"]
    assert "cross-entropy only, 3 optimizer steps" in page.text


def test_empty_run(tmp_path):
    page = PageReader(write_run_report(tmp_path).read_text())
    assert page.images == []
    assert "no step was logged" in page.text


def test_a_run_in_which_nothing_was_finite_has_a_page_that_says_so(tmp_path):
    nothing = dict.fromkeys(("train/loss", "train/grad_norm", "ebft/alignment", "eval/alignment", "eval/ce_loss"))
    counts = {"eval/blocks_left_out": 12.0, "eval/rows_left_out": 0.0}
    records = [nothing | counts | {"step": step, "ebft/duplicate_share": 0.5, "train/lr": 0.1} for step in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", records)
    page = PageReader(write_run_report(tmp_path).read_text())
    assert "strided EBFT, 2 optimizer steps" in page.text
    assert "evaluation of step 2: 12 blocks were left out, because something was not finite" in page.text
    assert "rows' cross-entropies" not in page.text and "could not be made" not in page.text
    assert page.names(tmp_path) == ["plots/duplicates.png", "plots/lr.png"]


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    found = curves([{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 1, "b": 5}, {"step": 2, "a": 3.0}])
    assert found == {"a": ([2], [3.0]), "b": ([1], [5.0])}


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_good_lines(path) == ([], [])
    path.write_bytes(b'{"step": 1}\n{"st\n[2]\n{"step": "x"}\n\xff\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st')
    assert read_good_lines(path) == (
        [{"step": 1}, {"step": 2}],
        ["metrics.jsonl: 6 lines that are damaged are left out"],
    )


OBSTACLES = {
    "damaged metrics": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n" * 3), "3 lines that are damaged"),
    "a file where plots go": (lambda run: (run / "plots").write_text("notes"), "FileExistsError"),
    "a strange sample": (lambda run: (run / "samples.jsonl").write_text('{"step": 1}\n'), "KeyError"),
    "a damaged status": (lambda run: (run / "status.json").write_text("{"), "a part of this page"),
    "a configuration in another encoding": (
        lambda run: (run / "config.resolved.yaml").write_bytes(b"\xff"),
        "UnicodeDecodeError",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_whatever_cannot_be_shown_leaves_the_rest_of_the_page(tmp_path, name):
    write_lines(tmp_path / "metrics.jsonl", ebft_records(3))
    write_lines(tmp_path / "samples.jsonl", [])
    (tmp_path / "environment.json").write_text("shown all the same")
    place, words = OBSTACLES[name]
    place(tmp_path)
    text = PageReader(write_run_report(tmp_path).read_text()).text
    if name != "a configuration in another encoding":
        assert "shown all the same" in text
    assert words in text


def test_a_page_without_matplotlib(tmp_path, monkeypatch):
    write_lines(tmp_path / "metrics.jsonl", ebft_records(3))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = PageReader(write_run_report(tmp_path).read_text())
    assert page.images == [] and "2.2500 (step 3)" in page.text and "could not be made" in page.text


def test_smoothing_equals_a_naive_running_mean():
    values = np.random.default_rng(0).normal(size=100)
    naive = [values[max(0, i - 2) : i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(smooth(values), naive, atol=1e-12)
