"""`tools/inspect_shards.py` and what it counts."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ebft_mega.data.builder.build_record import read_build_record
from ebft_mega.data.builder.shard_writer import DatasetWriter
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.inspection import count_metadata, length_histogram, lengths_of, read_metadata, rows_of
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import DamagedDataError
from tests.unit.hostile import FORGED_LINE, TEXTS, dangers

REPOSITORY = Path(__file__).resolve().parents[4]


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/inspect_shards.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_lengths_agree_with_the_documents(dataset: Dataset) -> None:
    lengths = lengths_of(dataset)
    expected = sorted(len(dataset.tokens(number)) + 1 for number in range(dataset.manifest.documents))
    assert (lengths.shortest, lengths.longest) == (expected[0], expected[-1])
    assert lengths.mean == sum(expected) / len(expected)
    assert lengths.percentiles["50"] == expected[(len(expected) - 1) // 2]
    assert sum(lengths.documents_by_power) == dataset.manifest.documents
    for power, (documents, tokens) in enumerate(zip(lengths.documents_by_power, lengths.tokens_by_power, strict=True)):
        inside = [length for length in expected if 2**power <= length < 2 ** (power + 1)]
        assert (documents, tokens) == (len(inside), sum(inside))
    histogram = length_histogram(lengths)
    assert len(histogram) - 1 == len(lengths.documents_by_power) - np.flatnonzero(lengths.documents_by_power)[0]
    assert max(line.count("#") for line in histogram) == 50


@pytest.mark.parametrize("sequence_length", [1, 16, 17, 64, 100_000])
def test_rows_with_several_documents(dataset: Dataset, sequence_length: int) -> None:
    documents = dataset.manifest.documents
    line = np.concatenate([np.full(len(dataset.tokens(number)) + 1, number) for number in range(documents)])
    rows = [line[begin : begin + sequence_length] for begin in range(0, len(line), sequence_length)]
    whole = [row for row in rows if len(row) == sequence_length]
    found = rows_of(dataset, sequence_length)
    assert found.rows == len(whole)
    assert found.tail_tokens == len(line) - len(whole) * sequence_length
    assert found.rows_with_several_documents == sum(len(set(row)) > 1 for row in whole)


def test_metadata_of_every_document(dataset: Dataset, texts: dict[str, str]) -> None:
    for number, path in enumerate(sorted(texts)):
        metadata = read_metadata(dataset, number)
        assert metadata["path"] == path
        assert metadata["sha256"] == hashlib.sha256(texts[path].encode()).hexdigest()
    source = str(metadata["source"])
    assert count_metadata(dataset) == {"licence": {"unknown": 30}, "source": {source: 30}}
    with pytest.raises(IndexError):
        read_metadata(dataset, 30)


def test_long_metadata(tmp_path: Path, tokenizer_directory: Path) -> None:
    writer = DatasetWriter(tmp_path, load_tokenizer(tokenizer_directory), 10_000)
    metadata = [{"path": "x" * length} for length in (10, 900, 1010, 1020, 5000)]
    for item in metadata:
        writer.add([5] * 300, item)
    writer.finish()
    assert [read_metadata(open_dataset(tmp_path), number) for number in range(5)] == metadata


def test_damaged_metadata_is_named(dataset_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_directory, tmp_path / "copy"))
    content = bytearray((copy / "shard-000000.tar").read_bytes())
    content[0] ^= 1
    (copy / "shard-000000.tar").write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"shard-000000\.tar: offset 0: document 0: expected a member '0000"):
        read_metadata(open_dataset(copy), 0)
    content[0] ^= 1
    content[512] ^= 0xFF
    (copy / "shard-000000.tar").write_bytes(content)
    with pytest.raises(DamagedDataError, match="offset 0"):
        read_metadata(open_dataset(copy), 0)


@pytest.mark.parametrize("size", [1 << 20, 1 << 40, 1 << 87])
def test_the_size_of_metadata_is_not_believed(dataset_directory: Path, tmp_path: Path, size: int) -> None:
    copy = Path(shutil.copytree(dataset_directory, tmp_path / "copy"))
    content = bytearray((copy / "shard-000000.tar").read_bytes())
    member = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    member.size = size
    content[:512] = member.tobuf(tarfile.GNU_FORMAT)
    (copy / "shard-000000.tar").write_bytes(content)
    with pytest.raises(DamagedDataError, match=f"found one of {size} bytes, of which the shard has "):
        read_metadata(open_dataset(copy), 0)


def test_the_page_for_people(dataset_directory: Path, dataset: Dataset, tmp_path: Path) -> None:
    done = inspect(dataset_directory, "--verify", "--metadata", "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    for part in (
        f"{dataset.manifest.tokens:,} (with one end-of-document token each), uint16",
        dataset.manifest.fingerprint,
        "0 duplicates, 0 empty, 0 unusable",
        "Lengths of documents in tokens",
        "Rows of 1,024 tokens",
        "Documents by licence\n            30  unknown",
    ):
        assert part in done.stdout
    assert "verified 30 of 30 documents" in done.stderr
    assert "every checksum is right" in done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_object_for_programs(dataset_directory: Path, dataset: Dataset) -> None:
    done = inspect(dataset_directory, "--json", "--sequence-length", 64, "--metadata")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dataset"]["tokens"] == dataset.manifest.tokens
    assert found["dataset"]["shards"] == len(dataset.manifest.shards)
    assert found["rows"]["rows"] == dataset.manifest.tokens // 64
    assert found["build"]["documents"] == found["metadata"]["licence"]["unknown"] == 30
    shown = json.loads(inspect(dataset_directory, "--show", 7, "--json").stdout)
    assert shown["tokens"] == dataset.tokens(7).tolist()


def test_one_document(dataset_directory: Path, texts: dict[str, str]) -> None:
    done = inspect(dataset_directory, "--show", 7)
    path = sorted(texts)[7]
    assert done.returncode == 0, done.stderr
    assert f"path: {path}\n" in done.stdout
    assert done.stdout.endswith(f"\n\n{texts[path]}\n")
    for options in (
        ("--show", 7, "--metadata"),
        ("--cache", "x"),
        ("--verify", "--verify"),
        ("--sequence-length", 10**27),
    ):
        done = inspect(dataset_directory, *options)
        assert done.returncode == 2
        assert ": found " in done.stderr
    done = inspect(dataset_directory, "--show", 30)
    assert done.returncode == 2
    assert "a number from 0 to 29" in done.stderr


def test_all_damage_is_listed(dataset_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_directory, tmp_path / "copy"))
    dataset = open_dataset(copy)
    damaged = (3, 20, 29)
    for number in damaged:
        record = dataset.index[number]
        path = copy / dataset.manifest.shards[record["shard"]].name
        content = bytearray(path.read_bytes())
        content[int(record["offset"]) + 515] ^= 1
        path.write_bytes(content)
    done = inspect(copy, "--verify")
    assert done.returncode == 4
    for number in damaged:
        assert f": document {number}: expected" in done.stderr
    assert "verified 27 of 30 documents" in done.stderr


@pytest.mark.parametrize("break_it", [lambda path: os.truncate(path, 100), lambda path: path.unlink()])
def test_a_dataset_that_cannot_be_opened(
    dataset_directory: Path, tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(dataset_directory, tmp_path / "copy"))
    break_it(copy / "shard-000001.tar")
    done = inspect(copy, "--verify")
    assert done.returncode == 2
    assert "shard-000001.tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_build_record_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_build_record(tmp_path) is None
    for content in ("{", "[]", '{"documents": 1}', "\xff"):
        (tmp_path / "build.json").write_text(content, encoding="latin-1")
        assert read_build_record(tmp_path) is None


def test_what_a_dataset_says_is_shown_as_letters(tmp_path: Path, tokenizer_directory: Path) -> None:
    """A document keeps its lines and tabs; the lines that describe it are not its own to write."""
    tokenizer = load_tokenizer(tokenizer_directory)
    (tmp_path / "data").mkdir()
    writer = DatasetWriter(tmp_path / "data", tokenizer, 10_000)
    document = "first\n\tsecond\x1b[31m\r\x9b\u202e"
    for text in TEXTS.values():
        named = text.encode("utf-8", "replace").decode()  # a dataset's metadata is UTF-8
        writer.add(tokenizer.encode(document), {"path": named, "licence": named, "source": named, named: named})
    writer.finish()
    number = list(TEXTS).index("forged_line")
    for arguments in (["--metadata"], ["--show", number], ["--show", number, "--json"], ["--metadata", "--json"]):
        done = inspect(tmp_path / "data", *arguments)
        assert done.returncode == 0 and done.stderr == ""
        assert dangers(done.stdout, "\n\t") == set()
        assert not any(line.startswith(FORGED_LINE) for line in done.stdout.splitlines())
        if "--json" in arguments:
            json.loads(done.stdout)
        elif "--show" in arguments:
            assert r"first" + "\n\tsecond" in done.stdout and tokenizer.decode(tokenizer.encode(document)) != ""


@pytest.mark.parametrize("place", ["/proc/x.png", "here/x.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "here").touch()
    done = inspect(tmp_path, "--plot", tmp_path / place if place[0] != "/" else place)
    assert done.returncode == 2 and "argument --plot: found '" in done.stderr and "expected a" in done.stderr
