"""Formats of files are recognised by names, contents and options, as the entries of the registry say."""

import re
import tarfile
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.input_files import list_inputs
from ebft_mega.data.builder.work_plan import make_plan
from ebft_mega.data.selection.format_options import format_options, require_use
from ebft_mega.data.selection.text_formats import FormatChoice, Recogniser, kind_of_file, misnamed
from ebft_mega.data.text.file_kinds import kind
from ebft_mega.data.text.formats.parquet import Parquet
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.errors import InputError
from ebft_mega.extension.text_format import TextFormat
from ebft_mega.registry.kinds import TEXT_FORMATS

ROOT = Path(__file__).resolve().parents[4]


class Marked(TextFormat):
    """Lines of JSON with a mark."""

    name = "marked"
    suffixes = (".marked.jsonl",)


class Rival(TextFormat):
    """Another reader of JSON lines."""

    name = "rival"
    suffixes = (".jsonl",)


class Told(TextFormat):
    """Told by its first bytes."""

    name = "told"
    kinds = (kind("a told file", "nothing else", rb"TOLD"),)


@pytest.fixture
def add(monkeypatch):
    """Put entries into the registry, as a plugin does."""
    return lambda *entries: [monkeypatch.setitem(TEXT_FORMATS.added, entry.name, entry) for entry in entries]


def recogniser(**options):
    return Recogniser(FormatChoice(**options), ReadOptions())


def write(path, content=b"text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_entry_is_called_as_its_file_and_described():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    names = TEXT_FORMATS.own_names()
    assert len(names) >= 5 and sum(TEXT_FORMATS.entry(name).takes_any_file for name in names) == 1
    for name in names:
        assert TEXT_FORMATS.entry(name).summary() and f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("a.jsonl", ("json_lines",)),
        ("a.json.gz", ("json_lines",)),
        ("a.parquet", ("parquet",)),
        ("a.tar.gz", ("source_archive",)),
        ("a.zip", ("source_archive",)),
        ("a.tar", ("source_archive", "webdataset_tar")),
        ("a.gz", ()),
        ("a.py", ()),
        ("a.JSONL", ()),
    ],
)
def test_a_name_says_which_formats_a_file_may_have(name, formats):
    assert recogniser().candidates(Path("folder.jsonl") / name) == formats


def test_the_longest_suffix_decides_and_then_the_contents(tmp_path, add):
    add(Marked)
    formats = recogniser()
    assert formats.candidates(tmp_path / "a.marked.jsonl") == ("marked",)
    assert formats.candidates(tmp_path / "a.jsonl") == ("json_lines",)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(write(tmp_path / "0.txt"), "0.txt")
    both = formats.candidates(tmp_path / "a.tar")
    assert formats.settled([(tmp_path / "a.tar", both)]) == ("webdataset_tar",)


def test_two_formats_of_one_suffix_are_told_apart_by_an_option(tmp_path, add):
    add(Rival)
    file = write(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"--format json_lines \(.*\) or --format rival \(Another reader"):
        list_inputs(file, BuildOptions())
    assert list_inputs(file, BuildOptions(format="rival")).formats == ("rival",)


def test_a_format_without_suffixes_is_told_by_its_first_bytes(tmp_path, add):
    write(tmp_path / "a.txt", b"TOLD you so")
    write(tmp_path / "b.txt", b"other")
    write(tmp_path / "README.md", b"TOLD")
    assert list_inputs(tmp_path, BuildOptions()).formats == ("plain_files",) * 3
    add(Told)
    assert list_inputs(tmp_path / "a.txt", BuildOptions()).formats == ("told",)
    assert kind_of_file(tmp_path / "a.txt") is Told.kinds[0]
    (tmp_path / "b.txt").unlink()
    found = list_inputs(tmp_path, BuildOptions())
    assert found.formats == ("told",) * 2 and not found.holds_texts


def test_a_chosen_format_reads_files_of_any_name(tmp_path):
    names = ["b.jsonl", "c.txt", "d.parquet"]
    for name in names:
        write(tmp_path / name)
    options = BuildOptions(format="json_lines")
    found = list_inputs(tmp_path, options)
    assert [file.name for file in found.files] == ["b.jsonl"] and found.others == ("c.txt", "d.parquet")
    (tmp_path / "b.jsonl").unlink()
    assert list_inputs(tmp_path, options).formats == ("json_lines",) * 2  # all, where no name says it
    found = list_inputs(tmp_path, BuildOptions(format="plain_files"))
    assert found.formats == ("plain_files",) * 2 and found.holds_texts and not found.containers_as_texts
    assert list_inputs(tmp_path / "c.txt", options).formats == ("json_lines",)


@pytest.mark.parametrize(("name", "near"), [("json_line", "json_lines"), ("Parquet", "parquet"), ("zzz", None)])
def test_an_unknown_format_is_refused_with_the_nearest(tmp_path, name, near):
    with pytest.raises(InputError) as caught:
        make_plan([write(tmp_path / "a.jsonl")], BuildOptions(format=name), "tokenizer")
    (problem,) = caught.value.problems
    assert problem.where == "--format" and problem.suggestion == (near or "")
    assert "json_lines, parquet, plain_files" in problem.expected


def test_a_file_is_named_by_its_first_bytes_whatever_it_is_read_as(tmp_path):
    file = write(tmp_path / "a.parquet", b"PAR1")
    entries = recogniser().entries
    assert misnamed(file, entries["parquet"]) is None and misnamed(file, entries["plain_files"]) is None
    assert misnamed(file, entries["json_lines"]) is Parquet.kinds[0]
    assert misnamed(write(tmp_path / "a.any", b"PAR1"), entries["parquet"]) is None
    assert misnamed(write(tmp_path / "a.tgz", b"PK\x03\x04"), entries["source_archive"]).words == "a zip file"


def test_archives_are_not_chosen_twice(tmp_path):
    write(tmp_path / "a.tar")
    with pytest.raises(InputError, match="--archives: source: found --format webdataset_tar beside it"):
        make_plan([tmp_path / "a.tar"], BuildOptions(format="webdataset_tar", archives="source"), "tokenizer")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("json_lines", "no NAME.KEY=VALUE"),
        ("json_line.key=1", "no such text format.*Did you mean 'json_lines'"),
        ("json_lines.key=1", "expected no options: json_lines has none"),
    ],
)
def test_options_of_formats_are_checked(text, said):
    with pytest.raises(InputError, match=f"--format-option.*{said}"):
        format_options([text])


def test_what_a_format_makes_no_use_of_is_refused():
    require_use(FormatChoice("parquet"), {"text_key": "content", "text_member": None})
    for formats in (FormatChoice(), FormatChoice("webdataset_tar")):
        with pytest.raises(InputError, match=re.escape("--text-key: content: found ")):
            require_use(formats, {"text_key": "content"})
