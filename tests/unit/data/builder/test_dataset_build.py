import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.shard_writer import MAX_SHARD_DOCUMENTS, DatasetWriter
from ebft_mega.data.store.inspection import read_metadata
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.listing import list_files
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.output_directory import new_directory

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def texts_of(directory: Path, tokenizer: Tokenizer) -> list[str]:
    dataset = open_dataset(directory)
    return [tokenizer.decode(dataset.tokens(i)) for i in range(dataset.manifest.documents)]


def write_jsonl(path: Path, lines: list[str]) -> Path:
    content = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_directory_order_ignores_hidden_and_compiled_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    names = [
        "b.py",
        "a/z.py",
        "a.py",
        "a/b/c.py",
        ".git/config",
        "__pycache__/x.pyc",
        ".hidden",
        "notes.md",
        "empty.py",
    ]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("" if name == "empty.py" else f"# {name}\r\n", newline="")
    (source / "loop").symlink_to(source, target_is_directory=True)
    result = build_dataset(source, tokenizer, tmp_path / "all")
    assert texts_of(tmp_path / "all", tokenizer) == [
        f"# {n}\r\n" for n in ("a.py", "a/b/c.py", "a/z.py", "b.py", "notes.md")
    ]
    assert result.record.empty == 1
    build_dataset(source, tokenizer, tmp_path / "python", BuildOptions(pattern="*.py"))
    assert len(texts_of(tmp_path / "python", tokenizer)) == 4


@pytest.mark.parametrize("name", ["code.jsonl", "code.jsonl.gz"])
def test_json_lines(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    texts = ["first\n\ttext\n", "second \u6f22", "{}"]
    lines = [json.dumps({"content": text, "other": 1}) for text in texts]
    source = write_jsonl(tmp_path / name, [lines[0], "", *lines[1:], '{"content": ""}'])
    result = build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(text_key="content", licence="MIT"))
    assert texts_of(tmp_path / "out", tokenizer) == texts
    assert result.record.empty == 1
    shard = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    for part in (f'"path":"{name}:3"', '"licence":"MIT"', hashlib.sha256(texts[1].encode()).hexdigest()):
        assert part.encode() in shard


def test_a_directory_of_json_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "b.jsonl.gz", ['{"text": "three"}'])
    write_jsonl(source / "a.jsonl", ['{"text": "one"}', '{"text": "two"}'])
    build_dataset(source, tokenizer, tmp_path / "out")
    assert texts_of(tmp_path / "out", tokenizer) == ["one", "two", "three"]


def test_every_bad_line_is_reported_and_nothing_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        '{"text": "good"}',
        '{"text": 3}',
        "[1]",
        "{",
        '{"txt": "x"}',
        '{"text": "\\ud800"}',
        '{"text": "good"}',
    ]
    source = write_jsonl(tmp_path / "code.jsonl", lines)
    with pytest.raises(InputError) as caught:
        build_dataset(source, tokenizer, tmp_path / "out")
    assert [problem.where.rsplit(":", 1)[1] for problem in caught.value.problems] == ["2", "3", "4", "5", "6"]
    assert [path.name for path in tmp_path.iterdir()] == ["code.jsonl"]


def test_a_cut_gzip_file_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "code.jsonl.gz", ['{"text": "%s"}' % ("x" * 5000), '{"text": "y"}'] * 20)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"code\.jsonl\.gz:\d+: file"):
        build_dataset(source, tokenizer, tmp_path / "out")


def test_text_that_is_not_utf8_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_bytes(b"line\nline \xff")
    (source / "b.py").write_bytes(b"\x80")
    with pytest.raises(InputError) as caught:
        build_dataset(source, tokenizer, tmp_path / "out")
    assert [problem.where for problem in caught.value.problems] == [
        f"{source / 'a.py'}:2",
        f"{source / 'b.py'}:1",
    ]
    assert "0xff at offset 10" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_shards_of_many_documents_are_closed_early(tmp_path: Path, tokenizer: Tokenizer) -> None:
    writer = DatasetWriter(tmp_path, tokenizer, 1 << 30, max_documents=4)
    for _ in range(10):
        writer.add([5], {})
    assert [shard.documents for shard in writer.finish().shards] == [4, 4, 2]
    assert MAX_SHARD_DOCUMENTS == 65_536
    assert open_dataset(tmp_path).manifest.documents == 10


