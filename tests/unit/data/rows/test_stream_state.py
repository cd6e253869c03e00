import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.rows.stream_state import SourceState, StreamState, check_resumable, resumed_row
from ebft_mega.errors import InputError

CODE = SourceState(
    name="code", fingerprint="a" * 64, tokenizer_sha256="b" * 64, weight="7/10", max_epochs=None, rows=70
)
BOOKS = CODE.model_copy(update={"name": "books", "fingerprint": "c" * 64, "weight": "3/10", "rows": 30})
SAVED = StreamState(seed=3, next_row=100, sequence_length=1024, sources=(CODE, BOOKS), skipped_rows=2)


def changed(**values: object) -> StreamState:
    return SAVED.model_copy(update=values)


def changed_source(**values: object) -> StreamState:
    return changed(sources=(CODE.model_copy(update=values), BOOKS))


def test_a_state_survives_being_written() -> None:
    assert StreamState.from_json(SAVED.to_json()) == SAVED
    assert check_resumable(StreamState.from_json(SAVED.to_json()), SAVED) == []
    capped = changed_source(max_epochs=2.5)
    assert StreamState.from_json(capped.to_json()) == capped


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"version":1', '"version":2', "version"),
        ('"next_row":100', '"next_row":-1', "next_row"),
        ('"next_row":100', '"next_row":"100"', "next_row"),
        ('"seed":3,', "", "seed"),
        ('"seed":3', '"seed":3,"epoch":0', "epoch"),
        ('"weight":"7/10"', '"weight":0.7', "sources.0.weight"),
        ("{", "[", "(text)"),
    ],
)
def test_a_state_that_is_none_is_refused(old: str, new: str, key: str) -> None:
    text = SAVED.to_json()
    assert old in text
    with pytest.raises(InputError) as caught:
        StreamState.from_json(text.replace(old, new, 1), "checkpoint/data.json")
    (problem,) = caught.value.problems
    assert (problem.where.partition(":")[0], problem.key) == ("checkpoint/data.json", key)


@pytest.mark.parametrize(
    ("current", "key", "old", "new"),
    [
        (changed(seed=4), "seed", "3", "4"),
        (changed(seed=None), "seed", "3", "None"),
        (changed(sequence_length=512, next_row=200), "data.sequence_length", "1024", "512"),
        (changed_source(fingerprint="d" * 64), "data.sources.code (fingerprint)", "a" * 64, "d" * 64),
        (changed_source(tokenizer_sha256="d" * 64), "data.sources.code (tokenizer_sha256)", "b" * 64, "d" * 64),
        (changed_source(weight="1/2"), "data.sources.code.weight", "7/10", "1/2"),
        (changed_source(max_epochs=2.0), "data.sources.code.max_epochs", "None", "2.0"),
        (changed(sources=(CODE,)), "data.sources", "code, books", "code"),
        (changed(sources=(BOOKS, CODE)), "data.sources", "code, books", "books, code"),
    ],
)
def test_a_change_is_refused_with_the_old_and_the_new_value(current: StreamState, key: str, old: str, new: str) -> None:
    with pytest.raises(InputError) as caught:
        check_resumable(SAVED, current)
    (problem,) = caught.value.problems
    assert (problem.key, problem.found) == (key, new)
    assert problem.expected.startswith(f"{old}, ")
    notes = check_resumable(SAVED, current, allow_changed=True)
    assert f"{key} was {old} and is {new} now" in notes


def test_all_changes_are_listed_at_once() -> None:
    sources = (CODE.model_copy(update={"fingerprint": "d" * 64, "weight": "1/2"}), BOOKS)
    with pytest.raises(InputError) as caught:
        check_resumable(SAVED, changed(seed=1, sequence_length=8, sources=sources))
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["seed", "data.sequence_length", "data.sources.code (fingerprint)", "data.sources.code.weight"]


def test_how_far_a_run_has_come_is_no_change() -> None:
    assert check_resumable(SAVED, changed(next_row=0, skipped_rows=0)) == []


@given(st.integers(0, 10**12), st.integers(1, 10**6), st.integers(1, 10**6))
def test_another_length_resumes_at_the_same_token_or_just_after(next_row: int, old: int, new: int) -> None:
    row = resumed_row(changed(next_row=next_row, sequence_length=old), new)
    assert 0 <= row * new - next_row * old < new
    assert resumed_row(changed(next_row=next_row, sequence_length=old), old) == next_row
