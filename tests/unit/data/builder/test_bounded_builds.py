"""Builds whose inputs are too long, cannot be written, go away meanwhile, or need more room than there is."""

import json
import resource
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from ebft_mega.data.builder import build_summary, dataset_build, tokenizing
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.verify import verify_dataset
from ebft_mega.data.text.corpus import build_corpus
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_long_documents_are_left_out_counted_and_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = lines(tmp_path / "a.jsonl", ["a" * 100, "b" * 101, "c"])
    record = build_dataset(dump, tokenizer, tmp_path / "out", BuildOptions(max_document_bytes=100)).record
    assert (record.documents, record.left_out) == (2, {"documents that are too long": 1})
    note = "1 document of more than 100 bytes is left out (--max-document-bytes)"
    assert record.notes == (note,) and note in capsys.readouterr().err
    with pytest.raises(InputError, match="no document with text .left out: documents that are too long: 3"):
        build_dataset(dump, tokenizer, tmp_path / "none", BuildOptions(max_document_bytes=0))


def test_licences_are_counted_within_bounds(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_summary, "MAX_LISTED_LICENCES", 2)
    monkeypatch.setattr(tokenizing, "_COUNTED_CHARACTERS", 3)
    dump = tmp_path / "a.jsonl"
    names = ["one", "two", "three", "two", "four", "three", "thr"]
    records = [{"text": f"text {number}", "licence": name} for number, name in enumerate(names)]
    dump.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = BuildOptions(licence_key="licence", work_unit_bytes=100)
    record = build_dataset(dump, tokenizer, tmp_path / "out", options).record
    assert (record.licences, record.unlisted_licences) == ({"thr": 3, "two": 2}, 2)
    stored = []
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            stored += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    assert [meta["licence"] for meta in stored] == names


@pytest.fixture
def narrow(tmp_path: Path) -> Tokenizer:
    """A tokenizer that can write a single word, and ends documents with its unknown token."""
    directory = tmp_path / "narrow"
    directory.mkdir()
    Backend(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    return load_tokenizer(directory)


def test_what_a_tokenizer_cannot_write_is_refused_or_skipped(tmp_path: Path, narrow: Tokenizer) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    dump = lines(tmp_path / "a" / "a.jsonl", ["known", "x", "known", "y", "x", "known"])
    options = BuildOptions(deduplicate=False, work_unit_bytes=40)
    with pytest.raises(InputError, match=r"a\.jsonl.*token 0, the end of a document"):
        build_dataset(dump, narrow, tmp_path / "out", options)
    options = BuildOptions(deduplicate=False, work_unit_bytes=40, skip_bad=True)
    record = build_dataset(dump, narrow, tmp_path / "out", options).record
    assert (record.documents, record.duplicates, record.skipped) == (3, 0, 3)
    assert record.skipped_by_reason == {"a text that the tokenizer cannot write": 3}
    dataset = open_dataset(tmp_path / "out")
    reports = list(verify_dataset(dataset))  # names of members are numbers of documents, without a gap
    assert not [problem for report in reports for problem in report.problems]
    assert sum(report.documents for report in reports) == 3
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in skipped] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:5"]
    with pytest.raises(InputError, match="none that this tokenizer can write"):
        build_dataset(lines(tmp_path / "b" / "b.jsonl", ["x"]), narrow, tmp_path / "none", options)


def test_the_list_of_what_is_skipped_is_bounded_and_the_count_is_not(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("skipped_list", "build_summary"):
        monkeypatch.setattr(f"ebft_mega.data.builder.{module}.MAX_LISTED_SKIPPED", 2)
    dump = tmp_path / "a.jsonl"
    dump.write_text('{"text": "a"}\n' + "x\n" * 5)
    record = build_dataset(dump, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True)).record
    assert record.skipped == 5 and "3 that cannot be used are counted, but not listed in skipped.jsonl" in record.notes
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_is_one_error_and_the_same_call_resumes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A limit on the size of files stands for the disk; a file that is mapped into memory would end the process."""
    dump = lines(tmp_path / "a.jsonl", [f"{number} " * 500 for number in range(60)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1000, 60_000):  # the digests do not fit; the first shard does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                build_dataset(dump, tokenizer, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / ".out.partial").glob("**/*.new")) and not list(tmp_path.glob("**/*.tar"))
    assert build_dataset(dump, tokenizer, tmp_path / "out").record.documents == 60


@pytest.mark.parametrize("place", ["make_plan", "_scan"])
def test_a_file_that_goes_away_is_bad_input(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.py", "b.py"):
        (source / name).write_text(f"# {name}\n")
    original = getattr(dataset_build, place)

    def and_remove(*arguments: object) -> object:
        found = original(*arguments)
        (source / "b.py").unlink()
        return found

    monkeypatch.setattr(dataset_build, place, and_remove)
    with pytest.raises(InputError, match=r"b\.py: text: found No such file"):
        build_dataset(source, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_corpus_with_odd_names_and_a_huge_file(tmp_path: Path) -> None:
    source = tmp_path / "library"
    source.mkdir()
    for number in range(6):
        name = b"caf\xe9%d.py".decode("utf-8", "surrogateescape") % number if number < 3 else f"m{number}.py"
        (source / name).write_text(f"# a module of the library, number {number}\n" * 4)
    with (source / "huge.py").open("wb") as file:
        file.truncate(1 << 40)
    manifest = build_corpus(source, tmp_path / "out", max_bytes=10_000)
    assert len(manifest["files"]) == 6 and manifest["left_out_files"]["too_long"] == 1
