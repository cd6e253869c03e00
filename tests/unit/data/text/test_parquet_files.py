"""Documents of Parquet files, whatever their types, compression and row groups; files that are not what they say."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft_mega.data.text.parquet_files import parquet_layout, read_parquet
from ebft_mega.data.text.parquet_pages import DamagedPageError, measure_pages
from ebft_mega.data.text.text_files import BadText, ReadOptions
from ebft_mega.errors import InputError

TEXTS = ["def a():\n", "", None, "\ufeff# caf\u00e9 \u6f22\x00\r\n", "x = 1\n" * 400, "x = 1\n" * 400]
OPTIONS = ReadOptions(text_key="content")


def write(tmp_path: Path, table: pa.Table | dict[str, Any], **options: Any) -> Path:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table(table), file, **options)
    return file


def read(file: Path, options: ReadOptions = OPTIONS, left_out: Counter[str] | None = None) -> list[Any]:
    groups = len(parquet_layout(file, options).group_rows)
    return [d for n in range(groups) for d in read_parquet(file, "d/t.parquet", options, range(n, n + 1), left_out)]


def problem_of(file: Path, options: ReadOptions = OPTIONS, groups: int = 1) -> str:
    *_, last = read_parquet(file, "t.parquet", options, range(groups))
    assert isinstance(last, BadText) and last.is_file
    return str(last.problem)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), "dictionary"])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False, "data_page_size": 100}])
def test_every_kind_of_text_column(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    texts = pa.array(TEXTS).dictionary_encode() if kind == "dictionary" else pa.array(TEXTS).cast(kind)
    file = write(tmp_path, {"other": list(range(6)), "content": texts}, row_group_size=4, **options)
    found = read(file)
    assert [getattr(document, "text", None) for document in found] == TEXTS
    assert [document.path for document in found] == [f"d/t.parquet:{row}" for row in range(1, 7)]
    assert str(found[2].problem).endswith("row 3: content: found null; expected a text in the column 'content'")


@pytest.mark.parametrize(
    "options",
    [{"compression": name} for name in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")]
    + [{"data_page_version": "2.0", "write_page_checksum": True}]
    + [{"use_dictionary": False, "column_encoding": {"content": name}} for name in ("DELTA_BYTE_ARRAY", "PLAIN")]
    + [{"use_dictionary": False, "column_encoding": {"content": "DELTA_LENGTH_BYTE_ARRAY"}, "row_group_size": 7}],
)
def test_every_compression_and_encoding(tmp_path: Path, options: dict[str, Any]) -> None:
    texts = [f"value_{number % 13} = {number}\n" * (number % 5) for number in range(500)]
    assert [document.text for document in read(write(tmp_path, {"content": texts}, **options))] == texts


def test_licences_and_kept_columns_are_those_of_json(tmp_path: Path) -> None:
    columns = {
        "content": ["a", "b"],
        "licenses": [["MIT", "BSD"], None],
        "stars": pa.array([3, None], pa.int32()),
        "score": [0.5, float("nan")],
        "repo": pa.array(["x", "y"]).dictionary_encode(),
        "big": [{"nested": 1}] * 2,
    }
    file = write(tmp_path, columns)
    good, bad = read(file, ReadOptions("content", licence_key="licenses", keep_keys=("stars", "repo", "score", "no")))
    assert (good.licence, good.fields) == ("MIT, BSD", {"stars": 3, "repo": "x", "score": 0.5})
    assert "score: found a number that is not finite" in str(bad.problem)
    assert read(file, ReadOptions("content", licence_key="licenses", keep_keys=("stars",)))[1].fields == {"stars": None}
    nested = problem_of(file, ReadOptions("content", keep_keys=("big",)))
    assert "big: found a column of struct<nested: int64>; expected a column of texts, numbers" in nested
    assert "stars: found a column of int32" in problem_of(file, ReadOptions("content", licence_key="stars"))


def test_a_column_names_the_group_whether_it_is_kept_or_not(tmp_path: Path) -> None:
    columns = {"text": ["a", "b", "c"], "stars": [1, None, 3], "repo": [{"id": 1}] * 3, "repo_name": ["x", "y", None]}
    file = write(tmp_path, columns)
    by_repository = read(file, ReadOptions(group_keys=("repo", "repo_name")))
    assert [document.group for document in by_repository[:2]] == [("repo_name", "x"), ("repo_name", "y")]
    assert not by_repository[0].fields and "'repo_name', a JSON NoneType" in str(by_repository[2].problem)
    assert [getattr(row, "group", None) for row in read(file, ReadOptions(group_keys=("stars",)))] == [
        ("stars", "1"),
        None,
        ("stars", "3"),
    ]
    missing = problem_of(file, ReadOptions(group_keys=("owner",)))
    assert "--split-by: found the columns text: string, stars: int64, repo: struct<id: int64>, repo_name" in missing
    assert "--split-by: found repo: struct<id: int64>" in problem_of(file, ReadOptions(group_keys=("repo",)))


def test_of_two_bad_columns_of_a_row_the_first_that_is_named_is_told_at_every_run(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(20)]
    file = write(tmp_path, {"text": ["a"], **{name: [float("nan")] for name in names}})
    assert read(file, ReadOptions(keep_keys=tuple(reversed(names))))[0].problem.key == "n19"


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1]), "content: found a column of int64; expected a column of texts"),
        (pa.array([["a"]]), "content: found a column of list<element: string>"),
        (pa.array([None]), "content: found a column of null"),
        (pa.array([{"text": "a"}]), "content: found a column of struct<text: string>"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: pa.Array, words: str) -> None:
    assert words in problem_of(write(tmp_path, {"content": column, "id": [7]}))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    file = write(tmp_path, {"contents": ["a"], "id": [1]})
    assert problem_of(file) == (
        f"{file}: content: found no such column; expected a column of texts, named with --text-key "
        "(columns: contents: string, id: int64). Did you mean 'contents'?"
    )
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["content", "content"])
    assert "content: found 2 columns of this name; expected one" in problem_of(write(tmp_path, twice))


def test_a_text_that_is_not_utf8_and_one_that_is_too_long(tmp_path: Path) -> None:
    file = write(tmp_path, {"content": [b"a\n\xff", b"four", b"five!"]})
    left_out: Counter[str] = Counter()
    bad, four = read(file, ReadOptions("content", max_document_bytes=4), left_out)
    assert "row 1:2: text: found byte 0xff at offset 2; expected UTF-8 text" in str(bad.problem)
    assert four.text == "four" and left_out == {"documents that are too long": 1}


def damaged(file: Path, change: Any) -> Path:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    return file


def test_a_table_without_rows_is_no_damage(tmp_path: Path) -> None:
    file = write(tmp_path, {"text": pa.array([], pa.string())})
    assert pq.ParquetFile(file).metadata.num_row_groups == 1
    assert read(file, ReadOptions()) == []


def test_damage_is_found_in_its_row_group(tmp_path: Path) -> None:
    table = {"content": [f"{number}" * 90 for number in range(40)]}
    file = write(tmp_path, table, row_group_size=10, write_page_checksum=True, compression="none")

    def flip(content: bytearray) -> None:
        content[content.index(b"15151515")] ^= 1

    damaged(file, flip)
    assert len(list(read_parquet(file, "t", OPTIONS, range(1)))) == 10
    *_, last = read_parquet(file, "t", OPTIONS, range(1, 2))
    assert last.is_file and "row group 1: file: found" in str(last.problem) and "CRC" in str(last.problem)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.clear(), "no Parquet file: it does not begin with PAR1"),
        (lambda content: content.__delitem__(slice(-20, None)), "a truncated Parquet file: it does not end with PAR1"),
        (lambda content: content.__setitem__(slice(-8, -4), b"\xff\xff\xff\x7f"), "a footer of 2147483647 bytes in a"),
        (lambda content: content.__setitem__(slice(-4, None), b"PARE"), "an encrypted Parquet file"),
        (lambda content: content.__setitem__(slice(-60, -8), b"\xff" * 52), "found "),
    ],
)
def test_a_footer_that_is_none_is_named(tmp_path: Path, change: Any, words: str) -> None:
    file = damaged(write(tmp_path, {"content": ["a" * 300]}), change)
    assert words in problem_of(file)
    with pytest.raises(InputError, match="found "):
        parquet_layout(file, OPTIONS)


def test_a_page_of_an_enormous_declared_size_is_not_believed(tmp_path: Path) -> None:
    file = write(tmp_path, {"content": ["a" * 10_000]}, compression="none", use_dictionary=False)
    assert file.read_bytes()[4:6] == b"\x15\x00"  # the kind of the first page; its unpacked size follows

    def enlarge(content: bytearray) -> None:
        assert content[6] == 0x15
        content[7:10] = b"\xfe\xff\x7f"  # 1 MiB instead of 10 kB: three bytes of a number as before

    damaged(file, enlarge)
    assert "row group 0: file: found a page of 1048575 bytes in" in problem_of(file)


def test_pages_are_measured_before_they_are_unpacked(tmp_path: Path) -> None:
    def header(unpacked: int, packed: int) -> bytes:
        def number(value: int) -> bytes:
            value <<= 1
            parts = b""
            while value > 127:
                parts, value = parts + bytes([value & 127 | 128]), value >> 7
            return parts + bytes([value])

        own = b"\x15" + number(3) + b"\x15" + number(0) + b"\x00"
        return b"\x15\x00\x15" + number(unpacked) + b"\x15" + number(packed) + b"\x2c" + own + b"\x00"

    def measured(content: bytes) -> Any:
        (tmp_path / "pages").write_bytes(content)
        descriptor = os.open(tmp_path / "pages", os.O_RDONLY)
        try:
            return measure_pages(descriptor, 0, len(content))
        finally:
            os.close(descriptor)

    pages = measured(header(300, 10) + bytes(10) + header(900, 4) + bytes(4))
    assert (pages.page_bytes, pages.value_bytes, pages.num_values) == (900, 300, 6)
    for content, words in (
        (header(1 << 27, 10) + bytes(10), "a page of 134217728 bytes in 10"),
        (header(300, 10) + bytes(9), "9 of 10 bytes of a page"),
        (b"\x15\x00\x15", "no complete header"),
        (b"\x19\x00", "no header of a page"),
        (b"\x1c" * 100, "nested too deeply"),
        (b"\x15" + b"\xff" * 30, "more than 64 bits"),
    ):
        with pytest.raises(DamagedPageError, match=words):
            measured(content)
