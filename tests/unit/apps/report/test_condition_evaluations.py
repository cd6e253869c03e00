"""Evaluations with conditions: what is read, pseudo-values of the calibration error, and what is refused."""

import json

import numpy as np
import pytest

from ebft_mega.apps.report.condition_evaluations import CalibrationFigures, read_condition_evaluations
from ebft_mega.errors import InputError
from ebft_mega.evaluation.conditions import CONFIDENCE_BINS, POSITION_BINS, Condition

ROWS = 3


def content(**fields):
    condition = {
        "temperature": 1,
        "completion_length": 4,
        "features": "trained",
        "means": {},
        "per_row": {"eval/alignment": [0.5, None, 0.7]},
        "per_position": {"eval/alignment": [[0.5] * POSITION_BINS] * ROWS},
    }
    bins = [[1.0] * CONFIDENCE_BINS] * ROWS
    per_row = {"eval/brier": [0.1, 0.2, None]} | {
        f"eval/bin_{key}": bins for key in ("tokens", "confidence", "correct")
    }
    base = {
        "data": "d",
        "rows": ROWS,
        "feature_model": "f",
        "completion_length": 4,
        "longest_completion": 8,
        "conditions": [condition, condition | {"completion_length": 8}],
        "calibration": [{"temperature": 1.0, "means": {}, "per_row": per_row}],
        "per_row": {"eval/ce_loss": [1.0, 2.0, 3.0]},
    }
    return base | fields


def written(path, found):
    path.mkdir(exist_ok=True)
    (path / "evaluation.json").write_text(json.dumps(found))
    return path


def test_everything_is_read(tmp_path):
    found = read_condition_evaluations({"a": written(tmp_path / "a", content())})["a"]
    assert list(found.conditions) == [Condition(1.0, 4), Condition(1.0, 8)]
    np.testing.assert_equal(found.condition(1.0).per_row["eval/alignment"], [0.5, np.nan, 0.7])
    assert found.condition(1.0, 8).per_position["eval/alignment"].shape == (ROWS, POSITION_BINS)
    assert found.calibration[1.0].tokens.shape == (ROWS, CONFIDENCE_BINS)
    assert found.ce_per_position is None and found.whole.per_row["eval/ce_loss"][2] == 3.0
    assert "conditions" not in found.whole.content
    with pytest.raises(InputError, match=r"conditions: found T=1 G=4 trained, .*; expected T=0.5 G=4 other"):
        found.condition(0.5, features="other")


def test_rows_that_are_no_pairs_and_files_that_lack_conditions_are_named_at_once(tmp_path):
    given = {
        "a": written(tmp_path / "a", content()),
        "other data": written(tmp_path / "o", content(data="e")),
        "other maps": written(tmp_path / "m", content(feature_maps={"trained": "last_token"})),
        "other temperature": written(tmp_path / "t", content(temperature=0.6)),
        "other anchors": written(tmp_path / "g", content(longest_completion=64)),
        "old": written(tmp_path / "old", {"rows": ROWS, "data": "d", "feature_model": "f"}),
        "none": tmp_path / "none",
    }
    with pytest.raises(InputError) as caught:
        read_condition_evaluations(given)
    lines = [str(problem) for problem in caught.value.problems]
    assert len(lines) == 5
    assert f"{tmp_path}/old/evaluation.json: conditions: found nothing; expected" in lines[0]
    assert f"{tmp_path}/none" in lines[1]
    assert f"{tmp_path}/o/evaluation.json: data" in lines[2]
    assert f"{tmp_path}/g/evaluation.json: longest_completion" in lines[3]
    assert f"{tmp_path}/m/evaluation.json: feature_maps" in lines[4]


def test_features_are_those_of_a_seed(tmp_path):
    """Where each seed has a warm start of its own, that one gives the features of the seed's evaluations."""
    given = {
        name: written(tmp_path / name.replace(" ", ""), content(feature_model=model))
        for name, model in (("a 0", "f0"), ("b 0", "f0"), ("a 1", "f1"), ("b 1", "f1"))
    }
    assert list(read_condition_evaluations(given, [["a 0", "b 0"], ["a 1", "b 1"]])) == list(given)
    with pytest.raises(InputError, match="b1/evaluation.json: feature_model") as caught:
        read_condition_evaluations(given, [["a 0", "b 0", "b 1"], ["a 1"]])
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="a1/evaluation.json: feature_model"):
        read_condition_evaluations(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["conditions"][0]["per_row"].update({"eval/alignment": [1.0]}), "1 rows of values; expected 3"),
        (lambda c: c["conditions"][0]["per_row"].update({"eval/alignment": [1, "x", 2]}), "numbers or null"),
        (lambda c: c["conditions"][1].update(temperature="warm"), "expected temperature, completion_length"),
        (lambda c: c["conditions"][1].update(completion_length=True), "expected temperature, completion_length"),
        (lambda c: c["conditions"].insert(0, 3), "values of another kind"),
        (lambda c: c["conditions"][0].pop("per_row"), "no 'per_row'"),
        (lambda c: c["calibration"][0]["per_row"].update({"eval/bin_tokens": [[1.0]] * 3}), "expected 3 x 15"),
        (lambda c: c.update(ce_per_position=[[float("nan")] * POSITION_BINS] * 3), "not finite"),
        (lambda c: c.update(completion_length=16), "completion_length: found 16; expected one of 4, 8"),
        (lambda c: c.pop("completion_length"), "completion_length: found None; expected one of 4, 8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, words):
    found = json.loads(json.dumps(content()))
    change(found)
    with pytest.raises(InputError, match="evaluation.json") as caught:
        read_condition_evaluations({"a": written(tmp_path / "a", found)})
    assert words in str(caught.value)


def calibration(seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 9, size=(12, CONFIDENCE_BINS)).astype(float)
    tokens[4] = 0.0
    confidence = tokens * (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    correct = np.round(confidence * generator.uniform(0.6, 1.1, size=CONFIDENCE_BINS))
    return CalibrationFigures(np.zeros(12), tokens, confidence, correct)


def test_pseudo_values_have_the_error_as_their_mean_and_its_slopes_as_differences():
    found = calibration(3)
    whole = found.error_of(np.ones(12))
    by_row = found.error_by_row
    assert np.isnan(by_row[4]) and np.nanmean(by_row) == pytest.approx(whole)
    expected = abs((found.confidence - found.correct).sum(0)).sum() / found.tokens.sum()
    assert whole == pytest.approx(expected)
    for row in (0, 7):
        times = np.ones(12)
        times[row] += 1e-6
        slope = (found.error_of(times) - whole) / 1e-6
        assert by_row[row] - whole == pytest.approx(slope * 11, rel=1e-3), "11 rows have tokens"


def test_no_tokens_no_error():
    nothing = np.zeros((2, CONFIDENCE_BINS))
    found = CalibrationFigures(np.zeros(2), nothing, nothing, nothing)
    assert np.isnan(found.error_by_row).all() and np.isnan(found.error_of(np.ones(2)))
