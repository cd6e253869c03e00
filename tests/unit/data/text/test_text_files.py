"""What a build reads: JSON lines in ranges, compressed files, text webdatasets, and damage to any of them."""

import errno
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.selection.document_reader import FileRange, Input, Reader
from ebft_mega.data.store.inspection import read_metadata
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.compression import CutFileError, open_lines
from ebft_mega.data.text.listing import list_files, readable_files
from ebft_mega.data.text.text_files import BadText, ReadOptions, TextDocument, count_lines, read_jsonl
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError

LINES = b"".join(json.dumps({"text": f"line {number}\n"}).encode() + b"\n" for number in range(2000))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def pack_gzip(content: bytes) -> bytes:
    return gzip.compress(content[:9000]) + gzip.compress(content[9000:])


def pack_zstandard(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(content[:9000]) + compressor.compress(content[9000:])


def read(file: Path, **options: object) -> list[TextDocument | BadText]:
    return list(read_jsonl(file, file.name, ReadOptions(), **options))


def texts(documents: list[TextDocument | BadText]) -> list[str]:
    return [document.text for document in documents if isinstance(document, TextDocument)]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", pack_gzip), ("a.json.gz", pack_gzip), ("a.jsonl.zst", pack_zstandard)],
)
def test_every_compression_gives_the_same_lines(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    documents = read(tmp_path / name)
    assert texts(documents) == [f"line {number}\n" for number in range(2000)]
    assert documents[-1].path == f"{name}:2000"


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", pack_gzip), (".zst", pack_zstandard)])
def test_a_cut_compressed_file_never_looks_whole(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = pack(LINES)
    # After a whole frame a file is whole: concatenated files are valid, and nothing says that more should come.
    whole = {len(pack(LINES[:9000])) - len(pack(b"")) // 2, len(content)}
    for size in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        documents = read(path)
        if size in whole:
            continue
        assert isinstance(documents[-1], BadText), size
        assert documents[-1].is_file
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert isinstance(read(path)[-1], BadText)
    path.write_bytes(b"")
    with pytest.raises(CutFileError, match="empty"), open_lines(path) as lines:
        lines.read()


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "absent.jsonl")
    assert isinstance(document, BadText)
    assert document.is_file
    assert document.problem.found == "No such file or directory"


@given(
    st.lists(st.sampled_from(["", " ", "{}", '{"text": "a"}', '{"text": "caf\u00e9 \u6f22"}', "x" * 40]), max_size=20),
    st.integers(1, 60),
    st.booleans(),
)
def test_ranges_of_any_size_give_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], step: int, ends_with_line_end: bool
) -> None:
    file = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    content = ("\n".join(lines) + ("\n" if lines and ends_with_line_end else "")).encode()
    file.write_bytes(content)
    whole = read(file)
    parts: list[TextDocument | BadText] = []
    unknown: list[TextDocument | BadText] = []
    first_line = 0
    for begin in range(0, len(content), step):
        end = min(begin + step, len(content))
        parts += read(file, begin=begin, end=end, first_line=first_line)
        unknown += read(file, begin=begin, end=end, first_line=None if begin else 0)
        first_line += count_lines(file, begin, end)
    assert parts == whole
    assert first_line == len(content.splitlines()) if b"\r" not in content else True
    # Bad lines are numbered even where nobody has counted the lines before the range.
    assert [item for item in unknown if isinstance(item, BadText)] == [i for i in whole if isinstance(i, BadText)]
    assert texts(unknown) == texts(whole)


