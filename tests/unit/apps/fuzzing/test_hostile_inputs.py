"""Inputs that once raised something else than a refusal, or took a strange path: each is read or refused."""

import io
import json
import os
import struct

import numpy as np
import pytest

from ebft_mega.apps.fuzzing import readings, valid_files
from ebft_mega.apps.fuzzing.fuzzed_parsers import PARSERS
from ebft_mega.apps.fuzzing.valid_files import write_files
from ebft_mega.errors import DamagedDataError, InputProblems

BY_NAME = {parser.name: parser for parser in PARSERS}
DIGITS, NESTED, POINTER = "9" * 5000, "[" * 100_000, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def with_key(content: bytes, key: str, raw: str) -> bytes:
    """JSON whose key has a value that no writer of JSON would write."""
    return json.dumps(json.loads(content) | {key: "@"}).replace('"@"', raw).encode()


def npy(header: str) -> bytes:
    text = header.encode().ljust(118)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def pickled() -> bytes:
    target = io.BytesIO()
    np.save(target, np.array([print], dtype=object), allow_pickle=True)
    return target.getvalue()


def member_of_mark(text: str) -> bytes:
    """A tokenizer model of which a token is no UTF-8."""
    return valid_files.sentencepiece_tokenizer()["tokenizer.model"].replace(b"<mark>", text.encode("latin-1"))


CASES = [
    *(
        (parser, name, with_key(dict(BY_NAME[parser].files())[name], key, raw))
        for parser, name, key in (
            ("model-config", "config.json", "hidden_size"),
            ("manifest", "dataset.json", "tokens"),
            ("state", "state.json", "step"),
            ("run-record", "run.json", "steps"),
            ("status-and-lock", "status.json", "exit_code"),
            ("status-and-lock", "run.lock", "pid"),
            ("tokenizer-config", "tokenizer_config.json", "eos_token"),
            ("evaluation", "evaluation.json", "rows"),
            ("checkpoint-manifest", "manifest.json", "step"),
        )
        for raw in (DIGITS, NESTED, '"\\u0000"', '"\\ud800"', f'"{"a" * 5000}"', "1e999", "NaN", "null", "-1", "[]")
    ),
    ("metrics", "metrics.jsonl", f'{{"step": {DIGITS}}}\n{NESTED}\n{{"step": "a"}}\n{{"step": 1e999}}\n'.encode()),
    ("evaluation", "evaluation.json", with_key(valid_files.evaluation_file(), "per_row", "[]")),
    ("evaluation", "evaluation.json", with_key(valid_files.evaluation_file(), "per_row", '{"eval/ce_loss": 3}')),
    ("evaluation", "evaluation.json", with_key(valid_files.evaluation_file(), "per_row", '{"a": [[1], 2, 3]}')),
    ("evaluation", "evaluation.json", with_key(valid_files.evaluation_file(), "eval/ce_loss", "{}")),
    ("evaluation", "evaluation.json", b"\xff"),
    ("metrics", "metrics.jsonl", b'{"step": 1, "loss/total": ' + b"9" * 400 + b"}\n"),
    ("metrics", "metrics.jsonl", b'{"step": ' + b"9" * 400 + b', "loss/total": 1.0}\n'),
    *(
        ("index", "index.npy", content)
        for content in (
            *(b"", b"\x93NUMPY", npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"), pickled()),
            npy("{'descr': '<u8', 'fortran_order': False, 'shape': (%d,), }" % 2**62),  # noqa: UP031
            *(npy("{'descr': '<u8', 'fortran_order': False, 'shape': (-1,), }"), npy("{"), npy("[" * 100)),
        )
    ),
    *(
        ("tokenizer-model", "tokenizer.model", member_of_mark(text))
        for text in ("\xff\xff\xff\xff\xff\xff", "\x80mark>")
    ),
    ("tokenizer-config", "tokenizer_config.json", b'{"added_tokens_decoder": 5, "eos_token": "<|endoftext|>"}'),
    ("configuration", "run.yaml", b"model:\n  sequence_length: 2.5\ndata:\n  shards: a\noutput_dir: b\n"),
    ("configuration", "run.yaml", b'output_dir: "a\\0b"\n'),
    ("configuration", "run.yaml", b"output_dir: " + b"a" * 300 + b"\n"),
    ("configuration", "run.yaml", b"output_dir: " + b"a/" * 5000 + b"\n"),
    ("configuration", "run.yaml", b"[" * 100_000),
    ("configuration", "run.yaml", b"seed: " + b"9" * 5000 + b"\n"),
    *(
        (parser, name, POINTER)
        for parser, name in (
            ("tokenizer-model", "tokenizer.model"),
            ("tokenizer-json", "tokenizer.json"),
            ("model-config", "config.json"),
            ("safetensors", "model-00001-of-00001.safetensors"),
        )
    ),
]


@pytest.mark.parametrize(
    "parser, name, content", CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)]
)
def test_hostile_input_is_read_or_refused(tmp_path, parser, name, content):
    chosen = BY_NAME[parser]
    valid = dict(chosen.files())
    changed = {name: content}
    write_files(tmp_path / "case", valid | changed | dict(chosen.repair(valid | changed)))
    try:
        chosen.read(tmp_path / "case")
    except (InputProblems, DamagedDataError) as error:
        assert str(error).isprintable() or "\n" in str(error)
        if content == POINTER:
            assert "a Git LFS pointer, not the file: git lfs pull" in str(error)
    else:
        assert content != POINTER


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("make, words", [(os.mkdir, "a directory"), (os.mkfifo, "a FIFO")], ids=["folder", "fifo"])
def test_a_folder_or_a_fifo_in_place_of_weights_is_named(tmp_path, name, make, words):
    write_files(tmp_path, {"config.json": valid_files.model_files()["config.json"]})
    make(tmp_path / name)
    with pytest.raises(InputProblems, match=f"{name}: found {words}"):
        readings.model(tmp_path)
