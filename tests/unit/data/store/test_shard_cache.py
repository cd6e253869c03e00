"""The shard cache by itself, with downloads that are plain functions."""

import hashlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.store.format import ShardEntry
from ebft_mega.data.store.shard_cache import ShardCache, WrongShardError
from ebft_mega.errors import DamagedDataError

pytestmark = pytest.mark.timeout(60)


def contents(number: int, num_bytes: int = 1000) -> bytes:
    return bytes([number % 251]) * num_bytes


def entry(content: bytes) -> ShardEntry:
    sha256 = hashlib.sha256(content).hexdigest()
    return ShardEntry(name="shard-000000.tar", bytes=len(content), sha256=sha256, documents=1, tokens=1)


def chunks(content: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: (content[start : start + 300] for start in range(0, len(content), 300))


def fetch(cache: ShardCache, content: bytes, downloads: list[bytes] | None = None) -> bytes | None:
    def download() -> Iterator[bytes]:
        if downloads is not None:
            downloads.append(content)
        yield from chunks(content)()

    descriptor = cache.open(entry(content), "https://host/shard.tar", download, 60)
    if descriptor is None:
        return None
    data = os.pread(descriptor, 1 << 20, 0)
    os.close(descriptor)
    return data


def held(cache: ShardCache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cache.directory / "shards").iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3500)


def test_a_shard_is_downloaded_once(cache: ShardCache) -> None:
    downloads: list[bytes] = []
    for _ in range(3):
        assert fetch(cache, contents(1), downloads) == contents(1)
    assert len(downloads) == 1
    assert held(cache) == {f"{entry(contents(1)).sha256}.tar": 1000}


@pytest.mark.parametrize("sent", [contents(2), contents(1)[:-1], contents(1) + b"x", b""])
def test_what_is_not_the_shard_is_never_kept(cache: ShardCache, sent: bytes) -> None:
    wanted = entry(contents(1))
    with pytest.raises(WrongShardError) as caught:
        cache.open(wanted, "https://host/shard.tar", chunks(sent), 60)
    assert caught.value.shard == "https://host/shard.tar"
    assert caught.value.expected == f"sha256 {wanted.sha256}"
    assert caught.value.found == f"sha256 {hashlib.sha256(sent).hexdigest()}"
    assert held(cache) == {}
    assert fetch(cache, contents(1)) == contents(1)


def test_a_failed_download_leaves_nothing(cache: ShardCache) -> None:
    def download() -> Iterator[bytes]:
        yield b"x" * 300
        raise DamagedDataError("https://host/shard.tar", 300, "700 bytes", "a closed connection")

    with pytest.raises(DamagedDataError, match="a closed connection"):
        cache.open(entry(contents(1)), "https://host/shard.tar", download, 60)
    assert held(cache) == {}


def test_those_wanted_longest_ago_make_room(cache: ShardCache) -> None:
    for number in (1, 2, 3, 1, 4):
        fetch(cache, contents(number))
    names = {number: f"{entry(contents(number)).sha256}.tar" for number in range(5)}
    assert set(held(cache)) == {names[3], names[1], names[4]}
    fetch(cache, contents(0, 2000))
    assert sorted(held(cache).values()) == [1000, 2000]
    assert names[4] in held(cache)


def test_a_shard_that_can_never_fit_deletes_nothing_for_others(cache: ShardCache) -> None:
    fetch(cache, contents(1))
    assert fetch(ShardCache(cache.directory, 900), contents(2)) is None
    assert fetch(cache, contents(3, 3501)) is None
    assert set(held(cache)) == {f"{entry(contents(1)).sha256}.tar"}


def test_a_deleted_shard_stays_readable_while_it_is_open(cache: ShardCache) -> None:
    descriptor = cache.open(entry(contents(1)), "place", chunks(contents(1)), 60)
    assert descriptor is not None
    for number in range(2, 6):
        fetch(cache, contents(number))
    assert f"{entry(contents(1)).sha256}.tar" not in held(cache)
    assert os.pread(descriptor, 2000, 0) == contents(1)
    os.close(descriptor)


