"""What ranks send each other comes back to the last bit, and nothing but plain values and named classes is made."""

import json
import math
import pickle
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.manifest import FileRecord, Manifest
from ebft_mega.checkpoint.resume_candidates import Candidates
from ebft_mega.checkpoint.run_state import EvaluationRecord, Layout, RunState
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard
from ebft_mega.data.rows.stream_state import SourceState, StreamState
from ebft_mega.errors import (
    BrokenCheckpointError,
    DamagedDataError,
    FirstRankFailedError,
    ForeignMessageError,
    InputError,
    Problem,
)
from ebft_mega.lifecycle.standing import Action, Standing
from ebft_mega.runtime.message_text import from_message, to_message


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    where: Path
    colour: Colour


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    by_name: "dict[str, Inner | None]"


def there_and_back(value, *kinds):
    content = to_message(value, kinds)
    json.loads(content)
    return from_message(content, kinds)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.text(), st.booleans()), inner)
    ),
    max_leaves=20,
)


def exactly(value):
    """Tells apart whatever `==` does not: types, the sign of zero, the bits of NaN, the order of a mapping."""
    if isinstance(value, float):
        return struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", [(exactly(key), exactly(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [exactly(item) for item in value]
    return type(value).__name__, value


@settings(max_examples=100, deadline=None)
@given(plain)
def test_plain_values_come_back_to_the_last_bit(value):
    assert exactly(there_and_back(value)) == exactly(value)


def test_bits_of_numbers_that_are_not_finite():
    values = [math.inf, -math.inf, math.nan, struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0], -0.0]
    assert exactly(there_and_back(values)) == exactly(values)


def test_names_that_are_no_unicode():
    path = Path(b"caf\xe9".decode(errors="surrogateescape"))
    assert there_and_back([path, str(path)]) == [path, str(path)]


def test_classes_and_those_of_their_fields():
    value = Outer((Inner(Path("a/b"), Colour.RED),), {"x": None, "y": Inner(Path("c"), Colour.RED)})
    assert there_and_back(value, Outer) == value


def run_of_a_checkpoint():
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    fields = {"model_type": "llama", **sizes, "num_attention_heads": 1, "num_key_value_heads": 1}
    source = SourceState(name="a", fingerprint="0" * 64, tokenizer_sha256="1" * 64, weight="1", max_epochs=None, rows=3)
    return SavedRun(
        directory=Path("run/checkpoints/step-00000003"),
        manifest=Manifest(version=1, step=3, files={"state.json": FileRecord(bytes=1, sha256="2" * 64)}),
        manifest_sha256="3" * 64,
        state=RunState(
            step=3,
            optimizer_updates=3,
            skipped_steps=0,
            skipped_in_a_row=0,
            tokens=9,
            seed=0,
            data=StreamState(seed=0, next_row=3, sequence_length=3, sources=(source,)),
            feature_network=None,
            feature_source="",
            layout=Layout(
                data_parallel=1,
                tensor_parallel=1,
                pipeline_parallel=1,
                sequence_parallel=False,
                zero_stage=3,
                world_size=1,
            ),
            evaluations=(EvaluationRecord(step=0, metrics={"eval/ce_loss": math.inf}),),
            pending_metrics={"loss/total": -math.inf},
            started_from=None,
        ),
        config={"seed": 0, "train": {"betas": [0.9, 0.95], "lr": 1e-6}},
        architecture=Architecture.from_hf(fields, "config.json"),
    )


def indexed():
    shard = TensorShard(file="weights/rank-00000.safetensors", offsets=(0,), sizes=(4,))
    return TensorIndex(version=1, kinds={"weights": {"norm": IndexedTensor(shape=(4,), shards=(shard,))}})


@pytest.mark.parametrize(
    "value",
    [
        run_of_a_checkpoint(),
        indexed(),
        Candidates((Path("a"),), True, (1, 2), ("a note",), Path("a")),
        Standing(Action.RESUME, "words", 3, None, ("a note",)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_starts_of_runs_exchange(value):
    assert there_and_back((value, None), type(value)) == (value, None)


@pytest.mark.parametrize(
    "error",
    [
        InputError([Problem("a", "b", "c", "d", "e")]),
        BrokenCheckpointError((Problem("a", "b", "c", "d"),)),
        DamagedDataError("shard", 3, "this", "that", 4),
        PermissionError(13, "Permission denied", "a/b"),
        OSError("only words"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_type_and_words(error):
    again = there_and_back((None, error))[1]
    assert type(again) is type(error) and str(again).endswith(str(error))
    assert vars(again) == vars(error)


def test_of_other_errors_the_words_come():
    again = there_and_back(ZeroDivisionError("by nought"))
    assert type(again) is FirstRankFailedError and str(again) == "the first rank: ZeroDivisionError: by nought"


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Inner(Path("a"), Colour.RED), Path, print, 1j, Colour.RED])
def test_nothing_else_is_sent(value):
    with pytest.raises(TypeError, match="which ranks do not send each other here"):
        to_message([value])


@pytest.mark.parametrize("value", [10**40, -(10**40)])
def test_an_integer_that_no_rank_would_read_is_not_sent(value):
    assert from_message(to_message(value // 10)) == value // 10
    with pytest.raises(TypeError, match="an integer of more than 40 digits"):
        to_message([value])


class Trap:
    """Unpickling it raises."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was loaded')",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Trap()),
        pickle.dumps(Trap(), protocol=0),
        b"",
        b"NaN",
        b'"\xff"',
        b"[" * 100_000,
        b"9" * 5_000,
        b'{"Trap":{}}',
        b'{"Inner":{"where":{"path":"a"},"colour":{"Colour":"blue"}}}',
        b'{"Inner":{"where":{"path":"a"},"colour":{"Colour":"red"},"more":1}}',
        b'{"Inner":3}',
        b'{"tuple":[],"dict":[]}',
        b'{"tuple":{"a":1}}',
        b'{"dict":[[1]]}',
        b'{"dict":[[[1],2]]}',
        b'{"float":"00"}',
        b'{"float":1}',
        b'{"path":1}',
        b'{"error":["SystemExit",[]]}',
        b'{"error":["InputError",[]]}',
        b"{}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_no_message_is_refused(content):
    with pytest.raises(ForeignMessageError) as refused:
        from_message(content, (Inner,))
    assert len(str(refused.value)) < 1000