def test_options_of_the_tool(tmp_path: Path, tokenizer_directory: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", ['{"code": "x", "l": "MIT"}', f'{{"code": "{name}", "repo": "r"}}'])
    arguments = ["--input", tmp_path / "b.jsonl", tmp_path / "a.jsonl", "--tokenizer", tokenizer_directory]
    arguments += ["--text-key", "code", "--licence-key", "l", "--keep-key", "repo"]
    done = run_tool("build_shards", *arguments, "--output", tmp_path / "out", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout
    assert "1 duplicates" in done.stdout
    dataset, tokenizer = open_dataset(tmp_path / "out"), load_tokenizer(tokenizer_directory)
    assert [tokenizer.decode(dataset.tokens(number)) for number in range(3)] == ["x", "b", "a"]
    assert [read_metadata(dataset, number)["licence"] for number in range(3)] == ["MIT", "unknown", "unknown"]
    assert read_metadata(dataset, 2)["fields"] == {"repo": "r"}
    done = run_tool("build_shards", *arguments, "--output", tmp_path / "all", "--no-dedup", "--processes", 1)
    assert "4 documents" in done.stdout
    done = run_tool("build_shards", *arguments, "--output", tmp_path / "no", "--processes", 0)
    assert done.returncode == 2
    assert "--processes: found 0; expected at least 1" in done.stderr
    done = run_tool("build_shards", *arguments, "--output", tmp_path / "no", "--dedup", "--no-deduplicate")
    assert done.returncode == 2
    assert "--deduplicate: found 2 times; expected at most once" in done.stderr


def test_inputs_without_text_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    for source in (tmp_path / "absent", tmp_path / "empty", tmp_path / "notes.md"):  # the last holds no JSON lines
        with pytest.raises(InputError, match="--input"):
            build_dataset(source, tokenizer, tmp_path / "out")
    (tmp_path / "empty" / "a.py").touch()
    with pytest.raises(InputError, match="no document"):
        build_dataset(tmp_path / "empty", tokenizer, tmp_path / "out")


def test_only_a_dataset_is_replaced_and_only_when_asked(
    make_dataset: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    directory = make_dataset({"a.py": "a = 1\n"}, "data")
    source = directory.parent / "data-texts"
    (source / "b.py").write_text("b = 2\n")
    with pytest.raises(InputError, match="--overwrite"):
        build_dataset(source, tokenizer, directory)
    assert open_dataset(directory).manifest.documents == 1
    build_dataset(source, tokenizer, directory, overwrite=True)
    assert open_dataset(directory).manifest.documents == 2
    with pytest.raises(InputError, match="other files"):
        build_dataset(source, tokenizer, source, overwrite=True)
    with pytest.raises(InputError, match="a file"):
        build_dataset(source, tokenizer, source / "a.py", overwrite=True)
    assert sorted(path.name for path in directory.parent.iterdir()) == ["data", "data-texts"]


def test_a_failed_replacement_keeps_the_old_result(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", "marker", overwrite=False) as directory:
        (directory / "marker").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with new_directory(tmp_path / "out", "marker", overwrite=True) as directory:
            (directory / "marker").write_text("new")
            raise KeyboardInterrupt
    assert (tmp_path / "out" / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_list_is_sorted_by_the_whole_path(tmp_path: Path) -> None:
    for name in ("a/b.py", "a-b.py", "a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path).files]
    assert found == sorted(found) == ["a-b.py", "a.py", "a/b.py"]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_three_commands_from_text_to_a_dataset(tmp_path: Path) -> None:
    corpus, tokenizer, shards = tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "shards"
    done = run_tool("build_corpus", "--output", corpus, "--max-bytes", 300_000)
    assert done.returncode == 0, done.stderr
    done = run_tool("train_tokenizer", "--input", corpus / "train", "--vocab-size", 512, "--output", tokenizer)
    assert done.returncode == 0, done.stderr
    arguments = ("--input", corpus / "validation", "--tokenizer", tokenizer, "--output", shards)
    done = run_tool("build_shards", *arguments)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(shards)
    assert dataset.manifest.vocab_size == 512
    assert dataset.manifest.fingerprint in done.stdout
    assert dataset.manifest.documents == len(list((corpus / "validation").rglob("*.py")))
    assert b'"licence":"PSF-2.0"' in (shards / "shard-000000.tar").read_bytes()
    again = run_tool("build_shards", *arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("error: --output: ")
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize("name", ["build_corpus", "train_tokenizer", "build_shards", "inspect_shards"])
def test_help_imports_nothing_heavy(name: str) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['tools/{name}.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'webdataset', 'transformers', 'sentencepiece'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
