"""Inputs of a build that nobody would write by accident: nothing of them is believed before it is bounded."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.bounded_reading import NoRegularFileError, open_regular, read_at_most, read_line
from ebft_mega.data.text.compression import MAX_UNPACKED_RATIO, CutFileError, open_lines
from ebft_mega.data.text.listing import list_files
from ebft_mega.data.text.tar_members import MAX_EXTENSION_BYTES, Member, read_members
from ebft_mega.data.text.text_files import (
    LONG_DOCUMENTS,
    MAX_FIELD_LEVELS,
    MAX_FIELDS_BYTES,
    MAX_LICENCE_CHARACTERS,
    BadText,
    ReadOptions,
    TextDocument,
    read_jsonl,
    read_text_file,
)

REPOSITORY = Path(__file__).resolve().parents[4]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def header(name: bytes, size: int = 0, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A tar header; `fields` are written over it by name before its checksum is made."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[0:100] = name.ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    places = {"stored": 124, "magic": 257, "prefix": 345, "extended": 482}
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, content: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + padded(content)


def record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return str(size).encode() + body


END = bytes(1024)
GOOD = member(b"good.txt", b"good")
NAME = b"n" * 200 + b".txt"


def written(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def archive(path: Path, left_out: Counter[str] | None = None, **options: object) -> list[TextDocument | BadText]:
    return list(read_text_archive(path, path.name, ReadOptions(**options), left_out))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_are_read_as_the_standard_library_reads_them(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "a.tar"
    names = ["a.txt", f"{'folder/' * 20}b.txt", "caf\u00e9.txt", b"\xff.txt".decode("utf-8", "surrogateescape"), "d/"]
    names += ["x" * 99 + "/" + "y" * 90, *([] if kind == tarfile.USTAR_FORMAT else ["z" * 300, f"{'q/' * 300}r.txt"])]
    with tarfile.open(path, "w", format=kind) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number * 311, 1.5
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for linked in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = linked, "l" * (90 if kind == tarfile.USTAR_FORMAT else 200)
            tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [
            Member(m.name, m.isreg(), m.isdir(), m.issparse(), m.offset_data, m.size if m.isreg() else 0) for m in tar
        ]
    with path.open("rb") as stream:
        assert list(read_members(stream)) == expected


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([header(b"a.txt", stored=b"\xff" * 12)], "a size below 0"),
        ([header(b"a.txt", stored=b"\x80" + b"\xff" * 11)], "of 309485009821345068724781055 bytes of a member"),
        ([header(b"a.txt", stored=b"77777777777\0")], "of 8589934591 bytes of a member"),
        ([header(b"a.txt", stored=b"0000x000000\0")], "a size that is no number"),
        ([header(b"a", 1 << 30, b"x")], f"records of {1 << 30} bytes, where {MAX_EXTENSION_BYTES}"),
        ([header(b"a", 1 << 30, b"L")], f"a long name or pax records of {1 << 30} bytes"),
        ([header(b"a", 1 << 30, b"K")], "a long name or pax records of"),
        ([header(b"a", 1 << 30, b"g")], "a long name or pax records of"),
        ([header(b"a", stored=b"\x80" + b"\x7f" * 11, kind=b"L")], "a long name or pax records of"),
        ([member(b"a", NAME, b"L"), member(b"a", NAME, b"L"), GOOD], "more than one name"),
        ([member(b"a", NAME, b"L"), member(b"a", record("path", b"b.txt"), b"x"), GOOD], "more than one name"),
        ([member(b"a", record("size", b"1") * 2, b"x"), GOOD], "more than one size"),
        ([member(b"a", record("size", b"-512"), b"x"), GOOD], "a size that is no number"),
        ([member(b"a", record("size", b"9" * 19), b"x"), GOOD], "of 9999999999999999999 bytes of a member"),
        ([member(b"a", record("size", b"9" * 5000), b"x"), GOOD], "a size that is no number"),
        ([member(b"a", record("path", b"b.txt"), b"g"), GOOD], "more than one name"),
        ([member(b"a", b"9" * 30000, b"x"), GOOD], "damaged pax records"),
        ([member(b"a", b"5 a=b" * 100, b"x"), GOOD], "damaged pax records"),
        ([member(b"a", b"0 a=b\n", b"x"), GOOD], "damaged pax records"),
        ([member(b"a", record("path", b"p" * 5000), b"x"), GOOD], "a name of 5000 bytes"),
        ([member(b"a", NAME, b"L")], "a long name or pax records without a member"),
        ([header(b"a", 500, b"L") + b"n" * 100], "the end of the file inside a long name"),
        ([header(b"a.txt", kind=b"S", extended=b"\1") + bytes(1024)], "a sparse member with a long map"),
        ([header(b"a.txt")[:300]], "a damaged or cut member header"),
        ([GOOD * 1001], "more than 1000 members of one sample"),
    ],
)
def test_headers_are_not_believed(tmp_path: Path, parts: list[bytes], found: str) -> None:
    is_cut = found in ("a damaged or cut member header", "the end of the file inside a long name")
    path = written(tmp_path / "a.tar", member(b"first.txt", b"first"), *parts, b"" if is_cut else END)
    began = time.process_time()
    last = archive(path)[-1]
    assert isinstance(last, BadText) and last.is_file and found in last.problem.found
    assert last.problem.where.startswith(f"{path}: offset ") and time.process_time() - began < 2


def test_a_chain_of_headers_that_describe_headers_is_walked_to_its_end(tmp_path: Path) -> None:
    """The standard library calls itself for each."""
    path = written(tmp_path / "a.tar", member(b"a", record("comment", b"c"), b"x") * 5000, GOOD, END)
    with pytest.raises(RecursionError), tarfile.open(path):
        pass
    (document,) = archive(path)
    assert isinstance(document, TextDocument) and document.text == "good"


@pytest.mark.parametrize(
    "sparse",
    [
        header(b"big.txt", 512, b"S") + bytes(512),
        member(b"x", record("GNU.sparse.major", b"1") + record("GNU.sparse.realsize", b"9" * 15), b"x")
        + member(b"big.txt", b"0\n".ljust(512, b"\0")),
    ],
)
def test_sparse_members_are_not_expanded(tmp_path: Path, sparse: bytes) -> None:
    bad, document = archive(written(tmp_path / "a.tar", sparse, GOOD, END))
    assert isinstance(bad, BadText) and not bad.is_file and bad.problem.found == "a sparse file"
    assert isinstance(document, TextDocument) and document.text == "good"


def test_long_documents_are_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = Counter[str]()
    options = ReadOptions(max_document_bytes=1000)
    assert read_text_file(written(tmp_path / "a.txt", b"x" * 1000), "a.txt", options, left_out) is not None
    assert read_text_file(written(tmp_path / "a.txt", b"x" * 1001), "a.txt", options, left_out) is None
    # The limit is one of UTF-8, not of the line's bytes, up to the three times as many that JSON may need.
    texts = ["x" * 1000, "x" * 1001, "\u00e9" * 500, "\u00e9" * 501, "x" * 2_000_000, "last"]
    lines = written(tmp_path / "a.jsonl", *(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    found = list(read_jsonl(lines, "a.jsonl", options, left_out=left_out))
    assert [(each.text, each.path) for each in found] == [
        *((texts[0], "a.jsonl:1"), (texts[2], "a.jsonl:3"), ("last", "a.jsonl:6"))
    ]
    shard = written(tmp_path / "a.tar", member(b"a.txt", b"x" * 1001), member(b"b.txt", b"x" * 1000), END)
    assert [each.path for each in archive(shard, left_out, max_document_bytes=1000)] == ["a.tar:b"]
    assert left_out == {LONG_DOCUMENTS: 5}


def test_a_line_without_an_end_is_read_once_whatever_the_number_of_ranges(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "a"}\n', b"x" * 3_000_000, b'\n{"text": "b"}\n')
    size = path.stat().st_size
    read: list[int] = []

    class Counting(io.BufferedReader):
        def readline(self, size: int = -1) -> bytes:
            assert size is not None and size > 0
            line = super().readline(size)
            read.append(len(line))
            return line

    left_out = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebft_mega.data.text.text_files.open_lines", lambda file: Counting(io.FileIO(file)))
        texts = [
            document.text
            for begin in range(0, size, 30_000)
            for document in read_jsonl(
                path, "a", ReadOptions(max_document_bytes=100), begin, min(begin + 30_000, size), None, left_out
            )
        ]
    assert texts == ["a", "b"] and left_out == {LONG_DOCUMENTS: 1}
    assert sum(read) < 15 * size  # each range once, in parts of a quarter of a megabyte, and the line once more


def test_lines_are_never_asked_for_whole() -> None:
    assert read_line(io.BytesIO(b"12345\n6\n"), 6) == (b"12345\n", 6)
    stream = io.BytesIO(b"123456\n7\n")
    assert (read_line(stream, 6), read_line(stream, 6), read_line(stream, 6)) == ((None, 7), (b"7\n", 2), (b"", 0))
    assert read_line(io.BytesIO(b"1" * 600_000), 6) == (None, 600_000)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_unpacks_beyond_all_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    free = 4 << 20
    monkeypatch.setattr("ebft_mega.data.text.compression.FREELY_UNPACKED_BYTES", free)
    line = b" " * ((1 << 20) - 1) + b"\n"
    content = line * (free // len(line)) + b"\n"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(level=1).compress
    path = written(tmp_path / f"a.jsonl{suffix}", pack(content[:-1]))
    assert list(read_jsonl(path, path.name, ReadOptions())) == []
    written(path, pack(content))
    (bad,) = read_jsonl(path, path.name, ReadOptions())
    assert isinstance(bad, BadText) and bad.is_file
    assert f"more than {free} bytes in a file of" in bad.problem.found
    assert f"at most {MAX_UNPACKED_RATIO} times" in bad.problem.expected


def test_a_window_that_there_is_no_room_for_is_no_crash(tmp_path: Path) -> None:
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([31 << 3]) + b"\x01\x00\x00"  # a window of 2 TiB, an empty last block
    path = written(tmp_path / "a.jsonl.zst", frame)
    with pytest.raises(CutFileError), open_lines(path) as lines:
        lines.read()


MEMORY_PROGRAM = """
import sys
from pathlib import Path
from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.text_files import ReadOptions, read_jsonl, read_text_file, first_record_keys
import zstandard, gzip
def peak():  # not ru_maxrss, which begins with that of the process that has started this one
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))
before = peak()
options = ReadOptions()
for path in map(Path, sys.argv[1:]):
    if path.suffix == ".txt":
        list(filter(None, [read_text_file(path, "a", options)]))
        first_record_keys(path)
    elif path.suffix == ".tar":
        list(read_text_archive(path, "a", options))
    else:
        list(read_jsonl(path, "a", options))
    print(path.name, peak() - before, flush=True)
