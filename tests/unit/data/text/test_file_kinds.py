"""A file that is given in the place of another one is named as what it is, with what to do."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.work_plan import make_plan
from ebft_mega.data.selection.text_formats import kind_of_file, kind_within
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.formats.parquet import Parquet
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.planning.model_files import directory_obstacle

TEKKEN = json.dumps({"config": {"pattern": "x", "num_vocab_tokens": 1}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]})


def parquet() -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), content)
    return content.getvalue()


def arrow() -> bytes:
    content = io.BytesIO()
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_file(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.py", "a = 1")
    return content.getvalue()


FILES = {
    "a Parquet file": parquet(),
    "a zip file": zipped(),
    "an Arrow file": arrow(),
    "a tekken vocabulary": TEKKEN.encode(),
    "a table of tokens and ranks (tiktoken)": b"IQ== 0\nIg== 1\n",
    "a GGUF file of weights": b"GGUF\x03\0\0\0",
    "an SQLite database": b"SQLite format 3\0" + bytes(80),
    "a PDF document": b"%PDF-1.7\n",
    "a pickle, which is never read": pickle.dumps({"a": 1}),
    "a safetensors file of weights": (20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}',
    "a file packed by zstandard": zstandard.compress(b"text"),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "JSON lines": b'{"text": "a"}\n',
}


@pytest.mark.parametrize("words", FILES)
def test_each_kind_is_told_by_its_beginning(tmp_path: Path, words: str) -> None:
    (tmp_path / "file").write_bytes(FILES[words])
    kind = kind_of_file(tmp_path / "file")
    assert kind is not None and kind.words == words and kind.advice


@pytest.mark.parametrize(
    "content", [b"", b"def f():\n    return 1\n", b"# PAR1\n", b"hello 12 3\n", b"\x80abc", "ü 1\n".encode()]
)
def test_text_is_of_no_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert kind_of_file(tmp_path / "file") is None


def test_what_is_no_file_is_of_no_kind(tmp_path: Path) -> None:
    assert kind_of_file(tmp_path) is None and kind_of_file(tmp_path / "missing") is None
    assert kind_within(tmp_path / "missing", Parquet.kinds) is None


@pytest.mark.parametrize("words", [words for words in FILES if words != "JSON lines"])
def test_an_input_is_named(tmp_path: Path, words: str) -> None:
    (tmp_path / "data.dat").write_bytes(FILES[words])
    with pytest.raises(InputError) as caught:
        make_plan([tmp_path / "data.dat"], BuildOptions(), "tokenizer")
    assert f"data.dat: found {words}; expected" in str(caught.value)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.zip", "data.tar", "data.jsonl.gz"])
@pytest.mark.parametrize("words", ["a Git LFS pointer", "a Parquet file", "a zip file", "a file packed by zstandard"])
def test_a_container_under_another_name_is_named_once(
    tmp_path: Path, tokenizer_directory: Path, name: str, words: str
) -> None:
    (tmp_path / name).write_bytes(FILES[words])
    tokenizer = load_tokenizer(tokenizer_directory)
    options = BuildOptions(archives="webdataset" if name.endswith(".tar") else None, work_unit_bytes=10)
    if (words, name) in (("a Parquet file", "data.parquet"), ("a zip file", "data.zip")):
        assert build_dataset(tmp_path / name, tokenizer, tmp_path / "out", options).manifest.documents == 1
        return
    with pytest.raises(InputError) as caught:
        build_dataset(tmp_path / name, tokenizer, tmp_path / "out", options)
    (problem,) = caught.value.problems
    assert problem.found == words and not (tmp_path / "out").exists()


def test_a_file_under_another_name_is_left_out_on_request(tmp_path: Path, tokenizer_directory: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(FILES["a Git LFS pointer"])
    (tmp_path / "source" / "b.jsonl").write_bytes(FILES["JSON lines"])
    result = build_dataset(
        tmp_path / "source", load_tokenizer(tokenizer_directory), tmp_path / "out", BuildOptions(skip_bad=True)
    )
    assert (result.manifest.documents, result.record.skipped) == (1, 1)


@pytest.mark.parametrize(("name", "words"), [("tekken.json", "a tekken vocabulary"), ("x.tiktoken", "(tiktoken)")])
def test_a_tokenizer_is_named(tmp_path: Path, name: str, words: str) -> None:
    content = FILES["a tekken vocabulary" if name == "tekken.json" else "a table of tokens and ranks (tiktoken)"]
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(InputError) as caught:
            load_tokenizer(place)
        assert words in str(caught.value)
    with pytest.raises(InputError, match="save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt"])
@pytest.mark.parametrize("words", ["a Parquet file", "a zip file", "a GGUF file of weights", "a tekken vocabulary"])
def test_a_file_of_a_tokenizer_is_named_as_what_it_is(
    tmp_path: Path, hugging_face_directory: Path, name: str, words: str
) -> None:
    if name.startswith("tokenizer_config") and "tekken" in words:
        return  # an object is what that is
    shutil.copytree(hugging_face_directory, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_bytes(FILES[words])
    if name == "tokenizer.model":
        (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path / "tokenizer")
    (problem,) = caught.value.problems
    assert problem.found == words and problem.where.endswith(f"/tokenizer/{name}")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_for_a_file_of_a_tokenizer_its_directory_is_named(hugging_face_directory: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(hugging_face_directory / name)
    (problem,) = caught.value.problems
    expected = f"the directory that it lies in: {hugging_face_directory}"
    assert (problem.found, problem.expected) == (f"the file {name}", expected)


@pytest.mark.parametrize("words", ["a Parquet file", "a zip file", "JSON lines"])
def test_a_dataset_is_named(tmp_path: Path, words: str) -> None:
    (tmp_path / "part-0").write_bytes(FILES[words])
    for place in (tmp_path / "part-0", *[tmp_path] * (words != "JSON lines")):
        with pytest.raises(InputError) as caught:
            open_dataset(place)
        assert words in str(caught.value) and "tools/build_shards.py" in str(caught.value)


def test_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(FILES["a GGUF file of weights"])
    assert directory_obstacle(tmp_path / "m.gguf") == "a GGUF file of weights"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert directory_obstacle(tmp_path / "config.json") == "a file"
