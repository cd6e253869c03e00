import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from ebft_mega.data.builder import shard_writer as writer_module
from ebft_mega.data.builder.shard_writer import DatasetWriter
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import Manifest, fingerprint
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer, tokenizer_sha256
from ebft_mega.errors import DamagedDataError, InputError


@pytest.fixture
def copy(dataset_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_directory, tmp_path / "copy"))


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def refused(directory: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(directory)
    assert caught.value.exit_code == 2
    return str(caught.value)


def rewrite_manifest(directory: Path, **changes: object) -> None:
    path = directory / "dataset.json"
    fields = json.loads(path.read_text()) | changes
    fields["fingerprint"] = fingerprint(fields)
    path.write_text(json.dumps(fields))


def test_documents_round_trip(dataset: Dataset, texts: dict[str, str], tokenizer_directory: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    manifest = dataset.manifest
    assert len(manifest.shards) > 2
    assert manifest.documents == len(texts)
    assert manifest.eos_id == tokenizer.eos_id
    assert manifest.tokenizer_sha256 == tokenizer_sha256(dataset.tokenizer_directory) == tokenizer.sha256
    documents = [dataset.tokens(number) for number in range(manifest.documents)]
    for path, tokens in zip(sorted(texts), documents, strict=True):
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(tokens) == texts[path]
    assert sum(map(len, documents)) + manifest.documents == manifest.tokens
    assert max(map(max, documents)) == manifest.max_token_id
    with pytest.raises(IndexError):
        dataset.tokens(manifest.documents)
    with pytest.raises(IndexError):
        dataset.tokens(-1)


def test_stock_webdataset_reads_the_same_documents(dataset: Dataset, texts: dict[str, str]) -> None:
    streams = [{"url": s.name, "stream": (dataset.directory / s.name).open("rb")} for s in dataset.manifest.shards]
    samples = list(group_by_keys(tar_file_expander(streams)))
    for source in streams:
        source["stream"].close()
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(len(texts))]
    for number, (path, sample) in enumerate(zip(sorted(texts), samples, strict=True)):
        assert np.frombuffer(sample["u16"], "<u2").tolist() == dataset.tokens(number).tolist()
        meta = json.loads(sample["json"])
        assert meta["path"] == path
        assert meta["licence"] == "unknown"
        assert meta["sha256"] == hashlib.sha256(texts[path].encode()).hexdigest()


def test_index_and_manifest_describe_the_files(dataset: Dataset) -> None:
    for number, record in enumerate(dataset.index):
        entry = dataset.manifest.shards[record["shard"]]
        content = (dataset.directory / entry.name).read_bytes()
        begin, size = int(record["offset"]), int(record["payload_bytes"])
        assert content[begin : begin + 13] == f"{number:09d}.u16".encode()
        assert zlib.crc32(content[begin : begin + 512 + size]) == record["crc32"]
        assert record["tokens"] == size // 2 + 1
        assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_a_rebuild_is_byte_identical(make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a.py": "x = 1\n", "b/c.py": "y = 2\n" * 50, "b/d.txt": "z"}
    first = make_dataset(contents, "data", shard_bytes=2000)
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = make_dataset(contents, "data", shard_bytes=2000, overwrite=True)
    assert {path.relative_to(second): path.read_bytes() for path in second.rglob("*") if path.is_file()} == files
    assert len([path for path in files if path.suffix == ".tar"]) == 3


@pytest.mark.parametrize(("vocab_size", "dtype", "suffix"), [(65536, "uint16", "u16"), (65537, "uint32", "u32")])
def test_token_type_follows_the_vocabulary(
    tmp_path: Path, tokenizer_directory: Path, vocab_size: int, dtype: str, suffix: str
) -> None:
    import dataclasses

    tokenizer = dataclasses.replace(load_tokenizer(tokenizer_directory), vocab_size=vocab_size)
    writer = DatasetWriter(tmp_path, tokenizer, 10_000)
    ids = [0, 255, 65535, vocab_size - 1]
    writer.add(ids, {})
    writer.add([], {})
    for outside in (-1, vocab_size):
        with pytest.raises(InputError, match="token id"):
            writer.add([outside], {})
    manifest = writer.finish()
    assert (manifest.dtype, manifest.max_token_id) == (dtype, vocab_size - 1)
    dataset = open_dataset(tmp_path)
    assert dataset.tokens(0).tolist() == ids
    assert dataset.tokens(1).tolist() == []
    assert f"000000000.{suffix}".encode() in (tmp_path / "shard-000000.tar").read_bytes()


@pytest.mark.parametrize("place", ["header", "payload", "last byte"])
@pytest.mark.parametrize("number", [0, 17, 29])
def test_a_flipped_bit_is_found_when_the_document_is_read(copy: Path, place: str, number: int) -> None:
    record = open_dataset(copy).index[number]
    shard = open_dataset(copy).manifest.shards[record["shard"]].name
    offset, last = int(record["offset"]), int(record["payload_bytes"]) + 511
    # Byte 130 of a tar header lies in its size field.
    flip_bit(copy / shard, offset + {"header": 130, "payload": 512, "last byte": last}[place])
    dataset = open_dataset(copy)
    with pytest.raises(DamagedDataError) as caught:
        dataset.tokens(number)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    content = (copy / shard).read_bytes()[offset : offset + last + 1]
    for part in (shard, f"offset {offset}", f"{int(record['crc32']):08x}", f"{zlib.crc32(content):08x}"):
        assert part in message
    for other in set(range(30)) - {number}:
        dataset.tokens(other)


def test_every_bit_of_a_document_counts(copy: Path) -> None:
    record = open_dataset(copy).index[0]
    path = copy / "shard-000000.tar"
    for position in range(0, 512 + int(record["payload_bytes"]), 7):
        flip_bit(path, int(record["offset"]) + position)
        with pytest.raises(DamagedDataError):
            open_dataset(copy).tokens(0)
        flip_bit(path, int(record["offset"]) + position)
    open_dataset(copy).tokens(0)


def test_a_shard_cut_during_the_run_is_damage(copy: Path) -> None:
    dataset = open_dataset(copy)
    last = dataset.manifest.documents - 1
    offset = int(dataset.index[last]["offset"])
    os.truncate(copy / dataset.manifest.shards[-1].name, offset + 600)
    with pytest.raises(DamagedDataError, match=f"offset {offset}.*found 600 bytes"):
        dataset.tokens(last)


def test_a_token_outside_the_vocabulary_is_damage(copy: Path, dataset: Dataset) -> None:
    smaller = dataset.manifest.max_token_id
    rewrite_manifest(copy, vocab_size=smaller, max_token_id=smaller - 1)
    damaged = open_dataset(copy)
    with pytest.raises(DamagedDataError, match=f"below {smaller}, found {smaller}"):
        for number in range(damaged.manifest.documents):
            damaged.tokens(number)


def test_all_problems_are_reported_before_the_start(copy: Path) -> None:
    (copy / "shard-000000.tar").unlink()
    os.truncate(copy / "shard-000001.tar", 512)
    flip_bit(copy / "index.npy", 200)
    (copy / "tokenizer" / "tokenizer.model").write_bytes(b"another")
    message = refused(copy)
    for part in (
        "shard-000000.tar: found no such file",
        "found 512 bytes",
        "index: found sha256",
        "tokenizer: found",
    ):
        assert part in message


def test_swapped_shards_are_refused_even_at_equal_size(make_dataset: Callable[..., Path]) -> None:
    contents = {f"{name}.py": f"{name} = 1\n" for name in "abcdef"}
    directory = make_dataset(contents, shard_bytes=2500)
    names = [shard.name for shard in open_dataset(directory).manifest.shards[:2]]
    sizes = {(directory / name).stat().st_size for name in names}
    assert len(sizes) == 1, "this test needs shards of one size"
    (directory / names[0]).rename(directory / "aside")
    (directory / names[1]).rename(directory / names[0])
    (directory / "aside").rename(directory / names[1])
    message = refused(directory)
    assert f"{names[0]}: found the contents of {names[1]}" in message
    assert f"{names[1]}: found the contents of {names[0]}" in message


def test_a_shard_of_another_dataset_is_found_when_read(make_dataset: Callable[..., Path]) -> None:
    ours = make_dataset({"a.py": "a = 1\n", "b.py": "b = 2\n"}, "ours")
    theirs = make_dataset({"a.py": "c = 3\n", "b.py": "d = 4\n"}, "theirs")
    shutil.copyfile(theirs / "shard-000000.tar", ours / "shard-000000.tar")
    with pytest.raises(DamagedDataError, match="crc32"):
        open_dataset(ours).tokens(0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 3}, "version"),
        ({"format": "other"}, "format"),
        ({"documents": 31}, "documents"),
        ({"tokens": "many"}, "tokens"),
        ({"dtype": "float16"}, "dtype"),
        ({"unknown": 1}, "unknown"),
        ({"max_token_id": 70000}, "vocab_size"),
        ({"tokenizer_sha256": "0" * 64}, "tokenizer"),
    ],
)
def test_a_wrong_manifest_is_refused(copy: Path, changes: dict[str, object], expected: str) -> None:
    rewrite_manifest(copy, **changes)
    assert expected in refused(copy)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    fields = json.loads((copy / "dataset.json").read_text())
    fields["eos_id"] = 5
    (copy / "dataset.json").write_text(json.dumps(fields))
    assert "fingerprint" in refused(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", None])
def test_a_file_that_is_no_manifest_is_refused(copy: Path, content: bytes | None) -> None:
    (copy / "dataset.json").unlink()
    if content is not None:
        (copy / "dataset.json").write_bytes(content)
    assert "dataset.json" in refused(copy)


def test_missing_directories_are_refused(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "absent")
    assert "dataset.json" in refused(tmp_path)


def test_commands_and_urls_are_never_executed(copy: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    command = f"pipe:touch {proof}"
    for url in (command, "http://example.com/dataset", "s4://bucket/dataset", f"file://{copy}", "data:,x"):
        assert "URL or a command" in refused(url)
    shards = json.loads((copy / "dataset.json").read_text())["shards"]
    for name in (command, "../shard-000000.tar", "http://host/a.tar", "pipe:x.tar"):
        rewrite_manifest(copy, shards=[shards[0] | {"name": name}, *shards[1:]])
        assert "shards.0.name" in refused(copy)
    assert not proof.exists()


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed-by-pickle",)


def test_a_pickle_in_a_shard_or_index_is_never_executed(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class WithPickle(writer_module.ShardWriter):
        def _open_shard(self) -> tarfile.TarFile:
            tar = super()._open_shard()
            content = pickle.dumps(_Malicious())
            member = tarfile.TarInfo("000000000.pyd")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            return tar

    monkeypatch.setattr("ebft_mega.data.builder.tokenizing.ShardWriter", WithPickle)
    directory = make_dataset({"a.py": "a = 1\n"})
    assert open_dataset(directory).tokens(0).size
    np.save(directory / "index.npy", np.array([_Malicious()], object), allow_pickle=True)
    content = (directory / "index.npy").read_bytes()
    entry = {"name": "index.npy", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(directory, index=entry)
    assert "index" in refused(directory)
    assert not Path("executed-by-pickle").exists()


def test_reading_leaves_no_file_open_and_warns_of_nothing(dataset_directory: Path) -> None:
    program = (
        "import os, sys\n"
        "from ebft_mega.data.store.opening import open_dataset\n"
        f"dataset = open_dataset({str(dataset_directory)!r})\n"
        "before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0\n"
        "for number in range(dataset.manifest.documents): dataset.tokens(number)\n"
        "dataset.close()\n"
        "after = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0\n"
        "assert after <= before, (before, after)\n"
        "heavy = {'torch', 'webdataset', 'transformers', 'sentencepiece', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr


def test_few_descriptors_serve_many_shards(dataset_directory: Path) -> None:
    from ebft_mega.data.store.reader import ShardFiles

    dataset = open_dataset(dataset_directory)
    expected = [dataset.tokens(number).tolist() for number in range(30)]
    paths = [dataset_directory / shard.name for shard in dataset.manifest.shards]
    narrow = Dataset(dataset_directory, dataset.manifest, dataset.index, ShardFiles(paths, max_open=1))
    assert [narrow.tokens(number).tolist() for number in (*range(29, -1, -1),)][::-1] == expected
    narrow.close()


def test_manifest_fingerprint_covers_the_contents(dataset: Dataset) -> None:
    fields = dataset.manifest.model_dump(mode="json")
    assert fingerprint(fields) == dataset.manifest.fingerprint
    for key in set(fields) - {"fingerprint"}:
        assert fingerprint(fields | {key: "changed"}) != dataset.manifest.fingerprint
    assert Manifest.model_validate_json(json.dumps(fields)) == dataset.manifest


def test_a_shard_is_what_webdataset_itself_writes(dataset_directory: Path, tmp_path: Path) -> None:
    for shard in sorted(dataset_directory.glob("*.tar")):
        with tarfile.open(shard) as tar:
            contents = [(member.name.partition("."), tar.extractfile(member).read()) for member in tar]
        with (
            (tmp_path / "again.tar").open("wb") as file,
            TarWriter(file, encoder=False, compress=False, mtime=0) as tar,
        ):
            for (first, first_content), (second, second_content) in zip(contents[::2], contents[1::2], strict=True):
                tar.write({"__key__": first[0], first[2]: first_content, second[2]: second_content})
        assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()
