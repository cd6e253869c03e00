"""Nothing is left out, followed or preferred by a build without being counted, said in one line and recorded."""

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ebft_mega.data.builder import dataset_build
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import BuildRecord, read_build_record
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.on_demand import tokenized_dataset
from ebft_mega.data.builder.work_plan import make_plan
from ebft_mega.data.selection.format_options import UsedPlugin
from ebft_mega.data.selection.held_out_split import SplitOptions
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.listing import list_files
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError

LINE = '{"content": "def a():\\n    return 1\\n", "path": "src/a.py"}\n'


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def texts_of(directory: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = open_dataset(directory)
    return [tokenizer.decode(dataset.tokens(number)) for number in range(dataset.manifest.documents)]


def test_links_special_files_and_hidden_ones_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    for folder in (source / "folder", source / ".git", source / "__pycache__", outside):
        folder.mkdir(parents=True)
    (source / "folder" / "a.py").write_text("a = 1\n")
    (outside / "b.py").write_text("b = 2\n")
    (source / ".hidden.py").write_text("# hidden\n")
    for name in (".hidden", ".git/config", "__pycache__/a.pyc", "notes.md"):
        (source / name).write_text("not read")
    for name, target in {
        "inside.py": "folder/a.py",
        "once.py": ".hidden.py",
        "twice.py": ".hidden.py",
        "outside.py": "../outside/b.py",
        "folders": "folder",
        "up": "..",
        "gone.py": "nothing",
        "itself.py": "itself.py",
        "circle.py": "round.py",
        "round.py": "circle.py",
        "through.py": "notes.md/x",
        "device.py": "/dev/zero",
    }.items():
        (source / name).symlink_to(target)
    os.mkfifo(source / "pipe.py")  # opening it would wait for a writer
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "s.py"))
        result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(pattern="*.py"))
    assert texts_of(tmp_path / "out", tokenizer) == ["a = 1\n", "# hidden\n"]
    assert result.record.duplicates == 0
    assert result.record.left_out == {
        "hidden files": 2,
        "hidden folders": 1,
        "__pycache__ folders": 1,
        "links to folders": 2,
        "links that lead nowhere": 5,
        "pipes, sockets and devices": 3,
        "files with other names": 1,
        "links that leave the input": 1,
        "links to files that are read anyway": 2,
    }
    assert result.record.followed == {"links to files": 1}
    said = capsys.readouterr().err
    assert "note: source: left out: __pycache__ folders: 1, files with other names: 1, hidden files: 2" in said
    assert "note: source: followed: links to files: 1" in said
    assert "note: source: links that leave the input are not followed: copy what they lead to" in said
    assert [f"note: {note}" in said for note in result.record.notes] == [True, True, True]
    assert read_build_record(tmp_path / "out") == result.record


def test_what_links_of_one_input_lead_to_is_read_as_another_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    for folder in (source, outside):
        folder.mkdir()
    (source / "a.py").write_text("a = 1\n")
    (outside / "b.py").write_text("b = 2\n")
    (source / "b.py").symlink_to("../outside/b.py")
    (source / "folder").symlink_to("../outside")
    build_dataset(source, tokenizer, tmp_path / "one")
    assert texts_of(tmp_path / "one", tokenizer) == ["a = 1\n"]
    build_dataset([source, outside], tokenizer, tmp_path / "two")
    assert texts_of(tmp_path / "two", tokenizer) == ["a = 1\n", "b = 2\n"]
    (source / "a.py").unlink()
    with pytest.raises(InputError, match=r"left out: links that leave the input: 1, links to folders: 1"):
        build_dataset(source, tokenizer, tmp_path / "none")


def test_an_input_may_be_a_link_and_a_snapshot_of_the_hub(tmp_path: Path, tokenizer: Tokenizer) -> None:
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "0123"
    blob = snapshot.parents[1] / "blobs" / ("0" * 64)
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("a = 1\n")
    (snapshot / "a.py").symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / "way").symlink_to(snapshot)
    result = build_dataset(tmp_path / "way", tokenizer, tmp_path / "out")
    assert texts_of(tmp_path / "out", tokenizer) == ["a = 1\n"]
    assert (result.record.followed, result.record.left_out) == ({"links to files": 1}, {})


