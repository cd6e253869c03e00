"""A format of one's own: read by the registry alone, the same bytes for any processes; faults with their places."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import read_build_record
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.work_plan import make_plan
from ebft_mega.data.selection.format_options import plugins_of, use_again
from ebft_mega.data.selection.text_formats import FormatChoice
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.errors import EXIT_BAD_INPUT, InputError, InputProblems
from ebft_mega.registry.plugins import use_plugins

ROOT = Path(__file__).resolve().parents[4]
EXAMPLE = ROOT / "examples" / "paragraphs.py"
HEAD = """from ebft_mega.data.text.text_files import TextDocument
from ebft_mega.extension.text_format import FilePart, Layout, TextFormat


class Mine(TextFormat):
    \"\"\"A format of a test.\"\"\"

    name = "mine"
    suffixes = (".mine",)

"""
LINE = HEAD.count("\n") - 5  # of the class


@pytest.fixture(autouse=True)
def no_plugins_are_left():
    yield
    use_plugins([], ROOT, {})


LINES = ("def add(first, second):", "    return first + second", "class Counter:", "for name in sorted(names):")
MORE = ("import collections, itertools", "value = {'key': [1, 2, 34]}", "    print(f'{name}: {len(name)}')", "x = 0")
TEXTS = [f"{(*LINES, *MORE)[number % 8]}  # {number}\n" * (1 + number % 5) for number in range(300)]


@pytest.fixture
def paragraphs(tmp_path: Path) -> Path:
    (tmp_path / "a.paragraphs").write_text("\n".join(TEXTS))
    return tmp_path / "a.paragraphs"


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, paragraphs: Path, hugging_face_directory: Path
) -> None:
    tokenizer = load_tokenizer(hugging_face_directory)
    plugins = plugins_of([str(EXAMPLE)], {})
    given = {"paragraphs": {"min_characters": 15}}
    options = BuildOptions(work_unit_bytes=2_000, plugins=plugins, format_options=given)
    assert len(make_plan([paragraphs], options, "tokenizer").work_units) > 5
    for processes in (1, 2):
        result = build_dataset(paragraphs, tokenizer, tmp_path / f"out-{processes}", options, processes=processes)
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-2")
    record = read_build_record(tmp_path / "out-2")
    short = sum(len(text) < 15 for text in TEXTS)
    assert record is not None and short and result.manifest.documents == len(TEXTS) - short
    assert record.left_out == {"paragraphs that are too short": short}
    expected = {"name": "paragraphs.py", "sha256": plugins[0].sha256}
    assert record.formats == {"plugins": [expected], "format_options": given}
    shards = b"".join(path.read_bytes() for path in sorted((tmp_path / "out-1").glob("*.tar")))
    assert shards.count(b'"path":"a.paragraphs:') == result.manifest.documents


def test_without_plugins_the_record_knows_nothing_of_them(tmp_path: Path, hugging_face_directory: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    build_dataset(tmp_path / "a.jsonl", load_tokenizer(hugging_face_directory), tmp_path / "out")
    assert "formats" not in json.loads((tmp_path / "out" / "build.json").read_text())


def test_other_code_of_a_plugin_is_another_build(tmp_path: Path, paragraphs: Path) -> None:
    plugin = tmp_path / "mine.py"
    identities = set()
    for text in ("", "# other\n"):
        plugin.write_text(EXAMPLE.read_text() + text)
        used = plugins_of([str(plugin)], {})
        identities.add(make_plan([paragraphs], BuildOptions(plugins=used), "tokenizer").identity)
    assert len(identities) == 2
    use_again(used)
    plugin.write_text(EXAMPLE.read_text())
    with pytest.raises(InputError, match=r"mine\.py: found other code than a moment ago"):
        use_again(used)


@pytest.mark.parametrize("option", ["--input", "--tokenizer", "--output"])
def test_nothing_is_imported_from_what_is_read_or_written(tmp_path: Path, option: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputProblems, match=f"{option} of this command"):
        plugins_of([str(tmp_path / "inner" / "mine.py")], {option: [tmp_path]})
    assert not (tmp_path / "ran").exists()


def fault(tmp_path: Path, body: str, head: str = HEAD, **options: object) -> str:
    """What a build says of a plugin, with the file's name shortened."""
    plugin, source = tmp_path / "mine.py", tmp_path / "a.mine"
    plugin.write_text(head + body)
    source.write_text("one\ntwo\n")
    chosen = BuildOptions(plugins=plugins_of([str(plugin)], {}), **options)
    with pytest.raises(InputProblems) as caught:
        build_dataset(source, load_tokenizer(tmp_path.parent / "tokenizer"), tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()
    return str(caught.value).replace(str(tmp_path), "")


READS = "    def read(self, part):\n"
FAULTS = {
    "an error": (
        READS + "        yield 1 / 0\n",
        "/mine.py:+6: text format: found ZeroDivisionError (division by zero)",
    ),
    "no documents": (
        READS + "        yield 'one'\n",
        "/mine.py:0: text format: found 'one' from /a.mine; expected a TextD",
    ),
    "leaving the process": (READS + "        raise SystemExit\n        yield\n", "text format: found SystemExit"),
    "no generator": (READS + "        return None\n", "/mine.py:0: text format: found TypeError"),
    "another hash": (
        READS + "        yield TextDocument('one', b'', 'a')\n",
        "/mine.py:0: text format: found the document 'a' with another sha256 than its text's",
    ),
    "half a pair": (
        READS + "        yield TextDocument('\\ud800', b'', 'a')\n",
        "/mine.py:0: text format: found the document 'a' with half of a surrogate pair",
    ),
    "fields of no JSON": (
        READS + "        yield TextDocument('one', b'', 'a', fields={'a': {1}})\n",
        "/mine.py:0: text format: found the document 'a' with values of another kind",
    ),
    "a layout that is none": (
        READS + "        yield from ()\n\n    def layout(self, file, options):\n        return Layout(('many',))\n",
        "/mine.py:0: text format: found ValueError",
    ),
    "an empty suffix": (
        "    suffixes = ('',)\n\n" + READS + "        yield 1\n",
        "/mine.py:0: text format: found the suff",
    ),
    "nothing to tell it by": (
        "    suffixes = ()\n\n" + READS + "        yield 1\n",
        "/mine.py:0: text format: found a text format 'mine' that recognises nothing; expected suffixes or kinds, or "
        "--format mine",
    ),
    "damage of the file": (
        READS + "        raise OSError('half of it')\n        yield\n",
        "/a.mine: file: found half of it; expected a file that the format 'mine' reads",
    ),
    "damage of a text": (
        READS + "        yield b'\\xff'.decode()\n",
        "/a.mine: file: found byte 0, which is not UTF-8",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_a_format_is_named_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, hugging_face_directory: Path, case: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("fault") / "here"
    tmp_path.mkdir()
    (tmp_path.parent / "tokenizer").symlink_to(hugging_face_directory)
    body, expected = FAULTS[case]
    expected = expected.replace(":+6:", f":{HEAD.count(chr(10)) + 2}:").replace(":0:", f":{LINE}:")
    assert expected in fault(tmp_path, body)


def test_damage_that_a_format_finds_is_left_out_on_request_and_its_own_faults_are_not(
    tmp_path_factory: pytest.TempPathFactory, hugging_face_directory: Path
) -> None:
    tmp_path = tmp_path_factory.mktemp("fault") / "here"
    tmp_path.mkdir()
    (tmp_path.parent / "tokenizer").symlink_to(hugging_face_directory)
    assert "no document with text" in fault(tmp_path, READS + "        raise OSError\n        yield\n", skip_bad=True)
    assert "ZeroDivisionError" in fault(tmp_path, READS + "        yield 1 / 0\n", skip_bad=True)


def test_the_tools_read_a_format_of_ones_own(
    tmp_path: Path, paragraphs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    paragraphs.rename(tmp_path / "texts" / "a.paragraphs")
    (tmp_path / "texts" / "other.bin").write_bytes(b"\xff")
    common = ["--plugin", str(EXAMPLE), "--input", str(tmp_path / "texts")]

    def run(tool: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [tool, *common, *arguments])
        runpy.run_path(str(ROOT / "tools" / tool))["main"]()

    run("train_tokenizer.py", "--format", "paragraphs", "--vocab-size", "310", "--output", str(tmp_path / "tokenizer"))
    shared = ["--tokenizer", str(tmp_path / "tokenizer"), "--processes", "1"]
    run("build_shards.py", *shared, "--format", "paragraphs", "--output", str(tmp_path / "out"))
    assert open_dataset(tmp_path / "out").manifest.documents == len(TEXTS)
    said = capsys.readouterr()
    assert "left out: files of other kinds: 1" in said.err and "every file round-trips" in said.out
    with pytest.raises(InputError, match="Did you mean 'paragraphs'"):
        run("build_shards.py", *shared, "--format", "paragraph", "--output", str(tmp_path / "other"))
    assert InputError.exit_code == EXIT_BAD_INPUT


def test_a_tokenizer_is_trained_on_what_is_built_with_it(tmp_path: Path) -> None:
    """The texts of JSON lines and the same texts as files give the same tokenizer."""
    texts = [f"def f_{number}():\n    return {number}\n" * 5 for number in range(20)]
    for folder in ("files", "lines"):
        (tmp_path / folder).mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number:02}.py").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "lines" / "a.jsonl").write_text(lines)
    first = train_tokenizer(tmp_path / "files", 300, tmp_path / "one")
    second = train_tokenizer(tmp_path / "lines", 300, tmp_path / "two", formats=FormatChoice("json_lines"))
    assert first.sha256 == second.sha256
