"""What a checkpoint says of its run comes back exactly, or is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.checkpoint.run_state import EvaluationRecord, RunState, StartedFrom
from ebft_mega.errors import BrokenCheckpointError, InputError
from tests.unit.checkpoint.folder_stand_ins import run_state

METRICS = st.dictionaries(st.text(), st.floats(), max_size=4)


@given(METRICS, st.none() | METRICS, st.integers(0, 2**63 - 1), st.booleans())
def test_a_state_survives_being_written(metrics, pending, number: int, is_new: bool) -> None:
    state = run_state(
        20,
        tokens=number,
        seed=number,
        evaluations=(EvaluationRecord(step=0, metrics=metrics), EvaluationRecord(step=number, metrics={})),
        pending_metrics=pending,
        feature_network=None if is_new else "d" * 64,
        started_from=None if is_new else StartedFrom(path="/runs/a", manifest_sha256="e" * 64),
    )
    text = state.to_json()
    again = RunState.from_json(text)
    assert repr(again) == repr(state)  # nan is not equal to itself
    assert again.to_json() == text

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_words_in_the_file() -> None:
    state = run_state(1, pending_metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0, "e": 1e-320})
    assert json.loads(state.to_json())["pending_metrics"] == {
        "a": "nan",
        "b": "inf",
        "c": "-inf",
        "d": -0.0,
        "e": 1e-320,
    }


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"step":20', '"step":-20', "step"),
        ('"step":20', '"step":"20"', "step"),
        ('"step":20', '"step":20.0', "step"),
        ('"step":20', '"step":20,"step":21', "(text)"),
        ('"step":20', '"step":1e400', "(text)"),
        ('"seed":3,', "", "seed"),
        ('"skipped_steps":0', '"skipped_steps":0,"rng":"cos"', "rng"),
        ('"metrics":{"eval/ce_loss":4.5}', '"metrics":{"eval/ce_loss":"4.5"}', "evaluations.0.metrics.eval/ce_loss"),
        ('"metrics":{"eval/ce_loss":4.5}', '"metrics":{"eval/ce_loss":"NaN"}', "evaluations.0.metrics.eval/ce_loss"),
        ('"metrics":{"eval/ce_loss":4.5}', '"metrics":{"eval/ce_loss":NaN}', "(text)"),
        ('"next_row":80', '"next_row":-1', "data.next_row"),
        ('"zero_stage":3', '"zero_stage":null', "layout.zero_stage"),
        ('"feature_network":"' + "c" * 64, '"feature_network":"' + "c" * 63, "feature_network"),
        ("{", "[", "(text)"),
    ],
)
def test_a_state_that_is_none_is_a_broken_checkpoint(old: str, new: str, key: str) -> None:
    text = run_state(20).to_json()
    assert old in text
    with pytest.raises(BrokenCheckpointError) as caught:
        RunState.from_json(text.replace(old, new, 1), "step-00000020/state.json")
    (problem,) = caught.value.problems
    assert problem.where.startswith("step-00000020/state.json")
    assert problem.key == key


@pytest.mark.parametrize(("part", "key"), [("", "version"), ("data", "data.version")])
def test_a_state_of_a_newer_version_is_named_as_such(part: str, key: str) -> None:
    fields = json.loads(run_state(20).to_json())
    (fields[part] if part else fields).update(version=2, surprise="x")
    with pytest.raises(InputError) as caught:
        RunState.from_json(json.dumps(fields))
    (problem,) = caught.value.problems
    assert (problem.key, problem.found, problem.expected) == (key, "2, written by a newer version of ebft_mega", "1")


def test_a_state_of_no_version_is_broken() -> None:
    for version in (0, -1, "2", None):
        fields = json.loads(run_state(20).to_json()) | {"version": version}
        with pytest.raises(BrokenCheckpointError):
            RunState.from_json(json.dumps(fields))