def test_no_document_is_read_twice_where_equal_ones_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "b.py").write_text("a = 1\n")
    for name in ("a.py", "c.py"):
        (source / name).symlink_to("b.py")
    build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(deduplicate=False))
    assert texts_of(tmp_path / "out", tokenizer) == ["a = 1\n"]


def test_a_corpus_manifest_elsewhere_says_no_licence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source" / "train"
    source.mkdir(parents=True)
    (source / "a.py").write_text("a = 1\n")
    (tmp_path / "secret.json").write_text('{"licence": "a secret"}')
    (source.parent / "corpus.json").symlink_to("../secret.json")
    with pytest.raises(InputError, match=r"corpus\.json: found a link to .*secret\.json, which is outside"):
        build_dataset(source, tokenizer, tmp_path / "out")


def test_an_input_that_is_a_pipe_is_refused_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="neither a file nor a directory"):
        build_dataset(tmp_path / "pipe.jsonl", tokenizer, tmp_path / "out")


def test_pipes_in_the_place_of_small_files_are_refused_at_once(tmp_path: Path, hugging_face_directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = tmp_path / name
        directory.mkdir()
        for other in ("tokenizer.json", "tokenizer_config.json"):
            (directory / other).write_bytes((hugging_face_directory / other).read_bytes())
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(InputError):
            load_tokenizer(directory)
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(InputError, match=r"dataset\.json: found a FIFO"):
        open_dataset(tmp_path)
    os.mkfifo(tmp_path / "build.json")
    assert read_build_record(tmp_path) is None


def test_an_earlier_output_inside_the_input_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    for overwrite in (False, True):
        record = build_dataset(tmp_path, tokenizer, tmp_path / "sub" / "out", overwrite=overwrite).record
        assert (record.documents, record.left_out) == (1, {"earlier output": 1} if overwrite else {})


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Refuse access to some names, which the system does not do for root."""

    def refuse(*names: str) -> None:
        def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
            def checked(path: Any, *arguments: Any, **options: Any) -> Any:
                if not isinstance(path, int) and os.path.basename(os.fspath(path)) in names:
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return call(path, *arguments, **options)

            return checked

        monkeypatch.setattr(os, "scandir", guarded(os.scandir))
        monkeypatch.setattr(os, "open", guarded(os.open))
        monkeypatch.setattr(Path, "open", guarded(Path.open))
        monkeypatch.setattr(Path, "read_bytes", guarded(Path.read_bytes))

    return refuse


def test_what_cannot_be_read_is_refused_or_skipped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, refused: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    for name in ("a.py", "b.py", "secret/c.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"# {name}\n")
    refused("secret", "b.py")
    with pytest.raises(InputError, match="secret: --input: found Permission denied"):
        build_dataset(source, tokenizer, tmp_path / "out")
    result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True))
    assert texts_of(tmp_path / "out", tokenizer) == ["# a.py\n"]
    assert result.record.skipped_by_reason == {"unreadable or damaged files": 2}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in skipped] == ["secret", "b.py"]
    assert str(tmp_path) not in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert "cannot be accessed and are skipped: 1" in capsys.readouterr().err


def test_unreadable_json_lines_are_skipped_too(
    tmp_path: Path, tokenizer: Tokenizer, refused: Callable[..., None]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.json", "b.json", "c.jsonl"):
        (source / name).write_text(LINE.replace("a()", f"{name[0]}()") * 9)
    refused("b.json", "c.jsonl")
    with pytest.raises(InputError, match=r"b\.json"):
        build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(text_key="content"))
    options = BuildOptions(text_key="content", skip_bad=True, work_unit_bytes=200)
    record = build_dataset(source, tokenizer, tmp_path / "out", options).record
    assert record.documents == 1
    assert set(record.skipped_by_reason) == {"unreadable or damaged files"}


@pytest.mark.parametrize("name", ["d.jsonl", "train.json", "data.txt", "no_suffix"])
def test_json_lines_are_told_by_what_they_hold_where_a_key_is_given(
    tmp_path: Path, tokenizer: Tokenizer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_text("\n" + LINE)
    (source / "README.md").write_text("# about, longer than what it is about: " + "x" * 500)
    (source / "package.json").write_text('{"name": "stray"}')
    result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(text_key="content"))
    assert texts_of(tmp_path / "out", tokenizer) == ["def a():\n    return 1\n"]
    assert result.record.left_out == {"files of other kinds": 2, "blank lines": 1}
    assert "source: left out: files of other kinds: 2 (README.md, package.json)" in capsys.readouterr().err
    # The same as a single file.
    build_dataset(source / name, tokenizer, tmp_path / "file", BuildOptions(text_key="content"))
    assert texts_of(tmp_path / "file", tokenizer) == ["def a():\n    return 1\n"]


def test_json_lines_of_any_name_are_read_in_ranges(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [LINE.replace("a()", f"a{number}()") for number in range(40)]
    (tmp_path / "train.json").write_text("".join(lines))
    options = BuildOptions(text_key="content", work_unit_bytes=300)
    assert len(make_plan([tmp_path / "train.json"], options, "identity").work_units) > 5
    build_dataset(tmp_path / "train.json", tokenizer, tmp_path / "out", options)
    assert texts_of(tmp_path / "out", tokenizer) == [json.loads(line)["content"] for line in lines]


def write(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(LINE if "json" in name else f"# {name}\n")
    return directory


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["a.py"], {"text_key": "content"}, "--text-key: content: found no JSON lines in any --input"),
        (["a.json"], {"text_key": "contnt"}, "--text-key: contnt: found JSON lines with the keys content, path"),
        (["a.jsonl"], {"text_key": "content", "text_member": "txt"}, "--text-member: txt: found no .tar file"),
        (["a.py"], {"licence_key": "license"}, "--licence-key: license: found inputs of which each file is a text"),
        (["a.py"], {"keep_keys": ["repo"]}, "--keep-key: repo: found inputs of which each file is a text"),
        (["a.jsonl"], {"text_key": "content", "keep_keys": ["path", "path"]}, "--keep-key: path: found 2 times"),
        (["a.py"], {"pattern": "*.rs"}, "no file that matches '*.rs' (left out: files with other names: 1)"),
    ],
)
def test_options_that_can_have_no_effect_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, names: list[str], options: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "source", *names)
    with pytest.raises(InputError) as caught:
        build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(**options))
    assert caught.value.exit_code == 2
    assert words in str(caught.value)


def test_a_pattern_needs_a_folder_and_a_json_file_a_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "source", "a.jsonl", "b.json")
    options = BuildOptions(text_key="content", pattern="*.jsonl")
    with pytest.raises(InputError, match="--pattern.*no directory among the inputs"):
        build_dataset(source / "a.jsonl", tokenizer, tmp_path / "out", options)
    with pytest.raises(InputError, match="JSON lines with the keys content, path; expected --text-key"):
        build_dataset(source / "b.json", tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="expected the key 'other'"):
        build_dataset(source / "b.json", tokenizer, tmp_path / "out", BuildOptions(text_key="other"))


def test_inputs_that_are_given_twice_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "source", "a/b.py", "c.py")
    (tmp_path / "link").symlink_to(source)
    for other, words in ((source, "the same as"), (tmp_path / "link", "the same as"), (source / "a", "a part of")):
        with pytest.raises(InputError, match=words):
            build_dataset([source, other], tokenizer, tmp_path / "out")


def test_a_key_meant_for_one_input_does_not_empty_another(tmp_path: Path, tokenizer: Tokenizer) -> None:
    code = write(tmp_path / "code", "a.py", "b.py", "stray.jsonl")
    dump = write(tmp_path / "dump", "a.jsonl")
    with pytest.raises(InputError, match="1 files of JSON lines or archives among 2 others"):
        build_dataset([code, dump], tokenizer, tmp_path / "out", BuildOptions(text_key="content"))
    (code / "stray.jsonl").unlink()
    record = build_dataset([code, dump], tokenizer, tmp_path / "out", BuildOptions(text_key="content")).record
    assert record.documents == 3


def test_a_key_that_no_document_has_is_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", "a.jsonl")
    options = BuildOptions(text_key="content", licence_key="license", keep_keys=["path", "repo"])
    record = build_dataset(source, tokenizer, tmp_path / "out", options).record
    said = ["no document has the key 'license'", "no document has the key 'repo'"]
    assert list(record.notes) == said
    assert all(f"note: {line}\n" in capsys.readouterr().err for line in said[:1])


def normalizing(directory: Path) -> Path:
    """Characters, lower-cased; a tokenizer whose texts often do not come back."""
    backend = Backend(models.BPE({character: number for number, character in enumerate("abcdef \n()=1:rtun")}, []))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("x", "contiguous")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<e>"])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    return directory


def test_documents_that_do_not_come_back_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in {"a.py": "return 1\n", "b.py": "Return 1\n", "c.py": "return\n", "d.py": "RETURN \u6f22"}.items():
        (source / name).write_text(text)
    normalising = load_tokenizer(normalizing(tmp_path / "tokenizer"))
    record = build_dataset(source, normalising, tmp_path / "out", BuildOptions(work_unit_bytes=10)).record
    assert record.not_round_trip == 2
    assert "note: 2 documents do not come back exactly" in capsys.readouterr().err
    assert record.notes[-1].endswith("(the first: b.py)")
    assert build_dataset(source, tokenizer, tmp_path / "exact").record.not_round_trip == 0


def test_a_tokenizer_model_of_another_kind_beside_a_good_tokenizer_json(
    tmp_path: Path, tokenizer_directory: Path, hugging_face_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, source = tmp_path / "both", write(tmp_path / "source", "a.py")
    both.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (both / name).write_bytes((hugging_face_directory / name).read_bytes())
    (both / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    record = build_dataset(source, load_tokenizer(both), tmp_path / "out").record
    line = "tokenizer.model is not used: it is a table of tokens and ranks (tiktoken); tokenizer.json is used"
    assert record.notes == (line,)
    assert f"note: {line}\n" in capsys.readouterr().err
    assert record.tokenizer["file"] == "tokenizer.json"
    assert record.tokenizer["sha256"] == load_tokenizer(hugging_face_directory).sha256
    assert open_dataset(tmp_path / "out").manifest.vocab_size == load_tokenizer(hugging_face_directory).vocab_size
    # Two good ones: the preference is said, too; alone, the message names the remedy.
    (both / "tokenizer.model").write_bytes((tokenizer_directory / "tokenizer.model").read_bytes())
    notes = load_tokenizer(both).notes
    assert notes[0] == "tokenizer.json is not used: tokenizer.model beside it is preferred"
    assert notes[1].startswith("eos_token '<|endoftext|>' of tokenizer_config.json is not used")
    (both / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    (both / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tiktoken.*tokenizer\.json beside it"):
        load_tokenizer(both)


CHANGED = {
    "pattern": "*.py",
    "text_key": "other",
    "text_member": "md",
    "licence": "MIT",
    "licence_key": "l",
    "keep_keys": ("k",),
    "near_deduplicate": 0.8,
    "archives": "source",
    "deduplicate": False,
    "skip_bad": True,
    "max_document_bytes": 7,
    "include": ("*.py",),
    "exclude": ("*.md",),
    "gitignore": True,
    "min_document_bytes": 1,
    "max_line_length": 5,
    "max_mean_line_length": 5.5,
    "min_alphanumeric": 0.1,
    "encoding_fallback": "latin-1",
    "keep_licences": ("MIT",),
    "drop_licences": ("GPL-*",),
    "shard_bytes": 5,
    "work_unit_bytes": 50,
    "split": SplitOptions("1%"),
    "format": "json_lines",
    "format_options": {"of_a_plugin": {"key": 1}},
    "plugins": (UsedPlugin("mine.py", "/mine.py", "0" * 64),),
}


def test_every_option_is_part_of_a_builds_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CHANGED) == {field.name for field in fields(BuildOptions)}
    monkeypatch.setattr("ebft_mega.data.builder.work_plan.option_problems", lambda *_: ())
    source = write(tmp_path / "source", "a.py")
    identities = {make_plan([source], BuildOptions(), "tokenizer").identity}
    assert make_plan([source], BuildOptions(), "tokenizer", tmp_path / "out").identity in identities
    for name, value in CHANGED.items():
        identities.add(make_plan([source], replace(BuildOptions(), **{name: value}), "tokenizer").identity)
    identities.add(make_plan([source], BuildOptions(), "another").identity)
    monkeypatch.setattr("ebft_mega.data.builder.work_plan.BUILD_VERSION", -1)
    identities.add(make_plan([source], BuildOptions(), "tokenizer").identity)
    assert len(identities) == len(CHANGED) + 3
    (source / ".hidden").write_text("left out")
    assert make_plan([source], BuildOptions(), "tokenizer").identity in identities


def test_what_is_made_on_demand_is_named_by_everything_that_decides_it(
    tmp_path: Path, hugging_face_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from webdataset import TarWriter

    place, directory = tmp_path / "shards", tmp_path / "tokenizer"
    place.mkdir()
    directory.mkdir()
    with (place / "a.tar").open("wb") as file, TarWriter(file, mtime=0) as tar:
        tar.write({"__key__": "a", "txt": "def a(): pass\n"})
    definition = json.loads((hugging_face_directory / "tokenizer.json").read_text())

    def name(config: dict[str, object] | None = None, **changes: object) -> str:
        (directory / "tokenizer.json").write_text(json.dumps(definition | changes))
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | (config or {})))
        return tokenized_dataset(place, directory, tmp_path / "cache", 1).name

    first = name()
    names = [
        first,
        name({"eos_token": "<|fim_prefix|>"}),  # the same `tokenizer.json`
        name({"additional_special_tokens": ["def"]}),
        name(normalizer={"type": "Lowercase"}),
    ]
    (place / "corpus.json").write_text('{"licence": "MIT"}')
    names.append(name())
    (place / "corpus.json").unlink()
    monkeypatch.setattr("ebft_mega.data.builder.on_demand.BUILD_VERSION", -1)
    names.append(name())
    monkeypatch.undo()
    monkeypatch.setattr("ebft_mega.data.tokenizers.tokenizer_kinds.version", lambda _: "0.0")
    names.append(name())
    monkeypatch.undo()
    assert len(set(names)) == len(names)
    ends = {open_dataset(tmp_path / "cache" / each).manifest.eos_id for each in names[:2]}
    assert len(ends) == 2
    # What decides nothing: templates, other files of the tokenizer, files beside the shards.
    (place / "README.md").write_text("about")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert name({"chat_template": "{{ messages }}"}) == first


def test_a_build_of_another_tokenizer_configuration_is_not_resumed(
    tmp_path: Path, hugging_face_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, directory = write(tmp_path / "source", "a.py"), tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes((hugging_face_directory / "tokenizer.json").read_bytes())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for token, stopped in (("<|endoftext|>", True), ("<|fim_prefix|>", False)):
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        if stopped:
            monkeypatch.setattr(dataset_build, "join_units", stop)
            with pytest.raises(KeyboardInterrupt):
                build_dataset(source, load_tokenizer(directory), tmp_path / "out")
            monkeypatch.undo()
        else:
            build_dataset(source, load_tokenizer(directory), tmp_path / "out")
    assert "inputs or options are not those of" in capsys.readouterr().err


def test_records_of_earlier_builds_are_read(tmp_path: Path) -> None:
    old = {"input_files": {"a": 1}, "documents": 1, "empty": 0, "duplicates": 0, "skipped": 0, "text_bytes": 5}
    old |= {"licences": {"MIT": 1}, "sources": {"a": 1}}
    (tmp_path / "build.json").write_text(json.dumps(old | {"of a later version": 1}))
    assert read_build_record(tmp_path) == BuildRecord(**old)


def test_names_that_are_not_utf8(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    assert len(list_files(source).files) == 1
    assert build_dataset(source, tokenizer, tmp_path / "out").record.documents == 1
