"""The damage matrix: every kind of damage, before the start and in mid-run, with both policies.

What a damage hits is worked out by comparing bytes; which rows that touches, by reading the whole dataset. Then a run
must stop at the first of these rows, or leave out exactly these rows and name each.
"""

import itertools
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ebft_mega.data.rows.loader import BatchLoader, SkippedRow
from ebft_mega.data.rows.stream import Row, RowStream
from ebft_mega.data.store import remote
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.shard_cache import ShardCache, WrongShardError
from ebft_mega.errors import DamagedDataError, InputError
from ebft_mega.extension.store import Transfer
from tests.unit.data.store.https_server import Fault, FileServer, make_certificate, trusted_server

pytestmark = pytest.mark.timeout(60)

SEQUENCE_LENGTH = 256
SHARD = 3  # the one that is damaged
ONCE = Transfer(timeout_seconds=20, attempts=1)
IMPATIENT = Transfer(timeout_seconds=1, attempts=1)


def overwrite(path: Path, content: bytes) -> None:
    """Change a file in place, so that those who have it open see it too."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x20
    overwrite(path, content)


def duplicated_keys(path: Path, size: int) -> bytes:
    """A shard of the same size in which every key stands twice."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".u16")]
    content = path.read_bytes()
    half = b"".join(content[m.offset : m.offset_data + -(-m.size // 512) * 512] for m in members)
    return (half + half).ljust(size, b"\0")[:size]


# What is done to the shard at `path`, whose second document begins at `offset`; `other` is another shard.
DAMAGES: dict[str, Callable[[Path, int, bytes], None]] = {
    "cut inside a payload": lambda path, offset, other: os.truncate(path, offset + 600),
    "cut at a member boundary": lambda path, offset, other: os.truncate(path, offset),
    "cut inside a header": lambda path, offset, other: os.truncate(path, offset + 100),
    "bit of a header": lambda path, offset, other: flip(path, offset + 130),
    "bit of a payload": lambda path, offset, other: flip(path, offset + 515),
    "empty": lambda path, offset, other: os.truncate(path, 0),
    "missing": lambda path, offset, other: path.unlink(),
    "duplicated keys": lambda path, offset, other: overwrite(path, duplicated_keys(path, path.stat().st_size)),
    "another shard of equal size": lambda path, offset, other: overwrite(
        path, other.ljust(path.stat().st_size, b"\0")[: path.stat().st_size]
    ),
    "another shard": lambda path, offset, other: overwrite(path, other + bytes(path.stat().st_size)),
}
# Those that change the size are found before the start, and so is a shard that begins as another one does.
FOUND_AT_OPENING = {
    "cut inside a payload",
    "cut at a member boundary",
    "cut inside a header",
    "empty",
    "missing",
    "another shard",
}


@pytest.fixture(scope="session")
def clean_rows(dataset_directory: Path) -> list[Row]:
    """A little more than one epoch."""
    dataset = open_dataset(dataset_directory)
    stream = RowStream.of(dataset, SEQUENCE_LENGTH, seed=3)
    return [stream.row(number) for number in range(dataset.manifest.tokens // SEQUENCE_LENGTH + 3)]


def damage_shard(directory: Path, clean: Dataset, kind: str) -> set[int]:
    """Damage a shard; gives the documents whose bytes are no longer there."""
    path = directory / clean.manifest.shards[SHARD].name
    before = path.read_bytes()
    documents = np.flatnonzero(clean.index["shard"] == SHARD).tolist()
    other = (clean.directory / clean.manifest.shards[SHARD - 1].name).read_bytes()
    DAMAGES[kind](path, int(clean.index["offset"][documents[1]]), other)
    after = path.read_bytes() if path.exists() else b""
    hit = set()
    for document in documents:
        begin = int(clean.index["offset"][document])
        end = begin + 512 + int(clean.index["payload_bytes"][document])
        if before[begin:end] != after[begin:end]:
            hit.add(document)
    assert hit
    return hit


@dataclass(frozen=True)
class Outcome:
    """The rows of a run, where None stands for filler, and what it said about the others."""

    rows: list[Row | None]
    skipped: list[SkippedRow]
    error: DamagedDataError | None


def run(opened: Dataset, num_rows: int, on_error: str, workers: int = 0) -> Outcome:
    rows: list[Row | None] = []
    skipped: list[SkippedRow] = []
    loader = BatchLoader(RowStream.of(opened, SEQUENCE_LENGTH, seed=3), 1, workers=workers, on_error=on_error)
    try:
        for batch in itertools.islice(loader, num_rows):
            filler = int(batch.rows.row_indices[0]) == -1
            assert len(batch.skipped) == filler
            skipped += batch.skipped
            rows.append(None if filler else Row(batch.rows.tokens[0].numpy(), batch.rows.document_ids[0].numpy(), 0))
    except DamagedDataError as error:
        return Outcome(rows, skipped, error)
    return Outcome(rows, skipped, None)


def same(rows: list[Row | None], clean_rows: list[Row]) -> bool:
    """Whether rows that are there are the clean ones."""
    pairs = [(row, clean) for row, clean in zip(rows, clean_rows, strict=False) if row is not None]
    return all(
        (row.tokens == clean.tokens).all() and (row.document_ids == clean.document_ids).all() for row, clean in pairs
    )


def affected_rows(opened: Dataset, clean_rows: list[Row], hit: set[int]) -> list[bool]:
    documents = opened.manifest.documents
    return [bool({int(number) % documents for number in row.document_ids} & hit) for row in clean_rows]


def check_skipping(opened: Dataset, clean_rows: list[Row], hit: set[int], workers: int = 0) -> None:
    """Exactly the rows that need a damaged document are left out, and each is named."""
    affected = affected_rows(opened, clean_rows, hit)
    assert True in affected
    skipping = run(opened, len(clean_rows), "skip", workers)
    assert [row is None for row in skipping.rows] == affected
    assert same(skipping.rows, clean_rows)
    assert [item.number for item in skipping.skipped] == [number for number, is_hit in enumerate(affected) if is_hit]
    for item in skipping.skipped:
        check_words(item.damage, opened)


def check_stopping(opened: Dataset, clean_rows: list[Row], hit: set[int], workers: int = 0) -> None:
    """A run stops at the first row that needs a damaged document."""
    affected = affected_rows(opened, clean_rows, hit)
    stopping = run(opened, len(clean_rows), "raise", workers)
    assert len(stopping.rows) == affected.index(True)
    assert same(stopping.rows, clean_rows)
    assert stopping.error is not None
    assert stopping.error.exit_code == 4
    check_words(stopping.error, opened)


def check_words(damage: DamagedDataError, opened: Dataset) -> None:
    assert damage.shard == opened.files.place(SHARD)
    assert damage.offset is not None
    assert damage.expected != damage.found


@pytest.mark.parametrize("kind", DAMAGES)
def test_local_damage_before_the_start(dataset: Dataset, tmp_path: Path, clean_rows: list[Row], kind: str) -> None:
    directory = Path(shutil.copytree(dataset.directory, tmp_path / "copy"))
    hit = damage_shard(directory, dataset, kind)
    if kind in FOUND_AT_OPENING | {"another shard of equal size"}:
        with pytest.raises(InputError) as caught:
            open_dataset(directory)
        (problem,) = caught.value.problems
        assert problem.where == str(directory / dataset.manifest.shards[SHARD].name)
        assert problem.found != problem.expected
    else:
        check_skipping(open_dataset(directory), clean_rows, hit)
        check_stopping(open_dataset(directory), clean_rows, hit)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", DAMAGES)
def test_local_damage_in_mid_run(
    dataset: Dataset, tmp_path: Path, clean_rows: list[Row], kind: str, workers: int
) -> None:
    directory = Path(shutil.copytree(dataset.directory, tmp_path / "copy"))
    opened = open_dataset(directory)
    for row in clean_rows[:5]:
        for number in row.document_ids:
            opened.tokens(int(number) % opened.manifest.documents)
    hit = damage_shard(directory, dataset, kind)
    if kind == "missing":
        # A file that is deleted stays whole for those who have it open; this is the moment after that.
        opened.close()
    check_skipping(opened, clean_rows, hit, workers)
    check_stopping(opened, clean_rows, hit, workers)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, dataset_directory: Path
) -> Iterator[FileServer]:
    shutil.copytree(dataset_directory, tmp_path / "served" / "train")
    with trusted_server(tmp_path / "served", certificate, monkeypatch) as server:
        yield server


@pytest.fixture(params=[pytest.param(True, id="whole shards"), pytest.param(False, id="byte ranges")])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30 if request.param else 0)


def whole_shard(dataset: Dataset) -> set[int]:
    return set(np.flatnonzero(dataset.index["shard"] == SHARD).tolist())


@pytest.mark.parametrize("kind", sorted(FOUND_AT_OPENING))
def test_remote_damage_before_the_start(server: FileServer, cache: ShardCache, dataset: Dataset, kind: str) -> None:
    damage_shard(server.directory / "train", dataset, kind)
    with pytest.raises(InputError) as caught:
        open_dataset(f"{server.url}/train", cache, transfer=ONCE)
    (problem,) = caught.value.problems
    assert problem.where == f"{server.url}/train/{dataset.manifest.shards[SHARD].name}"
    assert problem.found != problem.expected


def open_twice(server: FileServer, cache: ShardCache) -> tuple[Dataset, Dataset]:
    """The dataset, read a little, for a run that skips and one that stops."""
    policies: tuple[remote.OnError, ...] = ("skip", "raise")
    skipping, stopping = (
        open_dataset(f"{server.url}/train", cache, on_error=policy, transfer=ONCE) for policy in policies
    )
    assert skipping.tokens(0).tolist() == stopping.tokens(0).tolist()
    return skipping, stopping


@pytest.mark.parametrize("kind", DAMAGES)
def test_remote_damage_in_mid_run(
    server: FileServer, cache: ShardCache, dataset: Dataset, clean_rows: list[Row], kind: str
) -> None:
    skipping, stopping = open_twice(server, cache)
    hit = damage_shard(server.directory / "train", dataset, kind)
    if kind in FOUND_AT_OPENING:  # of a file of another size nothing is believed
        hit = whole_shard(dataset)
    check_skipping(skipping, clean_rows, hit)
    # The sha256 of a shard that was downloaded whole is wrong for all of its documents.
    check_stopping(stopping, clean_rows, whole_shard(dataset) if cache.limit_bytes else hit)


FAULTS = {
    "drops the connection midway": Fault("drop", 60),
    "drops the connection at once": Fault("drop", 0),
    "404": Fault("status", 404),
    "500": Fault("status", 500),
    "a shorter body": Fault("shorter", 60),
    "an empty body": Fault("shorter", 0),
    "a redirect to a file": Fault("redirect", "file:///etc/hostname"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_in_mid_run(
    server: FileServer, cache: ShardCache, dataset: Dataset, clean_rows: list[Row], fault: str
) -> None:
    skipping, stopping = open_twice(server, cache)
    server.faults[dataset.manifest.shards[SHARD].name] = FAULTS[fault]
    check_skipping(skipping, clean_rows, whole_shard(dataset))
    check_stopping(stopping, clean_rows, whole_shard(dataset))


@pytest.mark.parametrize("fault", [Fault("hang"), pytest.param(Fault("stall", 60), marks=pytest.mark.slow)])
def test_a_server_that_hangs_in_mid_run(
    server: FileServer, cache: ShardCache, dataset: Dataset, clean_rows: list[Row], fault: Fault
) -> None:
    opened = open_dataset(f"{server.url}/train", cache, transfer=ONCE)
    hit = whole_shard(dataset)
    first = affected_rows(opened, clean_rows, hit).index(True)
    hanging = open_dataset(f"{server.url}/train", cache, transfer=IMPATIENT)
    server.faults[dataset.manifest.shards[SHARD].name] = fault
    for on_error in ("skip", "raise"):
        outcome = run(hanging, first + 1, on_error)
        damage = outcome.error if on_error == "raise" else outcome.skipped[0].damage
        assert damage is not None
        assert damage.shard == opened.files.place(SHARD)
        assert damage.found == "no answer within 1 s (attempt 1 of 1)"
        assert len(outcome.rows) == first + (on_error == "skip")
        assert same(outcome.rows, clean_rows)
    hanging.close()


@pytest.mark.parametrize("fault", ["404", "500"])
def test_a_server_that_fails_before_the_start(
    server: FileServer, cache: ShardCache, dataset: Dataset, fault: str
) -> None:
    failing = FAULTS[fault]
    server.faults[dataset.manifest.shards[SHARD].name] = Fault(failing.kind, failing.value, methods=("HEAD", "GET"))
    with pytest.raises(InputError) as caught:
        open_dataset(f"{server.url}/train", cache, transfer=ONCE)
    (problem,) = caught.value.problems
    assert problem.where == f"{server.url}/train/{dataset.manifest.shards[SHARD].name}"


def test_a_server_that_recovers_is_no_damage(
    server: FileServer, cache: ShardCache, dataset: Dataset, clean_rows: list[Row]
) -> None:
    patient = Transfer(timeout_seconds=5, attempts=4, first_wait_seconds=0.001)
    opened = open_dataset(f"{server.url}/train", cache, transfer=patient)
    for fault in (Fault("drop", 60, times=3), Fault("status", 503, times=3)):
        server.faults[dataset.manifest.shards[SHARD].name] = fault
        outcome = run(opened, len(clean_rows), "raise")
        assert len(outcome.rows) == len(clean_rows)
        assert same(outcome.rows, clean_rows)
        with suppress(FileNotFoundError):
            shutil.rmtree(cache.directory / "shards")
        opened.close()


def test_a_server_without_ranges_serves_whole_shards_only(server: FileServer, dataset: Dataset, tmp_path: Path) -> None:
    for shard in dataset.manifest.shards:
        server.faults[shard.name] = Fault("no ranges")
    opened = open_dataset(f"{server.url}/train", ShardCache(tmp_path / "whole", 1 << 30), transfer=ONCE)
    assert opened.tokens(0).tolist() == dataset.tokens(0).tolist()
    opened = open_dataset(f"{server.url}/train", ShardCache(tmp_path / "none", 0), transfer=ONCE)
    with pytest.raises(DamagedDataError, match="byte ranges.*HTTP status 200"):
        opened.tokens(0)


def test_a_wrong_shard_is_downloaded_once_and_logged(
    server: FileServer, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = dataset.manifest.shards[SHARD]
    (hit,) = damage_shard(server.directory / "train", dataset, "bit of a payload")
    skipping, stopping = open_twice(server, ShardCache(tmp_path / "cache", 1 << 30))
    for document in sorted(whole_shard(dataset) - {hit}):
        assert skipping.tokens(document).tolist() == dataset.tokens(document).tolist()
        with pytest.raises(WrongShardError, match=f"sha256 {entry.sha256}"):
            stopping.tokens(document)
    with pytest.raises(DamagedDataError, match="crc32"):
        skipping.tokens(hit)
    assert [byte_range for _, _, byte_range in server.asked("GET", entry.name)].count(None) == 2
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert all(f"{server.url}/train/{entry.name}: expected sha256 {entry.sha256}" in words for words in warnings)
