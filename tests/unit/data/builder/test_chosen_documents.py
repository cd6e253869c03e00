"""Options that choose documents act on files, JSON lines and archives alike, are counted, and change every reading."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError

ROOT = Path(__file__).parents[4]
TEXTS = {
    "good": ("def a():\n    return 1\n", "MIT"),
    "other": ("def b():\n    return 2\n", "apache-2.0"),
    "short": ("x", "MIT"),
    "long": ("a = " + "1" * 200 + "\n", "MIT"),
    "mean": ("b = " + "2" * 60 + "\n", "MIT"),
    "signs": ("+-+-+-+-+-+-+-+-\n", "MIT"),
    "gpl": ("def c():\n    return 3\n", "GPL-3.0"),
    "none": ("def d():\n    return 4\n", None),
}
OPTIONS: dict[str, Any] = {
    "min_document_bytes": 2,
    "max_line_length": 100,
    "max_mean_line_length": 50.0,
    "min_alphanumeric": 0.25,
    "keep_licences": ("MIT", "Apache-*"),
}
LEFT_OUT = {
    "documents under --min-document-bytes": 1,
    "documents with a line over --max-line-length": 1,
    "documents over --max-mean-line-length": 1,
    "documents under --min-alphanumeric": 1,
    "documents whose licence --keep-licence does not name": 2,
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def texts_of(directory: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = open_dataset(directory)
    return [tokenizer.decode(dataset.tokens(number)) for number in range(dataset.manifest.documents)]


def records() -> dict[str, dict[str, str]]:
    return {name: {"text": text} | ({"license": licence} if licence else {}) for name, (text, licence) in TEXTS.items()}


def json_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records().values()))
    return path


def webdataset(path: Path) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, record in records().items():
            for suffix, text in (("txt", record["text"]), ("json", json.dumps(record))):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("kind", ["lines", "archive"])
def test_records_of_every_kind_are_chosen_alike(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    source = json_lines(tmp_path / "dump.jsonl") if kind == "lines" else webdataset(tmp_path / "dump.tar")
    options = BuildOptions(licence_key="license", work_unit_bytes=100, **OPTIONS)
    result = build_dataset(source, tokenizer, tmp_path / "out", options)
    assert texts_of(tmp_path / "out", tokenizer) == [TEXTS["good"][0], TEXTS["other"][0]]
    assert result.record.left_out == LEFT_OUT and result.record.duplicates == 0
    assert result.record.licences == {"MIT": 1, "apache-2.0": 1}
    again = build_dataset(source, tokenizer, tmp_path / "again", options, processes=2)
    assert again.manifest.fingerprint == result.manifest.fingerprint


def test_files_are_chosen_by_path_and_text(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    for folder in ("src", "vendor", "docs"):
        (source / folder).mkdir(parents=True)
        for name, (text, _) in TEXTS.items():
            (source / folder / f"{name}.py").write_text(f"{text}# {folder}\n" if name == "good" else text)
    (source / ".gitignore").write_text("docs/\n")
    limits = {name: value for name, value in OPTIONS.items() if name != "keep_licences"}
    options = BuildOptions(
        include=("*.py", "*.rs"), exclude=("vendor/", "other.py"), gitignore=True, **limits, max_document_bytes=1000
    )
    record = build_dataset(source, tokenizer, tmp_path / "out", options).record
    assert texts_of(tmp_path / "out", tokenizer) == [
        f"{TEXTS['good'][0]}# src\n",
        TEXTS["gpl"][0],
        TEXTS["none"][0],
    ]
    assert record.left_out == {
        "files that --exclude names": 1,
        "folders that --exclude names": 1,
        "folders that .gitignore names": 1,
        "hidden files": 1,
    } | {reason: 1 for reason in LEFT_OUT if "licence" not in reason}
    assert "--include '*.rs': nothing matches" in record.notes
    assert "note: --include '*.rs': nothing matches" in capsys.readouterr().err
    idle = BuildOptions(min_document_bytes=1, keep_licences=("MIT",), licence="MIT", exclude=("*.rs",))
    notes = build_dataset(source, tokenizer, tmp_path / "idle", idle).record.notes
    assert "--min-document-bytes, --keep-licence: nothing is left out" in notes


def test_members_of_archives_that_are_left_out_are_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for number, name in enumerate(("a/b.py", "a/c.rs", "a/d.rs", "a/.e", "vendor/f.py", "a/__pycache__/g.py")):
            member = tarfile.TarInfo(name)
            member.size = 9
            archive.addfile(member, io.BytesIO(f"name = {number}\n".encode()))
    options = BuildOptions(include=("*.py",), exclude=("vendor/",))
    record = build_dataset(tmp_path / "x.tar.gz", tokenizer, tmp_path / "out", options).record
    reasons = ("files that --exclude names", "files that --include does not name")
    assert record.documents == 1 and [record.left_out[reason] for reason in reasons] == [1, 2]
    (note,) = [note for note in record.notes if "left out of archives" in note]
    for words in ("files that --include does not name: 2", f"{reasons[0]}: 1", "hidden files: 1", "__pycache__"):
        assert words in note
    assert f"note: {note}" in capsys.readouterr().err


def test_text_of_another_encoding_is_recorded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_bytes("name = 'café'\n".encode("cp1252"))
    (source / "b.py").write_text("name = 'thé'\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.py:1: text: found byte 0xe9 at offset 11; expected UTF-8 text$"):
        build_dataset(source, tokenizer, tmp_path / "out")
    result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(encoding_fallback="cp1252"))
    assert texts_of(tmp_path / "out", tokenizer) == ["name = 'café'\n", "name = 'thé'\n"]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as shard:
        described = [json.load(cast(IO[bytes], shard.extractfile(f"00000000{number}.json"))) for number in range(2)]
    assert [meta.get("encoding") for meta in described] == ["cp1252", None]
    assert result.record.encodings == {"cp1252": 1}
    assert "1 document is not UTF-8 and read as cp1252 (--encoding-fallback)" in result.record.notes
    (source / "picture.py").write_bytes(b"\xff\xd8\x00\x10JFIF")
    with pytest.raises(InputError, match="UTF-8 text, or cp1252 text without zero bytes"):
        build_dataset(source, tokenizer, tmp_path / "no", BuildOptions(encoding_fallback="cp1252"))
    dump = tmp_path / "dump.jsonl"
    dump.write_bytes(json.dumps({"content": "déjà"}, ensure_ascii=False).encode("latin-1") + b"\n")
    options = BuildOptions(encoding_fallback="latin-1", text_key="content")
    assert build_dataset(dump, tokenizer, tmp_path / "lines", options).record.encodings == {"latin-1": 1}
    # As UTF-8, the text is longer than its bytes were.
    options = BuildOptions(encoding_fallback="cp1252", max_document_bytes=14)
    (source / "picture.py").unlink()
    (source / "c.py").write_text("c = 1\n")
    assert build_dataset(source, tokenizer, tmp_path / "short", options).record.left_out == {
        "documents that are too long": 1
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(min_document_bytes=10_000), "--min-document-bytes left out everything .*: 8"),
        (
            BuildOptions(licence_key="license", keep_licences=("EUPL-*",), max_line_length=10),
            "--max-line-length and --keep-licence left out everything|--keep-licence left out everything .*: 8",
        ),
        (BuildOptions(keep_licences=("MIT",)), "--keep-licence: MIT: found documents of which no licence is known"),
        (BuildOptions(drop_licences=("MIT",)), "--drop-licence: MIT: found .* expected --licence-key, or --licence"),
        (
            BuildOptions(licence_key="licence", drop_licences=("GPL-*",)),
            "--licence-key: licence: found no document with this key; the first record has the keys license, text; "
            "expected the key that names documents' licences, for --drop-licence. Did you mean 'license'",
        ),
        (
            BuildOptions(licence_key="x", keep_licences=("MIT",), licence="MIT", drop_licences=("GPL-*",)),
            "--licence-key: x: found no document with this key; .* for --keep-licence and --drop-licence$",
        ),
        (BuildOptions(include=("*.py",)), r"--include: \*\.py: found no directory among the inputs"),
        (BuildOptions(exclude=("*.py",)), r"--exclude: \*\.py: found no directory among the inputs"),
        (BuildOptions(gitignore=True), "--gitignore: yes: found no directory among the inputs"),
    ],
)
def test_nothing_left_and_options_without_effect(
    tmp_path: Path, tokenizer: Tokenizer, options: BuildOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_dataset(json_lines(tmp_path / "dump.jsonl"), tokenizer, tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.jsonl"]


def test_no_file_that_stays_names_the_options(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.py").write_text("a")
    with pytest.raises(InputError, match=r"--include left out everything \(left out: files that --include does not"):
        build_dataset(tmp_path / "source", tokenizer, tmp_path / "out", BuildOptions(include=("*.rs",)))


def test_a_wrong_text_key_is_one_line_with_the_keys_that_are_there(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "dump.jsonl"
    dump.write_text('{"content": "a", "path": "b"}\n' * 2000)
    with pytest.raises(InputError) as caught:
        build_dataset(dump, tokenizer, tmp_path / "out", BuildOptions(text_key="contents"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{dump}:1: contents: found the keys content, path; expected a JSON object with a string")
    assert line.endswith(f"Did you mean 'content'? (1000 times; also at {dump}:2, {dump}:3, ...)")
    assert "note: reading ends at 1000 problems; there may be more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", ""], "argument --include: found a pattern that can match nothing; expected"),
        (["--exclude", "!a"], "argument --exclude: found a negation"),
        (["--min-document-bytes", "0"], "argument --min-document-bytes: found '0'; expected a whole number from 1"),
        (["--min-document-bytes", "9", "--max-document-bytes", "8"], "--min-document-bytes: found 9; expected at most"),
        (["--max-line-length", "-1"], "argument --max-line-length: found '-1'"),
        (["--max-mean-line-length", "nan"], "argument --max-mean-line-length: found 'nan'; expected a number above 0"),
        (["--min-alphanumeric", "1.5"], "argument --min-alphanumeric: found '1.5'; expected a number above 0 to 1"),
        (["--encoding-fallback", "rot13"], "argument --encoding-fallback: invalid choice: 'rot13' (choose from"),
        (["--keep-licence", ""], "argument --keep-licence: found 0 characters; expected a name"),
    ],
)
def test_wrong_values_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "build_shards.py"))
    monkeypatch.setattr(
        sys, "argv", ["build_shards.py", "--input", "a", "--tokenizer", "b", "--output", "c", *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        tool["parse_arguments"]()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