def write_shard(path: Path, samples: list[dict[str, bytes | str]]) -> Path:
    with path.open("wb") as file, TarWriter(file, encoder=False, compress=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def some_samples(count: int = 12) -> list[dict[str, bytes | str]]:
    return [
        {
            "__key__": f"dir.v1/{number:03d}",
            "txt": f"text {number}\n".encode() * (number + 1),
            "json": json.dumps({"licence": ["MIT", "BSD"], "stars": number}).encode(),
            "cls": b"7",
        }
        for number in range(count)
    ]


def test_a_text_webdataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    samples = some_samples()
    write_shard(source / "b.tar", samples[6:])
    write_shard(source / "a.tar", samples[:6])
    build_dataset(
        source, tokenizer, tmp_path / "out", BuildOptions(licence_key="licence", keep_keys=["stars", "absent"])
    )
    dataset = open_dataset(tmp_path / "out")
    assert dataset.manifest.documents == 12
    for number, sample in enumerate(samples):
        assert tokenizer.decode(dataset.tokens(number)).encode() == sample["txt"]
        metadata = read_metadata(dataset, number)
        assert metadata["path"] == f"{'a' if number < 6 else 'b'}.tar:dir.v1/{number:03d}"
        assert (metadata["licence"], metadata["fields"], metadata["source"]) == (
            "MIT, BSD",
            {"stars": number},
            "shards",
        )
    # The same through a file, another suffix, and no record read.
    (tmp_path / "py").mkdir()
    write_shard(tmp_path / "py" / "a.tar", [{"__key__": "x", "PY": b"x = 1\n", "json": b"no JSON"}])
    build_dataset(
        tmp_path / "py" / "a.tar", tokenizer, tmp_path / "other", BuildOptions(text_member="py", licence="MIT")
    )
    assert read_metadata(open_dataset(tmp_path / "other"), 0)["licence"] == "MIT"


def archive(path: Path, **options: str | None) -> list[TextDocument | BadText]:
    return list(read_text_archive(path, path.name, ReadOptions(**options)))


def is_refused(path: Path) -> bool:
    return any(isinstance(item, BadText) and item.is_file for item in archive(path))


def test_a_cut_shard_never_looks_short(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", some_samples(4))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    assert not is_refused(path)
    for size in [*range(0, end + 1024, 64), *range(511, end, 512), *range(513, end, 512)]:
        path.write_bytes(content[:size])
        assert is_refused(path), size
    path.write_bytes(content[: end + 1024])
    assert not is_refused(path)
    path.write_bytes(content + content)
    assert "after the end-of-archive mark" in str(archive(path)[-1].problem)


def test_every_bit_of_a_header_counts_or_changes_nothing(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", some_samples(3))
    content = path.read_bytes()
    whole = archive(path)
    with tarfile.open(path) as tar:
        member = tar.getmembers()[4]
    found = 0
    for position in range(member.offset, member.offset + 512, 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        if is_refused(path):
            found += 1
        else:
            assert archive(path) == whole, position
    assert found > 165  # the rest are the padding bytes of the checksum itself


def add_member(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "key", "found"),
    [
        ([("Makefile", b"all:")], "member", "a name without key and suffix"),
        ([(".hidden.txt", b"x")], "member", "a name without key and suffix"),
        ([("a.txt", b"x"), ("a.txt", b"y")], "member", "suffixes txt, txt"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], "member", "suffixes txt, txt"),
        ([("a.py", b"x")], "txt", "suffixes py"),
        ([("a.txt", b"x"), ("b.json", b"{}"), ("b.txt", b"z"), ("a.json", b"{}")], "txt", "suffixes json"),
        ([("a.txt", b"\xff")], "text", "byte 0xff at offset 0"),
        ([("a.txt", b"x"), ("a.json", b"[]")], "json", "a JSON list"),
        ([("a.txt", b"x"), ("a.json", b"{")], "json", "Expecting property name"),
        ([("a.txt", b"x"), ("a.json", b'{"l": 3}')], "l", "a JSON int"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, members: list[tuple[str, bytes]], key: str, found: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "folder", b"", tarfile.DIRTYPE)
        add_member(tar, "__meta__", b"webdataset's own")
        add_member(tar, "good.txt", b"good")
        for name, content in members:
            add_member(tar, name, content)
    documents = archive(tmp_path / "a.tar", licence_key="l")
    assert "good" in texts(documents)
    (bad,) = [item for item in documents if isinstance(item, BadText)]
    assert not bad.is_file
    assert bad.problem.key == key
    assert bad.problem.found.startswith(found) or found in bad.problem.found


def test_links_and_long_names(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add_member(tar, f"{'folder/' * 40}caf\u00e9.txt", b"long")
        member = tarfile.TarInfo("link.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    link, document = archive(tmp_path / "a.tar")  # a sample ends where another key begins
    assert isinstance(document, TextDocument)
    assert document.path == f"a.tar:{'folder/' * 40}caf\u00e9"
    assert "no regular file" in str(link.problem)


def test_a_damaged_file_stops_the_build_and_is_left_out_whole_when_bad_ones_may_be(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    path = write_shard(source / "a.tar", some_samples())
    path.write_bytes(path.read_bytes()[:5120])
    (source / "b.jsonl.gz").write_bytes(pack_gzip(LINES)[:-20])
    (source / "c.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(InputError, match=r"a\.tar: offset 5120: file: found the end of the file") as caught:
        build_dataset(source, tokenizer, tmp_path / "out")
    assert "b.jsonl.gz" in str(caught.value)
    result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True, work_unit_bytes=100))
    # Nothing vouches for the documents before the damage.
    assert result.manifest.documents == 1
    assert result.record.skipped_by_reason == {"unreadable or damaged files": 2}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"].split(":")[0] for line in skipped] == ["a.tar", "b.jsonl.gz"]


def test_bad_documents_are_left_out_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.py").write_bytes(b"\xff")
    (tmp_path / "files" / "b.py").write_text("b = 2\n")
    (tmp_path / "dump.jsonl").write_text('{"text": "good"}\nbad\n{"txt": 1}\n{"text": "better"}\n' * 20)
    sources = [tmp_path / "files", tmp_path / "dump.jsonl"]
    result = build_dataset(sources, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True, work_unit_bytes=200))
    assert open_dataset(tmp_path / "out").manifest.documents == 3
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in skipped] == [
        "a.py",
        *[f"dump.jsonl:{4 * number + line}" for number in range(20) for line in (2, 3)],
    ]
    assert skipped[0] == {
        "source": "files",
        "path": "a.py",
        "reason": "not UTF-8",
        "key": "text",
        "found": "byte 0xff at offset 0",
        "expected": "UTF-8 text",
    }
    assert result.record.skipped == 41
    assert result.record.skipped_by_reason == {"not UTF-8": 1, "no JSON object": 20, "no text under the key": 20}


def test_problems_of_a_wrong_key_end_early(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "dump.jsonl").write_text('{"content": "text"}\n' * 5000)
    with pytest.raises(InputError) as caught:
        build_dataset(tmp_path / "dump.jsonl", tokenizer, tmp_path / "out", BuildOptions(work_unit_bytes=10_000))
    assert len(caught.value.problems) == 1000


@pytest.mark.parametrize("text", ["\0", "a\0\0b\r\n\ufeff\u2028", " \n\t"], ids=["NUL", "odd", "blank"])
def test_unusual_texts_come_back_exactly(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(text.encode())
    build_dataset(tmp_path / "files", tokenizer, tmp_path / "out")
    assert tokenizer.decode(open_dataset(tmp_path / "out").tokens(0)) == text


def test_one_huge_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    size = 10_000_000
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("x" * size)
    (tmp_path / "files" / "b.txt").write_text("b\n")
    build_dataset(tmp_path / "files", tokenizer, tmp_path / "out", BuildOptions(shard_bytes=1_000_000))
    dataset = open_dataset(tmp_path / "out")
    kinds, counts = np.unique(dataset.tokens(0), return_counts=True)
    texts = [tokenizer.decode([int(kind)]) for kind in kinds]
    assert set("".join(texts)) == {"x"}
    assert sum(len(text) * count for text, count in zip(texts, counts, strict=True)) == size
    assert tokenizer.decode(dataset.tokens(1)) == "b\n"
    assert len(dataset.manifest.shards) == 2


def test_licences_and_copied_fields(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        {"text": "a", "license": "MIT", "repo": {"name": "x", "tags": [1, None]}},
        {"text": "b", "license": ["MIT", "Zlib"], "repo": "\ud800"},
        {"text": "c", "license": None},
        {"text": "d"},
    ]
    source = tmp_path / "dump"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"licence_key": "license", "keep_keys": ["repo"]}
    build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(licence="other", **options))
    found = [read_metadata(open_dataset(tmp_path / "out"), number) for number in range(4)]
    assert [metadata["licence"] for metadata in found] == ["MIT", "MIT, Zlib", "other", "other"]
    assert [metadata.get("fields") for metadata in found] == [
        {"repo": records[0]["repo"]},
        {"repo": "\ud800"},
        None,
        None,
    ]
    (source / "corpus.json").write_text('{"licence": "PSF-2.0"}')
    build_dataset(source, tokenizer, tmp_path / "corpus", BuildOptions(pattern="*.jsonl", **options))
    assert read_metadata(open_dataset(tmp_path / "corpus"), 3)["licence"] == "PSF-2.0"
    (source / "b.jsonl").write_text('{"text": "e", "license": {"name": "MIT"}}\n')
    with pytest.raises(InputError, match=r"b\.jsonl:1: license: found a JSON dict"):
        build_dataset(source, tokenizer, tmp_path / "bad", BuildOptions(pattern="*.jsonl", **options))


def test_a_file_that_cannot_be_opened_is_listed(tmp_path: Path) -> None:
    reader = Reader((Input(tmp_path, "name", "unknown", holds_texts=True),), ReadOptions())
    (bad,) = reader.read(FileRange(0, "absent.py", 0, 5, False, "plain_files"), 0)
    assert isinstance(bad, BadText)
    assert bad.is_file


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open/a.py", "secret/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    (tmp_path / "open" / "nowhere.py").symlink_to("gone")
    assert [path.name for path in list_files(tmp_path, "*.py").files] == ["a.py", "b.py"]
    look = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="secret: --input: found Permission denied"):
        readable_files(list_files(tmp_path, "*.py"))


def test_a_number_too_long_for_python_is_a_bad_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dump = tmp_path / "dump.jsonl"
    dump.write_text('{"text": "one"}\n{"text": "two", "number": ' + "9" * 5000 + "}\n")
    with pytest.raises(InputError, match=r"dump\.jsonl:2"):
        build_dataset(dump, tokenizer, tmp_path / "out")
    assert build_dataset(dump, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True)).record.skipped == 1


def test_a_directory_of_texts_with_a_dump_in_it_is_pointed_out(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "dump"
    source.mkdir()
    (source / "notes.md").write_text("my dump")
    (source / "data.jsonl").write_text('{"text": "one"}\n')
    build_dataset(source, tokenizer, tmp_path / "out")
    said = "JSONL or tar files among 2 files that are read as one text each: 1"
    assert said in capsys.readouterr().err
    for number, name in enumerate(("data.json", "data.ndjson")):
        (source / "data.jsonl").rename(source / name)
        build_dataset(source, tokenizer, tmp_path / f"out{number}")
        assert said in capsys.readouterr().err
        (source / name).rename(source / "data.jsonl")
    (source / "settings.json").write_text('{\n "text": "no JSON line"\n}\n')
    build_dataset(source, tokenizer, tmp_path / "out2")
    assert said.replace("2 files", "3 files") in capsys.readouterr().err
    result = build_dataset(source, tokenizer, tmp_path / "again", BuildOptions(pattern="*.jsonl"))
    assert said not in capsys.readouterr().err
    assert result.record.left_out == {"files with other names": 2}