def test_downloads_under_way_count(cache: ShardCache) -> None:
    """Three downloads meet in the middle: a fourth finds no room, and the limit holds."""
    together = threading.Barrier(4)

    def download(content: bytes) -> Iterator[bytes]:
        yield content[:500]
        together.wait(30)
        together.wait(30)
        yield content[500:]

    def run(number: int) -> int | None:
        content = contents(number)
        return cache.open(entry(content), "place", lambda: download(content), 60)

    with ThreadPoolExecutor(3) as executor:
        futures = [executor.submit(run, number) for number in range(3)]
        together.wait(30)
        assert sum(held(cache).values()) == 3000
        assert fetch(cache, contents(9)) is None
        assert cache.open(entry(contents(1)), "place", chunks(contents(1)), 0) is None
        together.wait(30)
        for future in futures:
            os.close(future.result())
    assert fetch(cache, contents(9)) == contents(9)
    assert sum(held(cache).values()) == 3000


def _count_downloads(directory: Path, log: Path) -> None:
    cache = ShardCache(directory, 1 << 20)
    for number in range(8):
        content = contents(number)

        def download(number: int = number, content: bytes = content) -> Iterator[bytes]:
            with log.open("a") as file:
                file.write(f"{number}\n")
            yield content

        descriptor = cache.open(entry(content), "place", download, 60)
        assert descriptor is not None
        assert os.pread(descriptor, 2000, 0) == content
        os.close(descriptor)


def test_processes_share_what_one_of_them_downloads(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count_downloads, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == [str(number) for number in range(8)]


def _stop_in_the_middle(directory: Path, started: "multiprocessing.synchronize.Event") -> None:
    def download() -> Iterator[bytes]:
        yield b"x" * 300
        started.set()
        signal.pause()
        yield b""

    ShardCache(directory, 2500).open(entry(contents(1)), "place", download, 60)


def test_a_killed_process_leaves_no_lock_and_no_bytes_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=_stop_in_the_middle, args=(tmp_path / "cache", started))
    worker.start()
    assert started.wait(30)
    cache = ShardCache(tmp_path / "cache", 2500)
    assert cache.open(entry(contents(1)), "place", chunks(contents(1)), 0) is None
    assert fetch(cache, contents(2)) == contents(2)
    assert fetch(cache, contents(3, 2000)) is None  # the other process holds room for its own
    worker.kill()
    worker.join(30)
    assert fetch(cache, contents(3, 2000)) == contents(3, 2000)
    assert list(held(cache).values()) == [2000]
    assert fetch(cache, contents(1)) == contents(1)


