"""Datasets on an https server: what is asked of the server, what is kept, and what is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.rows import order
from ebft_mega.data.store import opening, remote
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import Manifest, fingerprint
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.data.transfer.addresses import https_address_problem
from ebft_mega.errors import DamagedDataError, InputError
from ebft_mega.extension.store import Transfer
from tests.unit.data.store.https_server import Fault, FileServer

pytestmark = pytest.mark.timeout(60)

QUICK = Transfer(timeout_seconds=5, attempts=3, first_wait_seconds=0.001)
IMPATIENT = Transfer(timeout_seconds=1.5, attempts=1)


@pytest.fixture
def remote_url(server: FileServer, dataset_directory: Path) -> str:
    shutil.copytree(dataset_directory, server.directory / "data" / "train")
    return f"{server.url}/data/train"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


def read_all(dataset: Dataset) -> list[list[int]]:
    return [dataset.tokens(number).tolist() for number in range(dataset.manifest.documents)]


def refused(place: str, cache: ShardCache | None, transfer: Transfer = QUICK) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(place, cache, transfer=transfer)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://host/x",
        "HTTP://host/x",
        "file:///etc/passwd",
        "s4://bucket/x",
        "pipe:true",
        "ftp://host/x",
        "https://user@host/x",
        "https://user:password@host/x",
        "https://host/x?token=secret",
        "https://host/x#part",
        "https:///x",
        "https://host:99999/x",
        "https://host:0/x",
        "https://ho st/x",
        "https://host/x\r\nHost: other",
        "https://[::1/x",
    ],
)
def test_only_plain_https_addresses_are_read(address: str, cache: ShardCache) -> None:
    assert https_address_problem(address)
    message = refused(address, cache)
    for secret in ("user", "password@", "secret", "passwd", "bucket"):
        assert secret not in message.replace("a user, password", "")
    assert not cache.directory.exists()


def test_nothing_in_the_environment_turns_an_address_into_a_command(
    server: FileServer, remote_url: str, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "executed"
    monkeypatch.setenv("GOPEN_REWRITE", f"https:=pipe:touch {proof} #")
    monkeypatch.setenv("USE_AIS_FOR", "https")
    assert read_all(open_dataset(remote_url, cache, transfer=QUICK))
    assert not proof.exists()


# Opening.


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_remote_dataset_is_the_local_one(
    remote_url: str, dataset: Dataset, tmp_path: Path, server: FileServer, limit: int
) -> None:
    opened = open_dataset(remote_url + "/", ShardCache(tmp_path / "cache", limit), transfer=QUICK)
    assert opened.manifest == dataset.manifest
    assert (opened.index == dataset.index).all()
    assert opened.directory == tmp_path / "cache" / dataset.manifest.fingerprint
    names = sorted(path.name for path in dataset.tokenizer_directory.iterdir())
    assert sorted(path.name for path in opened.tokenizer_directory.iterdir()) == names
    assert opened.files.place(0) == f"{remote_url}/{dataset.manifest.shards[0].name}"
    assert server.asked("GET", ".tar") == []
    assert read_all(opened) == read_all(dataset)
    asked = server.asked("GET", ".tar")
    if limit:
        assert sorted(entry[1:] for entry in asked) == [
            (f"/data/train/{shard.name}", None) for shard in dataset.manifest.shards
        ]
    else:
        assert len(asked) == dataset.manifest.documents
        assert all(entry[2] for entry in asked)
        assert not (tmp_path / "cache" / "shards").exists()
    opened.close()


def test_documents_are_read_by_ranges_over_one_connection(
    remote_url: str, dataset: Dataset, tmp_path: Path, server: FileServer
) -> None:
    opened = open_dataset(remote_url, ShardCache(tmp_path / "cache", 0), transfer=QUICK)
    before = server.connections
    assert read_all(opened) == read_all(dataset)
    assert len(server.asked("GET", ".tar")) == dataset.manifest.documents
    assert server.connections == before
    assert read_all(pickle.loads(pickle.dumps(opened))) == read_all(dataset)
    assert server.connections == before + 1


def test_several_epochs_and_processes_download_nothing_again(
    remote_url: str, cache: ShardCache, server: FileServer, dataset: Dataset
) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    expected = read_all(dataset)
    assert read_all(opened) == expected
    server.requests.clear()
    for _ in range(3):
        assert read_all(opened) == expected
    assert read_all(pickle.loads(pickle.dumps(opened))) == expected
    assert server.requests == []
    again = open_dataset(remote_url, cache, transfer=QUICK)
    assert read_all(again) == expected
    # The manifest and the sizes of the shards are asked for at every start, and nothing else.
    assert [entry[1] for entry in server.asked("GET")] == ["/data/train/dataset.json"]
    assert len(server.asked("HEAD")) == len(dataset.manifest.shards)


def test_processes_that_open_at_once_copy_once(
    remote_url: str, cache: ShardCache, server: FileServer, dataset: Dataset
) -> None:
    with ThreadPoolExecutor(6) as executor:
        futures = [executor.submit(lambda: read_all(open_dataset(remote_url, cache, transfer=QUICK))) for _ in range(6)]
        assert all(future.result() == read_all(dataset) for future in futures)
    assert len(server.asked("GET", "index.npy")) == 1
    assert len(server.asked("GET", ".tar")) == len(dataset.manifest.shards)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_forked_process_needs_nothing_of_its_parent(
    remote_url: str, cache: ShardCache, dataset: Dataset, limit: int
) -> None:
    opened = open_dataset(remote_url, ShardCache(cache.directory, limit), transfer=QUICK)
    assert isinstance(opened.files, remote.RemoteShards)
    expected = read_all(dataset)
    assert opened.tokens(0).tolist() == expected[0]
    opened.files.expect([1])
    # One of the parent's threads is reading in this moment.
    with opened.files._lock:
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which the time limit of the test uses
            signal.alarm(30)
            try:
                os._exit(0 if read_all(opened) == expected else 1)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert read_all(opened) == expected
    opened.close()


def test_expected_shards_are_downloaded_ahead(
    remote_url: str, cache: ShardCache, server: FileServer, dataset: Dataset
) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    last = len(dataset.manifest.shards) - 1
    before = threading.active_count()
    opened.files.expect([last, 0, last])
    opened.files.expect([0])
    assert isinstance(opened.files, remote.RemoteShards)
    wait_for_downloads(opened)
    asked = [entry[1] for entry in server.asked("GET", ".tar")]
    assert asked == [f"/data/train/{dataset.manifest.shards[shard].name}" for shard in (last, 0)]
    assert threading.active_count() <= before + 1 + 2  # and the server's
    server.faults[dataset.manifest.shards[1].name] = Fault("status", 404)
    opened.files.expect([1, 2])
    wait_for_downloads(opened)
    server.requests.clear()
    assert read_all_but(opened, shard=1)
    assert [entry[1] for entry in server.asked("GET", ".tar")] == [
        f"/data/train/{dataset.manifest.shards[shard].name}" for shard in range(3, last)
    ]
    with pytest.raises(DamagedDataError, match="404"):
        opened.tokens(int((opened.index["shard"] == 1).argmax()))
    opened.close()


def wait_for_downloads(dataset: Dataset) -> None:
    ahead = dataset.files._ahead
    with ahead.changed:
        assert ahead.changed.wait_for(lambda: not ahead.expected, 30)


def read_all_but(dataset: Dataset, shard: int) -> bool:
    for number in range(dataset.manifest.documents):
        if dataset.index["shard"][number] != shard:
            dataset.tokens(number)
    return True


def test_a_download_that_takes_long_elsewhere_is_not_waited_for(
    remote_url: str, cache: ShardCache, server: FileServer, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_SECONDS", 0.05)
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    entry = dataset.manifest.shards[0]
    with cache.lock(entry.sha256):
        assert opened.tokens(0).tolist() == dataset.tokens(0).tolist()
    assert opened.tokens(0).tolist() == dataset.tokens(0).tolist()
    assert [asked[2] is None for asked in server.asked("GET", entry.name)] == [False, True]


def test_files_of_equal_names_in_two_datasets_never_meet(
    make_dataset: Callable[..., Path], server: FileServer, cache: ShardCache
) -> None:
    datasets = []
    for name in ("first", "second"):
        directory = make_dataset({"a.py": f"{name} = 1\n", "b.py": "b = 2\n"}, name)
        shutil.copytree(directory, server.directory / name)
        datasets.append((open_dataset(f"{server.url}/{name}", cache, transfer=QUICK), open_dataset(directory)))
    for opened, local in datasets:
        assert read_all(opened) == read_all(local)
    assert len({opened.directory for opened, _ in datasets}) == 2


def test_a_dataset_that_changed_on_the_server_is_another_one(
    remote_url: str, make_dataset: Callable[..., Path], server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    assert open_dataset(remote_url, cache, transfer=QUICK).manifest == dataset.manifest
    shutil.rmtree(server.directory / "data" / "train")
    changed = make_dataset({"a.py": "a = 1\n"})
    shutil.copytree(changed, server.directory / "data" / "train")
    assert read_all(open_dataset(remote_url, cache, transfer=QUICK)) == read_all(open_dataset(changed))


def test_all_problems_of_a_remote_dataset_are_reported_before_the_start(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    names = [shard.name for shard in dataset.manifest.shards]
    (server.directory / "data" / "train" / names[0]).unlink()
    os.truncate(server.directory / "data" / "train" / names[1], 700)
    server.faults[names[2]] = Fault("hang", methods=("HEAD", "GET"))
    message = refused(remote_url, cache, IMPATIENT)
    assert f"{remote_url}/{names[0]}: {names[0]}: found HTTP status 404" in message
    assert f"{remote_url}/{names[1]}: {names[1]}: found 700 bytes" in message
    assert f"{remote_url}/{names[2]}: {names[2]}: found no answer within 1.5 s" in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("dataset.json", None, "dataset.json: found no such file"),
        ("dataset.json", b"{", "dataset.json: found"),
        ("index.npy", None, "index.npy: found HTTP status 404"),
        ("index.npy", b"short", "index.npy: found a file of 5 bytes"),
        ("index.npy", "flip", "index: found sha256"),
        ("tokenizer/tokenizer.model", None, "tokenizer: found no tokenizer"),
        ("tokenizer/tokenizer.model", b"another", "found no sentencepiece model, or a damaged one"),
    ],
)
def test_a_damaged_description_is_refused_and_not_kept(
    remote_url: str, server: FileServer, cache: ShardCache, name: str, damage: bytes | str | None, expected: str
) -> None:
    path = server.directory / "data" / "train" / name
    content = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else content[:-1] + bytes([content[-1] ^ 1]))
    message = refused(remote_url, cache)
    assert expected in message
    assert remote_url in message
    path.write_bytes(content)
    assert read_all(open_dataset(remote_url, cache, transfer=QUICK))


def test_a_damaged_copy_of_the_description_is_copied_again(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    for name in ("index.npy", "tokenizer/tokenizer.model", "dataset.json"):
        path = open_dataset(remote_url, cache, transfer=QUICK).directory / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert open_dataset(remote_url, cache, transfer=QUICK).manifest == dataset.manifest
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "name", ["../shard-000000.tar", "https://elsewhere/a.tar", "pipe:x.tar", "a/b.tar", "a.tar?x=y.tar"]
)
def test_a_remote_manifest_names_plain_files_only(
    remote_url: str, server: FileServer, cache: ShardCache, name: str
) -> None:
    path = server.directory / "data" / "train" / "dataset.json"
    fields = json.loads(path.read_text())
    fields["shards"][0]["name"] = name
    fields["fingerprint"] = fingerprint(fields)
    path.write_text(json.dumps(fields))
    assert "shards.0.name" in refused(remote_url, cache)
    assert [entry[1] for entry in server.requests] == ["/data/train/dataset.json"]


def change_manifest(server: FileServer, change: Callable[[dict], object]) -> None:
    """Change a manifest on the server; its fingerprint stays right."""
    path = server.directory / "data" / "train" / "dataset.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields | {"fingerprint": fingerprint(fields)}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda fields: fields["index"].update(bytes=10**15), "index.bytes: found 1000000000000000; expected "),
        (lambda fields: fields["index"].update(bytes=fields["documents"] * 32), "a header of at most 4096"),
        (lambda fields: fields["index"].update(bytes=fields["documents"] * 32 + 4097), "a header of at most 4096"),
        (lambda fields: fields.update(documents=2**63), "documents: found 9223372036854775808"),
        (lambda fields: fields.update(vocab_size=2**33), "vocab_size: found 8589934592"),
        (lambda fields: fields["shards"][0].update(bytes=600), "found 600 bytes with "),
        (lambda fields: fields["shards"][0].update(tokens=1), "a token per document at least"),
        (lambda fields: fields["shards"][0].update(name="a" * 252 + ".tar"), "shards.0.name: found"),
        (lambda fields: fields.update(shards=[]), "documents: found"),
    ],
)
def test_nothing_is_downloaded_for_numbers_that_cannot_be(
    remote_url: str, server: FileServer, cache: ShardCache, change: Callable[[dict], object], problem: str
) -> None:
    change_manifest(server, change)
    assert problem in refused(remote_url, cache)
    assert [entry[1] for entry in server.requests] == ["/data/train/dataset.json"]
    assert not cache.directory.exists()


def test_a_manifest_of_any_size_is_not_read_to_its_end(remote_url: str, server: FileServer, cache: ShardCache) -> None:
    with (server.directory / "data" / "train" / "dataset.json").open("r+b") as file:
        file.truncate((1 << 26) + 1)
    server.faults["dataset.json"] = Fault("stall", 0)
    assert f"found {(1 << 26) + 1} bytes" in refused(remote_url, cache, IMPATIENT)


def test_an_index_that_the_cache_cannot_hold_is_not_downloaded(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    documents = 10**8

    def change(fields: dict) -> None:
        more = documents - fields["documents"]
        fields["shards"][0]["documents"] += more
        fields["shards"][0]["tokens"] += more
        fields["shards"][0]["bytes"] += 1024 * more
        fields.update(documents=documents, tokens=fields["tokens"] + more)
        fields["index"]["bytes"] = 192 + 32 * documents

    change_manifest(server, change)
    message = refused(remote_url, cache)
    assert "index.bytes: found manifest and index of 32000" in message
    assert "expected a larger data.cache_gigabytes (--cache-gigabytes)" in message
    assert server.asked("GET", "index.npy") == []
    assert bytes_below(cache.directory) == 0


def test_tokenizer_files_have_the_room_that_is_left(
    remote_url: str, server: FileServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebft_mega.data.store import shard_cache

    name = "tokenizer/tokenizer.model"
    served = server.directory / "data" / "train"
    needed = sum((served / part).stat().st_size for part in ("dataset.json", "index.npy", name))
    monkeypatch.setattr(shard_cache, "DESCRIPTION_BYTES", needed - 1)
    message = refused(remote_url, ShardCache(cache.directory, 0))
    size = (served / name).stat().st_size
    assert f"found {size} bytes; expected at most {size - 1} bytes" in message
    assert bytes_below(cache.directory) == 0


def test_leftovers_of_killed_processes_are_deleted(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    others = ["0" * 64, "1" * 64]
    for name in (*others, dataset.manifest.fingerprint):
        (cache.directory / f"{name}.incoming" / "tokenizer").mkdir(parents=True)
        (cache.directory / f"{name}.incoming" / "index.npy").write_bytes(bytes(1000))
    (cache.directory / "shards").mkdir()
    for name in others:
        (cache.directory / "shards" / f"{name}.part").write_bytes(bytes(1000))
    with cache.lock(others[0]):  # this one is still being copied
        open_dataset(remote_url, cache, transfer=QUICK)
    left = sorted(path.name for path in cache.directory.iterdir())
    assert left == sorted([f"{others[0]}.incoming", dataset.manifest.fingerprint, "locks", "shards"])
    assert [path.name for path in (cache.directory / "shards").iterdir()] == [f"{others[0]}.part"]


@pytest.mark.parametrize("fault", [Fault("status", 404), Fault("stall", 40), Fault("longer", 5)])
def test_a_description_that_fails_leaves_nothing(
    remote_url: str, server: FileServer, cache: ShardCache, fault: Fault
) -> None:
    server.faults["index.npy"] = fault
    refused(remote_url, cache, Transfer(timeout_seconds=0.3, attempts=1))
    assert [path.name for path in cache.directory.iterdir()] == ["locks"]


def test_descriptions_that_nobody_uses_make_room(
    remote_url: str, cache: ShardCache, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebft_mega.data.store import shard_cache

    directory = open_dataset(remote_url, cache, transfer=QUICK).directory
    size = bytes_below(directory)
    monkeypatch.setattr(shard_cache, "DESCRIPTION_BYTES", 2 * size)
    small = ShardCache(cache.directory, 0)
    other = small.dataset_directory("0" * 64)
    shutil.copytree(directory, other)
    long_ago = 1_000_000_000
    os.utime(other, (long_ago, long_ago))
    os.utime(directory, (long_ago, long_ago))
    # Held, just used, and at last neither.
    with small.hold("0" * 64):
        os.utime(other, (long_ago, long_ago))
        assert small.make_room_for_description("1" * 64, 2 * size) == size
        assert sorted(small._descriptions()) == ["0" * 64]
    os.utime(other)
    assert small.make_room_for_description("1" * 64, 2 * size) == size
    os.utime(other, (long_ago, long_ago))
    assert small.make_room_for_description("1" * 64, 2 * size) == 2 * size
    assert small._descriptions() == {}


def test_an_open_dataset_holds_its_description(remote_url: str, cache: ShardCache, dataset: Dataset) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    fingerprint = dataset.manifest.fingerprint
    os.utime(opened.directory, (1_000_000_000,) * 2)
    assert not cache._remove_unused(fingerprint)
    opened.close()  # opens its shards again when it is read
    os.utime(opened.directory, (1_000_000_000,) * 2)
    assert not cache._remove_unused(fingerprint)
    del opened
    assert cache._remove_unused(fingerprint)


def test_links_in_place_of_a_description_are_not_written_through(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset, tmp_path: Path
) -> None:
    fingerprint = dataset.manifest.fingerprint
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(open_dataset(remote_url, ShardCache(tmp_path / "other", 0), transfer=QUICK).directory, elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    for name in (fingerprint, f"{fingerprint}.incoming"):
        shutil.rmtree(cache.directory, ignore_errors=True)
        cache.directory.mkdir()
        (cache.directory / name).symlink_to(elsewhere)
        directory = open_dataset(remote_url, cache, transfer=QUICK).directory
        assert not directory.is_symlink()
        assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for planted in ("index.npy", "tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json", "tokenizer"):
        path = directory / planted
        (shutil.rmtree if path.is_dir() else os.unlink)(path) if path.exists() else None
        path.symlink_to(elsewhere / planted if (elsewhere / planted).exists() else secret)
        directory = open_dataset(remote_url, cache, transfer=QUICK).directory
        assert not any(path.is_symlink() for path in directory.rglob("*"))
        assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    os.unlink(directory / "index.npy")
    os.mkfifo(directory / "index.npy")
    assert (open_dataset(remote_url, cache, transfer=QUICK).directory / "index.npy").is_file()


def test_no_more_shards_are_asked_for_when_many_are_missing(
    remote_url: str, server: FileServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    monkeypatch.setattr(opening, "MAX_PROBLEMS", 2)
    monkeypatch.setattr(opening, "_SIMULTANEOUS_CHECKS", 1)
    shards = [shard.name for shard in dataset.manifest.shards]
    for name in shards:
        server.faults[name] = Fault("status", 404, methods=("HEAD",))
    assert len(refused(remote_url, cache).splitlines()) == 2
    assert len(server.asked("HEAD")) < len(shards)


def test_a_wrong_fingerprint_cannot_take_the_place_of_another_dataset(
    remote_url: str, server: FileServer, cache: ShardCache
) -> None:
    path = server.directory / "data" / "train" / "dataset.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"eos_id": 7}))
    assert "fingerprint" in refused(remote_url, cache)
    assert not (cache.directory / fields["fingerprint"]).exists()


def test_a_url_needs_a_cache(remote_url: str, server: FileServer) -> None:
    assert "no directory for a cache" in refused(remote_url, None)
    assert server.requests == []


def test_a_cache_that_cannot_be_written_is_refused(remote_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{directory}: cache: found" in refused(remote_url, ShardCache(directory, 1 << 30))


# Damage of cached copies, and shards that do not fit.


def test_a_damaged_copy_of_a_shard_is_downloaded_again_once(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    expected = read_all(dataset)
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    assert read_all(opened) == expected
    entry = dataset.manifest.shards[0]
    path = cache.shard_path(entry)
    for damage in ("flip", "cut"):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[int(dataset.index["offset"][0]) + 515] ^= 4
        path.write_bytes(content if damage == "flip" else content[:600])
        server.requests.clear()
        assert read_all(open_dataset(remote_url, cache, transfer=QUICK)) == expected
        assert [item[1] for item in server.asked("GET", ".tar")] == [f"/data/train/{entry.name}"]
        assert path.read_bytes() == (dataset.directory / entry.name).read_bytes()


def test_a_copy_that_is_cut_while_it_is_open_is_downloaded_again(
    remote_url: str, cache: ShardCache, dataset: Dataset
) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    assert read_all(opened) == read_all(dataset)
    os.truncate(cache.shard_path(dataset.manifest.shards[0]), 600)
    assert read_all(opened) == read_all(dataset)


def test_a_document_that_stays_wrong_is_damage_and_not_downloaded_for_ever(
    remote_url: str, server: FileServer, cache: ShardCache, dataset: Dataset
) -> None:
    """The index and the shard disagree, and each has the hash of the manifest."""
    import hashlib

    import numpy as np

    index = np.load(dataset.directory / "index.npy")
    index["crc32"][1] ^= 1
    target = server.directory / "data" / "train"
    np.save(target / "index.npy", index)
    content = (target / "index.npy").read_bytes()
    fields = json.loads((target / "dataset.json").read_text())
    fields["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    fields["fingerprint"] = fingerprint(fields)
    (target / "dataset.json").write_text(json.dumps(fields))
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    for _ in range(3):
        opened.tokens(0)
        with pytest.raises(DamagedDataError, match="crc32"):
            opened.tokens(1)
    assert len(server.asked("GET", ".tar")) == 2


def test_a_cache_that_holds_a_part_is_never_passed(
    remote_url: str, server: FileServer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows of one shard: two of them, and one more at the edge, fit.
    monkeypatch.setattr(remote, "WINDOW_DOCUMENTS", 1)
    largest = max(shard.bytes for shard in dataset.manifest.shards)
    assert remote.whole_shard_bytes(dataset.manifest) <= 4 * largest < sum(s.bytes for s in dataset.manifest.shards)
    description = open_dataset(remote_url, ShardCache(tmp_path / "other", 0), transfer=QUICK).directory
    cache = ShardCache(tmp_path / "cache", 4 * largest + bytes_below(description))
    for _ in range(2):
        opened = open_dataset(remote_url, cache, transfer=QUICK)
        for number, expected in enumerate(read_all(dataset)):
            assert opened.tokens(number).tolist() == expected
            assert bytes_below(cache.directory) <= cache.limit_bytes
    assert bytes_below(cache.directory) > 4 * largest
    asked = server.asked("GET", ".tar")
    assert all(entry[2] is None for entry in asked)
    shards = len(dataset.manifest.shards)
    assert shards < len(asked) <= 2 * shards


def bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_copies_that_were_deleted_are_closed(remote_url: str, dataset: Dataset, cache: ShardCache) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    opened.tokens(0)
    assert isinstance(opened.files, remote.RemoteShards)
    cache.shard_path(dataset.manifest.shards[0]).unlink()
    assert opened.tokens(0).tolist() == dataset.tokens(0).tolist()
    opened.tokens(dataset.manifest.documents - 1)
    assert list(opened.files._descriptors) == [len(dataset.manifest.shards) - 1]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 1000)), min_size=1, max_size=8),
    window=st.integers(1, 60),
    seed=st.integers(0, 100),
)
def test_any_two_windows_fit_into_a_cache_of_whole_shards(
    dataset_manifest: Manifest, sizes: list[tuple[int, int]], window: int, seed: int
) -> None:
    import random

    template = dataset_manifest.shards[0]
    shards = tuple(template.model_copy(update={"documents": d, "bytes": b}) for d, b in sizes)
    manifest = dataset_manifest.model_copy(update={"shards": shards})
    shuffled = list(shards)
    random.Random(seed).shuffle(shuffled)
    windows, current = [0], 0
    for shard in shuffled:
        if current >= window:
            windows.append(0)
            current = 0
        windows[-1] += shard.bytes
        current += shard.documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "WINDOW_DOCUMENTS", window)
        assert remote.whole_shard_bytes(manifest) >= sum(sorted(windows)[-2:])
        assert remote.whole_shard_bytes(manifest) <= sum(shard.bytes for shard in shards)
    assert remote.WINDOW_DOCUMENTS == order.WINDOW_DOCUMENTS


@pytest.fixture(scope="session")
def dataset_manifest(dataset_directory: Path) -> Manifest:
    return open_dataset(dataset_directory).manifest


def test_closing_a_dataset_ends_its_download(
    remote_url: str, server: FileServer, dataset: Dataset, cache: ShardCache
) -> None:
    opened = open_dataset(remote_url, cache, transfer=QUICK)
    assert isinstance(opened.files, remote.RemoteShards)
    server.faults[dataset.manifest.shards[0].name] = Fault("stall", 100, times=1)
    for _ in range(3):
        opened.files.expect([0, 1])
    ahead = opened.files._ahead
    assert ahead is not None
    assert server.stalled.wait(30)
    assert list(ahead.expected) == [0, 1]
    opened.close()
    server.released.set()
    ahead.thread.join(30)
    assert not ahead.thread.is_alive()
    # The connection broke and was continued, but nobody wanted the rest any more.
    assert list((cache.directory / "shards").iterdir()) == []
    assert server.asked("GET", dataset.manifest.shards[1].name) == []
    assert opened.tokens(dataset.manifest.documents - 1).size  # opens again


def test_an_interpreter_does_not_wait_for_downloads_ahead(
    remote_url: str, server: FileServer, dataset: Dataset, cache: ShardCache
) -> None:
    server.faults[dataset.manifest.shards[0].name] = Fault("stall", 100)
    program = (
        "from pathlib import Path\n"
        "from ebft_mega.data.store.shard_cache import ShardCache\n"
        "from ebft_mega.data.store.opening import open_dataset\n"
        f"dataset = open_dataset({remote_url!r}, ShardCache(Path({str(cache.directory)!r}), 1 << 30))\n"
        "dataset.files.expect([0])\n"
        "print(dataset.tokens(dataset.manifest.documents - 1).size)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    # What it left is cleaned up by the next download.
    server.faults.clear()
    assert read_all(open_dataset(remote_url, cache, transfer=QUICK)) == read_all(dataset)
    assert [path.name for path in (cache.directory / "shards").glob("*.part")] == []
