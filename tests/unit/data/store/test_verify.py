"""Whole shards from front to back: everything that is there is read, and every changed bit is noticed."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.store import verify
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import INDEX_DTYPE, fingerprint
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.verify import ShardReport, shard_documents, verify_dataset
from ebft_mega.errors import DamagedDataError, InputError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="session")
def shared_copy(dataset_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A copy that tests change and put right again."""
    return open_dataset(shutil.copytree(dataset_directory, tmp_path_factory.mktemp("verify") / "dataset"))


@pytest.fixture
def copy(dataset_directory: Path, tmp_path: Path) -> Dataset:
    return open_dataset(shutil.copytree(dataset_directory, tmp_path / "copy"))


def path_of(dataset: Dataset, shard: int) -> Path:
    return dataset.directory / dataset.manifest.shards[shard].name


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 1 << bit]))


def rebuild(directory: Path, records: np.ndarray) -> Dataset:
    """Make index and manifest describe the shards as they are now."""
    np.save(directory / "index.npy", records)
    fields = json.loads((directory / "dataset.json").read_text())
    index = (directory / "index.npy").read_bytes()
    fields["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    for number, entry in enumerate(fields["shards"]):
        content = (directory / entry["name"]).read_bytes()
        own = records[records["shard"] == number]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        entry |= {"documents": len(own), "tokens": int(own["tokens"].sum())}
    fields["documents"], fields["tokens"] = len(records), int(records["tokens"].sum())
    fields["fingerprint"] = fingerprint(fields)
    (directory / "dataset.json").write_text(json.dumps(fields))
    return open_dataset(directory)


def index_of(path: Path, names: Callable[[str], bool]) -> np.ndarray:
    """Records of the members of a shard that are chosen by name."""
    content = path.read_bytes()
    records = []
    with tarfile.open(path) as tar:
        for member in tar:
            if names(member.name):
                data = content[member.offset : member.offset + 512 + member.size]
                records.append((0, zlib.crc32(data), member.offset, member.size, member.size // 2 + 1))
    return np.array(records, INDEX_DTYPE)


@pytest.mark.parametrize("read_bytes", [1, 513, 5000, 1 << 22])
def test_a_pass_gives_what_random_access_gives(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(verify, "_READ_BYTES", read_bytes)
    number = 0
    for shard in range(len(dataset.manifest.shards)):
        for tokens in shard_documents(dataset, shard):
            assert tokens.dtype == np.uint16
            assert not tokens.flags.writeable
            assert tokens.tolist() == dataset.tokens(number).tolist()
            number += 1
    assert number == dataset.manifest.documents


def test_a_whole_dataset_has_no_problems(dataset: Dataset) -> None:
    assert list(verify_dataset(dataset)) == [
        ShardReport(str(path_of(dataset, shard)), entry.documents, entry.tokens, entry.bytes, ())
        for shard, entry in enumerate(dataset.manifest.shards)
    ]


@given(data=st.data())
def test_any_bit_of_any_shard_counts(shared_copy: Dataset, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, len(shared_copy.manifest.shards) - 1))
    entry = shared_copy.manifest.shards[shard]
    position, bit = data.draw(st.integers(0, entry.bytes - 1)), data.draw(st.integers(0, 7))
    begin = shared_copy.index["offset"].astype(int)
    within = (begin <= position) & (position < begin + 512 + shared_copy.index["payload_bytes"].astype(int))
    damaged = np.flatnonzero(within & (shared_copy.index["shard"] == shard)).tolist()
    path = path_of(shared_copy, shard)
    flip(path, position, bit)
    try:
        reports = list(verify_dataset(shared_copy))
        for document in damaged:
            with pytest.raises(DamagedDataError, match="crc32"):
                shared_copy.tokens(document)
    finally:
        flip(path, position, bit)
    assert [number for number, report in enumerate(reports) if report.problems] == [shard]
    problems = reports[shard].problems
    assert all(problem.shard == str(path) for problem in problems)
    assert [problem.document for problem in problems if problem.document is not None] == damaged
    assert problems[-1].expected == f"sha256 {entry.sha256}"
    assert reports[shard].documents == entry.documents - len(damaged)


@pytest.mark.parametrize(
    "place", ["inside a header", "at a member boundary", "inside a payload", "empty", "at the end"]
)
def test_a_cut_is_reported_with_its_document_and_the_size(copy: Dataset, place: str) -> None:
    offset = int(copy.index["offset"][2])
    size = copy.manifest.shards[0].bytes
    kept = {
        "inside a header": offset + 100,
        "at a member boundary": offset,
        "inside a payload": offset + 600,
        "empty": 0,
        "at the end": size - 1,
    }[place]
    os.truncate(path_of(copy, 0), kept)
    report = next(verify_dataset(copy))
    assert report.bytes == kept
    *documents, last = report.problems
    assert (last.expected, last.found) == (f"{size} bytes", f"{kept} bytes")
    if place == "at the end":
        assert documents == []
        assert report.documents == copy.manifest.shards[0].documents
    else:
        (damage,) = documents
        assert report.documents == damage.document == (0 if place == "empty" else 2)
        assert damage.found == f"{max(0, kept - offset)} bytes"
    with pytest.raises(DamagedDataError):
        list(shard_documents(copy, 0))


def test_what_follows_a_shard_is_reported(copy: Dataset) -> None:
    with path_of(copy, 1).open("ab") as file:
        file.write(b"x" * 5000)
    assert [len(report.problems) for report in verify_dataset(copy)][:3] == [0, 1, 0]
    with pytest.raises(DamagedDataError, match="found a longer file"):
        list(shard_documents(copy, 1))


def test_a_missing_shard_does_not_end_the_pass(copy: Dataset) -> None:
    path_of(copy, 1).unlink()
    copy.close()
    reports = list(verify_dataset(copy))
    assert [len(report.problems) for report in reports][:3] == [0, 1, 0]
    assert "No such file" in reports[1].problems[0].found
    assert (reports[1].documents, reports[1].tokens, reports[1].bytes) == (0, 0, 0)


def test_all_damaged_documents_are_reported(copy: Dataset) -> None:
    for document in (0, 2, 3):
        flip(path_of(copy, 0), int(copy.index["offset"][document]) + 520, 3)
    report = next(verify_dataset(copy))
    assert [problem.document for problem in report.problems] == [0, 2, 3, None]
    assert report.documents == copy.manifest.shards[0].documents - 3


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_shard(path: Path, *names: str) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, name in enumerate(names):
            add_member(tar, name, np.arange(number + 3, dtype="<u2").tobytes())


@pytest.fixture
def one_shard(make_dataset: Callable[..., Path]) -> Path:
    directory = make_dataset({"a.py": "a = 1\n", "b.py": "b = 2\n"})
    assert len(list(directory.glob("*.tar"))) == 1
    return directory


def test_a_key_that_stands_twice_in_a_shard_is_refused(one_shard: Path) -> None:
    """Index and manifest were made to match, so that every checksum is right."""
    path = one_shard / "shard-000000.tar"
    make_shard(path, "000000000.u16", "000000000.json", "000000000.u16")
    dataset = rebuild(one_shard, index_of(path, lambda name: name.endswith(".u16")))
    assert dataset.tokens(1).size == 5
    (report,) = verify_dataset(dataset)
    (problem,) = report.problems
    assert (problem.document, problem.expected, problem.found) == (1, "member 000000001.u16", "member 000000000.u16")
    with pytest.raises(DamagedDataError, match="document 1"):
        list(shard_documents(dataset, 0))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_document_that_the_index_leaves_out_is_reported(one_shard: Path, extra: int) -> None:
    names = ["000000000.u16", "000000000.json", "000000001.u16", "000000001.json"]
    names.insert(2 * extra, "000000009.u16")
    path = one_shard / "shard-000000.tar"
    make_shard(path, *names)
    dataset = rebuild(one_shard, index_of(path, lambda name: name.endswith(".u16") and "9" not in name))
    (report,) = verify_dataset(dataset)
    (problem,) = report.problems
    assert report.documents == 2
    assert "000000009.u16" in problem.found
    offset = problem.offset
    assert offset is not None
    assert path.read_bytes()[offset : offset + 13] == b"000000009.u16"


def test_token_ids_outside_the_vocabulary_are_reported(copy: Dataset) -> None:
    fields = json.loads((copy.directory / "dataset.json").read_text())
    largest = fields["max_token_id"]
    fields |= {"vocab_size": largest, "max_token_id": largest - 1}
    fields["fingerprint"] = fingerprint(fields)
    (copy.directory / "dataset.json").write_text(json.dumps(fields))
    problems = [problem for report in verify_dataset(open_dataset(copy.directory)) for problem in report.problems]
    assert problems
    assert {(problem.expected, problem.found) for problem in problems} == {(f"token ids below {largest}", str(largest))}


# The index itself: contradictions are found before anything is read.


@pytest.mark.parametrize(
    ("field", "document", "change"),
    [
        ("offset", 1, lambda value: value + 8192),
        ("offset", 1, lambda value: 512),
        ("offset", 0, lambda value: value + 3),
        ("offset", 29, lambda value: value + (1 << 20)),
        ("offset", 29, lambda value: (1 << 64) - 512),
        ("payload_bytes", 3, lambda value: value + 2),
        ("payload_bytes", 3, lambda value: (1 << 64) - 1024),
        ("tokens", 5, lambda value: value + 1),
        ("tokens", 5, lambda value: 0),
        ("shard", 0, lambda value: 1),
        ("shard", 29, lambda value: 77),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    copy: Dataset, field: str, document: int, change: Callable[[int], int]
) -> None:
    records = np.load(copy.directory / "index.npy")
    before = int(records[field][document])
    records[field][document] = change(before)
    np.save(copy.directory / "index.npy", records)
    fields = json.loads((copy.directory / "dataset.json").read_text())
    index = (copy.directory / "index.npy").read_bytes()
    fields["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    fields["fingerprint"] = fingerprint(fields)
    (copy.directory / "dataset.json").write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        open_dataset(copy.directory)
    (problem,) = caught.value.problems
    # An offset that moved forward overlaps the next document.
    assert problem.key in (f"document {document}", f"document {document + 1}")
    assert problem.where.endswith("index.npy")


def test_an_index_with_other_totals_than_the_manifest_is_refused(copy: Dataset) -> None:
    fields = json.loads((copy.directory / "dataset.json").read_text())
    fields["shards"][0]["tokens"] += 1
    fields["shards"][1]["tokens"] -= 1
    fields["fingerprint"] = fingerprint(fields)
    (copy.directory / "dataset.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="shard-000000.tar: found"):
        open_dataset(copy.directory)


def test_a_shard_that_is_named_twice_is_refused(copy: Dataset) -> None:
    fields = json.loads((copy.directory / "dataset.json").read_text())
    fields["shards"][1] |= {"name": fields["shards"][0]["name"]}
    fields["fingerprint"] = fingerprint(fields)
    (copy.directory / "dataset.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="2 shards named shard-000000.tar"):
        open_dataset(copy.directory)