def plant(kind: str, path: Path, target: Path) -> None:
    """Put something else where a file of the cache belongs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("created through a link"))
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder":
        (path / "below").mkdir(parents=True)


KINDS = ("link", "dangling link", "FIFO", "socket", "empty folder", "folder")


@pytest.mark.parametrize("suffix", [".tar", ".part"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_planted_is_waited_for_or_written_through(
    cache: ShardCache, tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(contents(2))  # as large as the shard
    path = cache.shard_path(entry(contents(1))).with_suffix(suffix)
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    plant(kind, Path(os.path.relpath(path, tmp_path)), target)
    downloads: list[bytes] = []
    data = [fetch(cache, contents(1), downloads) for _ in range(2)]
    stays = kind == "folder" or (kind == "empty folder" and suffix == ".part")
    # A folder with contents is not deleted, and what cannot be stored is not downloaded for it.
    assert data == ([None, None] if stays else [contents(1)] * 2)
    assert len(downloads) == (0 if stays else 1)
    assert target.read_bytes() == contents(2)
    assert not target.with_name("created through a link").exists()
    assert stays or not path.with_suffix(".tar").is_symlink()


def test_a_link_in_place_of_the_shards_or_locks_is_not_followed(
    cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "backups"
    elsewhere.mkdir()
    for number in range(5):
        (elsewhere / f"{number}.tar").write_bytes(bytes(1000))
    cache.directory.mkdir()
    for name in ("shards", "locks"):
        (cache.directory / name).symlink_to(elsewhere)
        assert fetch(cache, contents(1)) is None
        assert "a link or a file in place of a folder of the cache" in caplog.text
        caplog.clear()
        (cache.directory / name).unlink()
    assert len(list(elsewhere.iterdir())) == 5


def test_only_files_of_the_cache_are_deleted_for_room(cache: ShardCache) -> None:
    fetch(cache, contents(1))
    folder = cache.directory / "shards"
    for name in ("backup.tar", f"{'0' * 63}.tar", f"{'0' * 64}.tar.gz"):
        (folder / name).write_bytes(bytes(400))
    assert fetch(cache, contents(2, 2200)) == contents(2, 2200)
    assert sum(held(cache).values()) == 3400
    assert fetch(cache, contents(3, 2400)) is None


def test_descriptions_count_towards_the_limit(cache: ShardCache) -> None:
    assert cache.bytes_for_shards() == 3500
    description = cache.dataset_directory("0" * 64)
    (description / "tokenizer").mkdir(parents=True)
    (description / "index.npy").write_bytes(bytes(1500))
    (description / "tokenizer" / "tokenizer.model").write_bytes(bytes(500))
    assert cache.bytes_for_shards() == 1500
    assert fetch(cache, contents(1)) == contents(1)
    assert fetch(cache, contents(2)) == contents(2)
    assert sum(held(cache).values()) == 1000
    assert fetch(cache, contents(3, 1600)) is None
    (description / "index.npy").write_bytes(bytes(5000))
    assert cache.bytes_for_shards() == 0


def test_a_failed_disk_leaves_no_descriptor_open(cache: ShardCache) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    fetch(cache, contents(1))
    before = descriptors()
    for call in ("replace", "ftruncate", "utime"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, lambda *arguments, **named: os.stat("/nowhere"))
            fetch(cache, contents(2))
        assert descriptors() == before
        assert [name for name in held(cache) if name.endswith(".part")] == []


def test_a_copy_of_another_size_is_replaced(cache: ShardCache) -> None:
    fetch(cache, contents(1))
    os.truncate(cache.shard_path(entry(contents(1))), 10)
    assert fetch(cache, contents(1)) == contents(1)


def test_only_the_copy_in_question_is_discarded(cache: ShardCache) -> None:
    wanted = entry(contents(1))
    first = cache.open(wanted, "place", chunks(contents(1)), 60)
    assert first is not None
    cache.discard(wanted, first)
    assert held(cache) == {}
    fetch(cache, contents(1))
    cache.discard(wanted, first)
    assert len(held(cache)) == 1
    os.close(first)


def test_a_disk_that_cannot_hold_a_shard_is_said_and_not_fatal(
    cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.directory.mkdir()
    (cache.directory / "shards").write_text("not a directory")
    assert cache.open(entry(contents(1)), "https://host/shard.tar", chunks(contents(1)), 60) is None
    assert "https://host/shard.tar is read by byte ranges: the cache cannot hold it" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=25), st.integers(0, 4000))
def test_the_limit_holds_and_contents_are_right_whatever_is_asked(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, bool]], limit: int
) -> None:
    cache = ShardCache(tmp_path_factory.mktemp("cache"), limit)
    for number, damaged in reads:
        content = contents(number, 400 * (number + 1))
        data = fetch(cache, content)
        assert data == (content if len(content) <= limit else None)
        if data is not None:
            assert sum(held(cache).values()) <= limit
            if damaged:
                os.truncate(cache.shard_path(entry(content)), 7)
