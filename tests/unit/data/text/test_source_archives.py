"""Archives of source: each member a text under its path, whatever the packing; hostile ones are named and bounded."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import read_build_record
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.selection.file_choice import EXCLUDED_FILES, NOT_INCLUDED
from ebft_mega.data.store.inspection import read_metadata
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.source_archives import SOURCE, WEBDATASET, kind_of_tar, read_source_archive
from ebft_mega.data.text.text_files import BadText, ReadOptions, TextDocument
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import InputError

TREE = {
    "code-1.0/src/a.py": b"def a():\n    return 1\n",
    "code-1.0/src/b.c": b"int b;\r\n",
    "code-1.0/src/b.h": b"\xef\xbb\xbfint b;\n",
    "code-1.0/.github/ci.yml": b"on: push\n",
    "code-1.0/__pycache__/a.pyc": b"\x00\xff",
    "code-1.0/../../etc/x": b"x\n",
    "code-1.0/long.py": b"x = 1\n" * 100,
}
READ = ["code-1.0/src/a.py", "code-1.0/src/b.c", "code-1.0/src/b.h", "code-1.0/../../etc/x"]
OPTIONS = ReadOptions(max_document_bytes=100)


def tar_bytes(tree: dict[str, bytes] = TREE, kind: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind, pax_headers={"comment": "a commit"}) as archive:
        folder = tarfile.TarInfo("code-1.0")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("code-1.0/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, text in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return content.getvalue()


def zip_bytes(tree: dict[str, bytes] = TREE, **options: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        archive.mkdir("code-1.0")
        link = zipfile.ZipInfo("code-1.0/link.py")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        for name, text in tree.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return content.getvalue()


def packed(name: str) -> bytes:
    if name.endswith(".zip"):
        return zip_bytes()
    plain = tar_bytes()
    if name.endswith((".gz", ".tgz")):
        return gzip.compress(plain)
    return zstandard.compress(plain) if name.endswith(".zst") else plain


def read(file: Path, options: ReadOptions = OPTIONS, left_out: Counter[str] | None = None) -> list[Any]:
    return list(read_source_archive(file, f"d/{file.name}", options, left_out))


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.tgz", "c.tar.zst", "c.zip"])
def test_each_member_is_a_text_under_its_path(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(packed(name))
    left_out: Counter[str] = Counter()
    found = read(file, left_out=left_out)
    assert [(document.path, document.text.encode()) for document in found] == [
        (f"d/{name}/{member}", TREE[member]) for member in READ
    ]
    assert left_out == {
        "hidden files": 1,
        "files in __pycache__ folders": 1,
        "links in archives": 1,
        "documents that are too long": 1,
    }
    for cut in (len(file.read_bytes()) // 2, len(file.read_bytes()) - 400):
        file.write_bytes(packed(name)[:cut] if not name.endswith(".tar") else packed(name)[: 512 * 7 + 100])
        *_, last = read(file)
        assert isinstance(last, BadText) and last.is_file, cut


def test_a_member_that_is_no_text_is_bad_by_itself(tmp_path: Path) -> None:
    (tmp_path / "c.zip").write_bytes(zip_bytes({"a/b.png": b"\x89PNG\xff", "a/c.py": b"c\n"}))
    bad, good = read(tmp_path / "c.zip")
    assert not bad.is_file and bad.path == "d/c.zip/a/b.png" and isinstance(good, TextDocument)


def zip_with(change: Any, tree: dict[str, bytes] | None = None) -> bytes:
    content = bytearray(zip_bytes(tree or {"a/b.py": b"b = 1\n" * 50, "a/c.py": b"c = 1\n" * 50}))
    change(content)
    return bytes(content)


def central(content: bytearray, number: int) -> int:
    at = -1
    for _ in range(number + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    return at


def overlapping(content: bytearray) -> None:
    """Two members (0 is a folder, 1 a link) whose bytes are the same ones."""
    first, second = central(content, 2), central(content, 3)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]


def encrypted(content: bytearray) -> None:
    content[central(content, 2) + 8] |= 1


def bomb(content: bytearray) -> None:
    at = central(content, 2) + 24
    content[at : at + 4] = struct.pack("<I", 3 << 30)


def huge_directory(content: bytearray) -> None:
    at = content.rindex(b"PK\x05\x06") + 12
    content[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)


def zip64_lie(content: bytearray) -> None:
    at = content.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 4, 4, 1 << 40, 64)
    content[at:at] = record + struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)


def other_method(content: bytearray) -> None:
    at = central(content, 2)
    content[at + 10 : at + 12] = struct.pack("<H", 14)


@pytest.mark.parametrize(
    ("change", "words", "whole"),
    [
        (overlapping, "members that overlap", True),
        (encrypted, "encrypted members", True),
        (bomb, "members of together 3221225", True),
        (huge_directory, "a directory of 4294967280 bytes", True),
        (zip64_lie, "a directory of 1099511627776 bytes", True),
        (lambda content: content.__delitem__(slice(-200, None)), "no directory at the end", True),
        (other_method, "packed by method 14", False),
        (lambda content: content.__setitem__(slice(-1, None), b"\x01"), "", None),
    ],
)
def test_a_hostile_zip_is_named(tmp_path: Path, change: Any, words: str, whole: bool | None) -> None:
    (tmp_path / "c.zip").write_bytes(zip_with(change))
    found = [item for item in read(tmp_path / "c.zip", ReadOptions()) if isinstance(item, BadText)]
    if whole is None:  # read or refused
        return
    assert len(found) == 1 and words in str(found[0].problem) and found[0].is_file is whole


def test_one_name_for_two_members_and_a_name_of_many_letters(tmp_path: Path) -> None:
    (tmp_path / "c.zip").write_bytes(zip_bytes({"a/" + "n" * 5000: b"x"}))
    assert "a name of 5002 characters" in str(read(tmp_path / "c.zip")[-1].problem)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.py", "1")
        archive.writestr("a.py", "2")
    assert "two members of one name" in str(read(tmp_path / "d.zip")[-1].problem)


def test_a_packed_tar_that_unpacks_beyond_all_bounds_is_refused(tmp_path: Path) -> None:
    head = tarfile.TarInfo("a/zeros")
    head.size = 1 << 30
    (tmp_path / "c.tgz").write_bytes(gzip.compress(head.tobuf() + bytes(1 << 27)))
    assert "more than 67108864 bytes in a file of" in str(read(tmp_path / "c.tgz")[-1].problem)


WEB = {"000.txt": b"one", "000.json": b"{}", "001.txt": b"two", "001.json": b"{}"}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a/b.py", "a/c.py", "setup.py"], SOURCE),
        (["a/b.c", "a/b.h"], SOURCE),
        (["0.txt", "0.json", "1.txt"], WEBDATASET),
        (["train/0.txt", "train/0.json"], WEBDATASET),
        (["a/b.py", "a/c.py", "a/README.txt", "a/d.py"], None),
        (["0.cls", "0.jpg"], None),
        ([], WEBDATASET),
    ],
)
def test_what_a_tar_file_clearly_is(tmp_path: Path, names: list[str], kind: str | None) -> None:
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    assert kind_of_tar(tmp_path / "c.tar", "txt")[0] == kind


def test_builds_of_archives_and_what_their_option_decides(tmp_path: Path, tokenizer_directory: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    mixed = {**TREE, "code-1.0/README.txt": b"read me\n"}
    source = tmp_path / "in"
    source.mkdir()
    (source / "c.tar").write_bytes(tar_bytes(mixed))
    words = "in folders; expected --archives source (each member is a text) or --archives webdataset"
    with pytest.raises(InputError) as caught:
        build_dataset(source, tokenizer, tmp_path / "out")
    assert words in str(caught.value)
    assert "a tar file of 8 files in 7 samples, of which 1 have a 'txt' member" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (source / "d.zip").write_bytes(zip_bytes({"d/d.py": b"d\n"}))
    record = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(archives="source")).record
    assert (record.documents, record.input_files) == (7, {"in": 2})
    assert b'"c.tar/code-1.0/src/a.py"' in b"".join(
        (tmp_path / "out" / shard.name).read_bytes() for shard in open_dataset(tmp_path / "out").manifest.shards
    )
    for options, found in (
        ({"licence_key": "license"}, "--licence-key: license: found inputs of which each file is a text"),
        ({"text_key": "text"}, "--text-key: text: found"),
    ):
        with pytest.raises(InputError) as caught:
            build_dataset(source, tokenizer, tmp_path / "no", BuildOptions(archives="source", **options))
        assert found in str(caught.value)
    with pytest.raises(InputError, match="--archives: webdataset: found no such archive in any --input"):
        build_dataset(source / "d.zip", tokenizer, tmp_path / "no", BuildOptions(archives="webdataset"))


@pytest.mark.parametrize("name", ["tree.zip", "tree.tar.gz", "tree.tar"])
def test_members_of_an_archive_that_is_an_input_are_chosen(
    tmp_path: Path, tokenizer_directory: Path, name: str
) -> None:
    tree = {"src/a.py": b"a = 1\n", "src/b.md": b"b\n", "src/old/c.py": b"c = 3\n", "d.py": b"d = 4\n"}
    content = zip_bytes(tree) if name.endswith(".zip") else tar_bytes(tree)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    options = BuildOptions(include=("*.py",), exclude=("old/",), archives=SOURCE)
    build_dataset(tmp_path / name, load_tokenizer(tokenizer_directory), tmp_path / "out", options)
    dataset = open_dataset(tmp_path / "out")
    paths = [read_metadata(dataset, number)["path"] for number in range(dataset.manifest.documents)]
    assert sorted(paths) == [f"{name}/d.py", f"{name}/src/a.py"]
    record = read_build_record(tmp_path / "out")
    assert record is not None and (record.left_out[NOT_INCLUDED], record.left_out[EXCLUDED_FILES]) == (1, 1)