"""


def test_hostile_files_take_no_more_memory_than_the_limits_say(tmp_path: Path) -> None:
    """A sparse file of a gigabyte, bombs of a gigabyte in 33 kB and 1 MB, archives of a gigabyte in one name."""
    for name, size in (("a.txt", 1 << 30), ("a.jsonl", 1 << 28)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    blocks = (b"\x1a\x00\x10" + b"x") * (1 << 13)  # each repeats a byte 128 Ki times: all of a gigabyte at once
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + blocks.replace(b"\x1a\x00\x10", b"\x02\x00\x10")
    written(tmp_path / "b.jsonl.zst", frame)
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header(b"a", 1 << 30, b"L"))
        file.truncate((1 << 30) + 2048)
    with (tmp_path / "b.tar").open("wb") as file:
        file.write(header(b"a.txt", 1 << 30))
        file.truncate((1 << 30) + 2048)
    names = ("a.txt", "a.jsonl", "b.jsonl.zst", "a.tar", "b.tar")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, *(str(tmp_path / name) for name in names)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    grown = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(grown) == set(names), done.stderr
    # A line of JSON that is too long is noticed after 49 MiB; what is unpacked at once, after as many again.
    assert max(grown.values()) < 260, grown


def test_pipes_are_refused_even_where_they_take_the_place_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, file = tmp_path / "pipe", written(tmp_path / "file", b"x")
    os.mkfifo(pipe)
    with pytest.raises(NoRegularFileError, match="a pipe"):
        open_regular(pipe)
    regular = os.stat(file)
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(NoRegularFileError, match="a pipe"):
        read_at_most(pipe, 5)


def test_a_file_that_grows_while_it_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "file", b"x" * 10)
    small = os.stat(written(tmp_path / "small", b"x"))
    monkeypatch.setattr(os, "fstat", lambda descriptor: small)
    assert read_at_most(file, 9) is None
    assert read_at_most(file, 10) == b"x" * 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a", "text": "b"}', "no JSON object"),
        (b'{"text": "a", "n": {"k": 1, "k": 2}}', "no JSON object"),
        (b'{"text": "a", "n": NaN}', "no JSON object"),
        (b'{"text": "a", "n": 1e999}', "no JSON object"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "no JSON object"),
        (b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON object"),
        (b"[" * 200_000, "no JSON object"),
        ('{"text": "a"}'.encode("utf-16"), "no JSON object"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (json.dumps({"text": "a", "l": "x" * (MAX_LICENCE_CHARACTERS + 1)}).encode(), "a field that is too long"),
        (json.dumps({"text": "a", "l": ["x"] * MAX_LICENCE_CHARACTERS}).encode(), "a field that is too long"),
        (json.dumps({"text": "a", "k": "x" * MAX_FIELDS_BYTES}).encode(), "a field that is too long"),
        (b'{"text": "a", "k": ' + b"[" * 101 + b"]" * 101 + b"}", "a field that is too long"),
    ],
)
def test_lines_that_leave_a_choice_or_hold_too_much_are_bad_ones(tmp_path: Path, line: bytes, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", line, b'\n{"text": "good"}\n')
    bad, *others = read_jsonl(path, "a", ReadOptions(licence_key="l", keep_keys=("k",)))
    assert isinstance(bad, BadText) and bad.reason == reason and not bad.is_file and len(str(bad.problem)) < 1000
    assert [item.text for item in others if isinstance(item, TextDocument)][-1] == "good"


def test_a_kept_field_at_its_limits_stays(tmp_path: Path) -> None:
    value = b"[" * MAX_FIELD_LEVELS + b"]" * MAX_FIELD_LEVELS
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a", "k": ' + value + b', "other": "\\ud800"}\n')
    (document,) = read_jsonl(path, "a", ReadOptions(keep_keys=("k",)))
    assert isinstance(document, TextDocument) and json.dumps(document.fields["k"]).encode() == value


def test_a_folder_beyond_the_longest_path_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):  # a path has at most 4,095 bytes
        os.mkdir("d" * 200, dir_fd=descriptor)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    try:
        listing = list_files(tmp_path)
        assert [file.name for file in listing.files] == ["a.txt"]
        (problem,) = listing.unreadable
        assert problem.found == "File name too long"
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / ("d" * 200))], check=True, timeout=30)


def test_folders_may_be_deeper_than_pythons_stack(tmp_path: Path) -> None:
    depth, here = 1200, os.open(tmp_path, os.O_RDONLY)
    folders = [here]
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=folders[-1])
            folders.append(os.open("d", os.O_RDONLY, dir_fd=folders[-1]))
            if len(folders) > 2:
                os.close(folders.pop(-2))
        os.close(os.open("a.py", os.O_CREAT | os.O_WRONLY, dir_fd=folders[-1]))
        assert [len(file.relative_to(tmp_path).parts) for file in list_files(tmp_path).files] == [depth + 1]
    finally:
        for folder in folders:
            os.close(folder)
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True, timeout=30)
