"""Arms side by side: statements follow the intervals, and files that do not belong together are refused."""

import json

import numpy as np
import pytest

from ebft_mega.apps.report.arm_comparison import write_comparison
from ebft_mega.apps.report.evaluation_plot import plot_evaluation
from ebft_mega.errors import InputError

ROWS = 64


def write_evaluation(directory, shifts, groups=None, seed=0, **fields):
    """An evaluation whose rows are common noise plus the arm's shift and a little noise of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    common = np.random.default_rng(99).normal(2.0, 1.0, size=ROWS)
    own = np.random.default_rng(seed).normal(0.0, 0.01, size=ROWS)
    per_row = {key: (common + shift + own).tolist() for key, shift in shifts.items()}
    content = {"model": str(directory), "data": "validation", "rows": ROWS, "temperature": 0.6}
    content |= {key: float(np.mean(values)) for key, values in per_row.items()}
    content |= {"per_row": per_row} | fields
    if groups is not None:
        content["row_groups"] = groups
    (directory / "evaluation.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def arms(tmp_path):
    return {
        "warm start": write_evaluation(tmp_path / "w", {"eval/ce_loss": 0.0, "eval/alignment": 0.0}, seed=1),
        "CE-only": write_evaluation(tmp_path / "c", {"eval/ce_loss": -0.5, "eval/alignment": 0.0}, seed=2),
        "EBFT": write_evaluation(tmp_path / "e", {"eval/ce_loss": -0.2, "eval/alignment": 0.3}, seed=3),
    }


def shown(output):
    summary = json.loads((output / "comparison.json").read_text())
    return {(d["arm"], d["against"], d["metric"]): d["shown"] for d in summary["differences"]}, summary


def test_directions_follow_the_intervals(tmp_path, arms):
    html = write_comparison(arms, tmp_path / "out", notes=["not <looked> at"]).read_text()
    directions, summary = shown(tmp_path / "out")
    assert directions == {
        ("CE-only", "warm start", "eval/ce_loss"): "lower",
        ("CE-only", "warm start", "eval/alignment"): "none",
        ("EBFT", "warm start", "eval/ce_loss"): "lower",
        ("EBFT", "warm start", "eval/alignment"): "higher",
        ("EBFT", "CE-only", "eval/ce_loss"): "higher",
        ("EBFT", "CE-only", "eval/alignment"): "higher",
    }
    by_key = {(d["arm"], d["against"], d["metric"]): d["by_row"] for d in summary["differences"]}
    assert by_key["EBFT", "CE-only", "eval/ce_loss"]["mean"] == pytest.approx(0.3, abs=0.01)
    assert summary["statements"][0].startswith("CE-only against warm start — lower: cross-entropy (-0.4985 [")
    assert "no difference shown at 95 %: alignment" in summary["statements"][0]
    assert "64 held-out rows, temperature 0.6" in html
    assert "not &lt;looked&gt; at" in html
    assert "one seed" in html
    assert (tmp_path / "out" / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_another_reference(tmp_path, arms):
    write_comparison(arms, tmp_path / "out", reference="EBFT")
    directions, _ = shown(tmp_path / "out")
    assert ("warm start", "EBFT", "eval/ce_loss") in directions
    assert ("CE-only", "warm start", "eval/ce_loss") in directions


def test_groups_can_take_a_claim_back(tmp_path):
    """All of the difference comes from one group: certain by row, not by group."""
    groups = ["a"] * 32 + [f"g{row}" for row in range(4) for _ in range(8)]
    warm = write_evaluation(tmp_path / "w", {"eval/ce_loss": 0.0}, groups)
    content = json.loads((warm / "evaluation.json").read_text())
    rows = np.array(content["per_row"]["eval/ce_loss"])
    content["per_row"]["eval/ce_loss"] = (rows + np.where(np.arange(ROWS) < 32, 1.0, -0.2)).tolist()
    other = tmp_path / "o"
    other.mkdir()
    (other / "evaluation.json").write_text(json.dumps(content))
    write_comparison({"warm start": warm, "EBFT": other}, tmp_path / "out")
    directions, summary = shown(tmp_path / "out")
    (difference,) = summary["differences"]
    assert difference["by_row"]["low"] > 0 > difference["by_group"]["low"]
    assert list(directions.values()) == ["none"]
    assert f"[{difference['by_group']['low']:+.4f}" in summary["statements"][0], "the wider interval is quoted"


def without_figures(directory, rows, key="eval/alignment"):
    """The same evaluation with masked documents, of which some rows hold no whole block."""
    path = directory / "evaluation.json"
    content = json.loads(path.read_text())
    values = [None if row in rows else value for row, value in enumerate(content["per_row"][key])]
    known = [value for value in values if value is not None]
    content |= {"document_masking": True, "per_row": content["per_row"] | {key: values}}
    path.write_text(json.dumps({**content, key: float(np.mean(known))} if known else content))


def test_rows_without_figures_are_left_out_of_pairs(tmp_path):
    groups = [f"g{row // 8}" for row in range(ROWS)]
    arms = {}
    for seed, (name, shift) in enumerate({"warm start": 0.0, "EBFT": 0.3}.items()):
        shifts = {"eval/ce_loss": 0.0, "eval/alignment": shift, "eval/raw_cosine": shift}
        arms[name] = write_evaluation(tmp_path / name, shifts, groups, seed=seed)
        without_figures(arms[name], range(3, ROWS, 2))
        without_figures(arms[name], range(1, ROWS), "eval/raw_cosine")
    write_comparison(arms, tmp_path / "out")
    directions, summary = shown(tmp_path / "out")
    # One row is no pair of rows.
    assert {key[2]: found for key, found in directions.items()} == {"eval/ce_loss": "none", "eval/alignment": "higher"}
    found = {entry["metric"]: entry for entry in summary["differences"]}["eval/alignment"]
    rows = [json.loads((arm / "evaluation.json").read_text())["per_row"]["eval/alignment"] for arm in arms.values()]
    pairs = [new - old for old, new in zip(*rows, strict=True) if new is not None]
    assert len(pairs) == 33 and found["by_row"]["mean"] == pytest.approx(np.mean(pairs))
    assert found["by_group"]["low"] > 0
    assert "with masked documents" in summary["conditions"]

    assert plot_evaluation(arms["EBFT"] / "evaluation.json").read_bytes().startswith(b"\x89PNG")


def test_what_an_evaluation_left_out_is_no_pair_and_the_pages_say_so(tmp_path, arms):
    """Rows without a figure are allowed where they were counted; a metric of which nothing is left has no mean."""
    path = arms["EBFT"] / "evaluation.json"
    content = json.loads(path.read_text())
    content["per_row"]["eval/ce_loss"][5] = None
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="row 5 is not finite"):
        write_comparison(arms, tmp_path / "refused")
    content |= {"eval/rows_left_out": 1.0, "eval/blocks_left_out": 64.0, "eval/alignment": None}
    content["per_row"]["eval/alignment"] = [None] * ROWS
    path.write_text(json.dumps(content))
    page = write_comparison(arms, tmp_path / "out").read_text()
    sentence = "64 blocks and the cross-entropy of 1 rows were left out, because something was not finite."
    assert f"EBFT: {sentence}" in page and page.count("left out, because") == 1
    directions, summary = shown(tmp_path / "out")
    assert directions["EBFT", "warm start", "eval/ce_loss"] == "lower"
    assert ("EBFT", "warm start", "eval/alignment") not in directions
    assert summary["values"]["EBFT"]["eval/alignment"] is None
    content["per_row"] = {"eval/alignment": [None] * ROWS}
    path.write_text(json.dumps(content))
    assert plot_evaluation(path).read_bytes().startswith(b"\x89PNG")


def test_masked_and_shared_rows_are_not_compared(tmp_path, arms):
    without_figures(arms["EBFT"], [])
    with pytest.raises(InputError) as caught:
        write_comparison(arms, tmp_path / "out")
    assert {problem.key for problem in caught.value.problems} == {"document_masking"}


def test_a_file_from_before_there_was_masking_is_one_without(tmp_path, arms):
    path = arms["EBFT"] / "evaluation.json"
    content = json.loads(path.read_text())
    for masking in ({}, {"document_masking": False}):
        path.write_text(json.dumps(content | masking))
        write_comparison(arms, tmp_path / f"out{len(masking)}")


def test_unlike_files_are_all_named(tmp_path, arms):
    write_evaluation(tmp_path / "c", {"eval/ce_loss": 0.0}, temperature=1.0)
    write_evaluation(tmp_path / "e", {"eval/ce_loss": 0.0}, data="tuning")
    with pytest.raises(InputError) as caught:
        write_comparison(arms, tmp_path / "out")
    assert {problem.key for problem in caught.value.problems} == {"temperature", "data"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("data", "other", "the same --data"),
        ("data", None, "the same --data"),
        ("skipped_rows", 3, "the same --skip-rows"),
        ("temperature", 1.0, "--config, and --set ebft.temperature=...,"),
        ("document_masking", True, "--config, and --set data.document_masking=...,"),
        ("feature_model", "other", "--feature-model"),
        ("samples", 8, "the same --samples"),
        ("longest_completion", 8, "the same --completion-lengths"),
        ("feature_model", None, "--feature-model"),
    ],
)
def test_what_makes_two_evaluations_comparable_is_said(tmp_path, arms, field, value, advice):
    """Another value, and none at all, as with arms that were evaluated with their own feature models."""
    for name, path in arms.items():
        given = {"feature_model": "runs/warm/hf", "samples": 4, "longest_completion": 4}
        content = json.loads((path / "evaluation.json").read_text()) | given
        (path / "evaluation.json").write_text(json.dumps(content | ({field: value} if name == "EBFT" else {})))
    with pytest.raises(InputError) as caught:
        write_comparison(arms, tmp_path / "out")
    (line,) = map(str, caught.value.problems)
    assert f"{field}: found {'nothing' if value is None else ''}" in line
    assert (
        f"as for 'warm start': rows are compared in pairs; evaluate again (tools/evaluate.py), and give {advice}"
        in line
    )
    assert line.endswith(" to both")


def test_files_of_an_earlier_version_say_nothing_of_samples_and_lengths(tmp_path, arms):
    path = arms["EBFT"] / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples": 4, "longest_completion": 4}))
    assert write_comparison(arms, tmp_path / "out").exists()


def test_places_are_compared_whatever_way_they_are_written(tmp_path, arms, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in arms.items():
        content = json.loads((path / "evaluation.json").read_text())
        content |= {"data": "held-out" if name == "EBFT" else str(tmp_path / "held-out")}
        (path / "evaluation.json").write_text(json.dumps(content))
    assert write_comparison(arms, tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, key",
    [
        ({"per_row": {"eval/ce_loss": [1.0]}}, "per_row.eval/ce_loss"),
        ({"per_row": {"eval/ce_loss": [None] * ROWS}}, "per_row.eval/ce_loss"),
        ({"per_row": {"eval/ce_loss": [None] * ROWS}, "document_masking": True}, "per_row.eval/ce_loss"),
        ({"per_row": {"eval/alignment": [None] * ROWS}}, "per_row.eval/alignment"),
        ({"per_row": {"eval/alignment": [float("nan")] * ROWS}, "document_masking": True}, "per_row.eval/alignment"),
        ({"rows": 1}, "rows"),
        ({"row_groups": ["a"]}, "row_groups"),
    ],
)
def test_damaged_file(tmp_path, arms, change, key):
    path = arms["EBFT"] / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        write_comparison(arms, tmp_path / "out")
    assert key in {problem.key for problem in caught.value.problems}


def test_missing_file(tmp_path, arms):
    with pytest.raises(InputError, match="no such file"):
        write_comparison(arms | {"lost": tmp_path / "lost.json"}, tmp_path / "out")
