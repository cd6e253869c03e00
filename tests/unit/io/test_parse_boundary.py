"""Whatever a parser raises is a problem of the input; what is not about the input passes."""

import errno
import json
import logging
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import yaml

from ebft_mega.errors import BrokenCheckpointError, DamagedDataError, InputError, LockLostError
from ebft_mega.io.input_errors import read_input_bytes
from ebft_mega.io.parse_boundary import reading, shortage, words_of
from ebft_mega.io.process_signals import StopNow


class PanicException(BaseException):  # noqa: N818 (as the libraries in Rust name it)
    """Of the same name and base as that of the tokenizers library."""


def raises(error):
    def parse():
        raise error

    return parse


PARSERS = {
    "digits": (lambda: json.loads("1" * 5000), "an integer of more than 4300 digits"),
    "nesting": (lambda: json.loads("[" * 100_000), "values that are nested too deeply"),
    "JSON": (lambda: json.loads("{"), "Expecting property name"),
    "UTF-8": (lambda: b"a\xff".decode(), "byte 1, which is not UTF-8"),
    "surrogate": (lambda: "\ud800".encode(), "half of a surrogate pair"),
    "NUL": (lambda: open("a\0b"), "embedded null byte"),  # noqa: SIM115
    "overlong name": (lambda: open("a" * 5000), "File name too long"),  # noqa: SIM115
    "YAML": (lambda: yaml.safe_load("a: [b"), "while parsing a flow sequence"),
    "structure": (lambda: struct.unpack("<Q", b""), "unpack requires a buffer of 8 bytes"),
    "compression": (lambda: zlib.decompress(b"no"), "Error -3 while decompressing"),
    "tar": (lambda: tarfile.TarInfo.frombuf(b"x" * 512, "utf-8", "strict"), "invalid header"),
    "key": (lambda: {}["weight_map"], "no 'weight_map'"),
    "kind": (lambda: len(3), "values of another kind (object of type 'int' has no len())"),
    "attribute": (lambda: (3).items(), "values of another kind ("),
    "overflow": (lambda: (10**400) * 1.0, "a number that is too large ("),
    "iteration": (lambda: next(iter(())), "StopIteration"),
    "memory": (raises(MemoryError()), "sizes for which there is not enough memory"),
    "sentencepiece": (raises(RuntimeError("Internal: could not parse ModelProto")), "could not parse ModelProto"),
    "panic": (raises(PanicException("index out of bounds")), "index out of bounds"),
    "long words": (raises(ValueError("a" * 100_000)), "a" * 200),
}


def test_files_are_read_within_their_bound_whatever_size_they_say(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"x" * 10)
    assert read_input_bytes(file, "a JSON file", 10) == b"x" * 10
    with pytest.raises(InputError, match="10 bytes"):
        read_input_bytes(file, "a JSON file", 9)
    endless = Path("/proc/self/maps")  # of the kernel's files, all of which say 0
    assert endless.stat().st_size == 0
    with pytest.raises(InputError, match="more than 100 bytes"):
        read_input_bytes(endless, "a JSON file", 100)


@pytest.mark.parametrize("parse, words", PARSERS.values(), ids=PARSERS)
def test_whatever_a_parser_raises_is_bad_input_with_its_place(parse, words):
    with pytest.raises(InputError) as caught, reading("file.json", "key", "something else"):
        parse()
    (problem,) = caught.value.problems
    assert problem.where.startswith("file.json") and (problem.key, problem.expected) == ("key", "something else")
    assert words in problem.found and "\n" not in problem.found and len(problem.found) < 300
    assert caught.value.__cause__ is not None


def test_a_line_is_named_where_the_parser_knows_it():
    with pytest.raises(InputError) as caught, reading("file.json", "key", "JSON"):
        json.loads('{\n"a": b}')
    assert caught.value.problems[0].where == "file.json:2"


def test_the_cause_is_logged_for_those_who_mend_the_program(caplog):
    with caplog.at_level(logging.INFO), pytest.raises(InputError), reading("file", "key", "JSON"):
        json.loads("{")
    assert "Traceback" in caplog.text and "JSONDecodeError" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        BrokenCheckpointError([]),
        DamagedDataError("a.tar", 0, "a", "b"),
        LockLostError("lost"),
        KeyboardInterrupt(),
        SystemExit(3),
        StopNow(15),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_about_the_input_passes_unchanged(error):
    with pytest.raises(type(error)) as caught, reading("file", "key", "JSON"):
        raise error
    assert caught.value is error


def test_the_kind_of_error_can_be_chosen():
    with pytest.raises(BrokenCheckpointError), reading("file", "key", "JSON", BrokenCheckpointError):
        json.loads("{")


def test_too_few_file_descriptors_are_named_with_their_limit():
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    words = words_of(OSError(errno.EMFILE, "Too many open files"))
    assert f"this process may have {soft}" in words and "ulimit -n" in words
    assert "on this machine" in words_of(OSError(errno.ENFILE, "Too many open files in system"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("unable to write to file </torch_1_2>: No space left on device (28)", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
         "of shared memory. Please try to raise your shared memory limit.", "--shm-size"),
    ],
)  # fmt: skip
def test_what_torch_says_of_a_shortage_is_understood(text, words):
    assert words in shortage(RuntimeError(text))
    assert shortage(RuntimeError("No space left on device")) is None and shortage(ValueError("")) is None


def test_full_shared_memory_is_named_as_what_it_is():
    words = words_of(OSError(errno.ENOSPC, "No space left on device", "/dev/shm/ebft"))
    assert words.startswith("/dev/shm is full") and "bytes are free" in words and "--shm-size" in words
    assert words_of(OSError(errno.ENOSPC, "No space left on device", "/home/ebft")) == "No space left on device"
