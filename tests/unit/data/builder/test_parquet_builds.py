"""Parquet files give the dataset that the same texts give as JSON lines, and the hub's folders are read as they are."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.work_plan import make_plan
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def documents(directory: Path) -> list[tuple[list[int], dict[str, Any]]]:
    """Tokens and metadata of each document, without what differs between two files of the same texts."""
    dataset = open_dataset(directory)
    metadata = [
        json.loads(part)
        for entry in dataset.manifest.shards
        for part in (directory / entry.name).read_bytes().split(b"\0")
        if part.startswith(b'{"')
    ]
    for meta in metadata:
        meta["path"] = meta["path"].rpartition(":")[2]
    return [(dataset.tokens(number).tolist(), meta) for number, meta in enumerate(metadata)]


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
            "license": st.none() | st.sampled_from(["MIT", "Apache-2.0"]),
            "stars": st.none() | st.integers(-5, 5),
        }
    ),
    min_size=1,
    max_size=30,
).filter(lambda rows: any(row["text"] for row in rows))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, group=st.integers(1, 9), dictionary=st.booleans(), compression=st.sampled_from(["none", "zstd"]))
def test_parquet_and_json_lines_of_the_same_texts_are_the_same_dataset(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], group: int, dictionary: bool, compression: str
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = pa.schema({"stars": pa.int64(), "text": pa.string(), "license": pa.string()})
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(
        table, tmp_path / "d.parquet", row_group_size=group, use_dictionary=dictionary, compression=compression
    )
    options = BuildOptions(licence_key="license", keep_keys=["stars"], work_unit_bytes=40)
    records = []
    for name in ("d.jsonl", "d.parquet"):
        result = build_dataset(tmp_path / name, tokenizer, tmp_path / f"out-{name}", options, overwrite=True)
        records.append((result.record.documents, result.record.empty, result.record.duplicates, result.record.licences))
    assert documents(tmp_path / "out-d.jsonl") == documents(tmp_path / "out-d.parquet")
    assert records[0] == records[1]


def hub_folder(place: Path, splits: tuple[str, ...] = ("train",)) -> Path:
    """A repository of the hub, its files links to blobs as in the cache."""
    repository = place / "datasets--team--code"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("ab" * 20)
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    contents = {"README.md": b"# about", ".gitattributes": b"*.parquet", "dataset_infos.json": b"{}"}
    for number, split in enumerate(name for name in splits for _ in range(2)):
        table = pa.table({"text": [f"{split}_{number}_{row} = {row}\n" * 9 for row in range(40)]})
        pq.write_table(table, place / "t.parquet", row_group_size=15)
        contents[f"data/{split}-{number:05d}-of-00002.parquet"] = (place / "t.parquet").read_bytes()
    for number, (name, content) in enumerate(contents.items()):
        blob = blobs / f"{number:064x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_a_snapshot_of_the_hub_is_read_row_group_by_row_group(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = hub_folder(tmp_path)
    options = BuildOptions(work_unit_bytes=3_000)
    plan = make_plan([source], options, "identity")
    assert [(r.begin, r.end) for unit in plan.work_units for r in unit] == [(0, 1), (1, 2), (2, 3)] * 2
    assert len(plan.work_units) > 2
    record = build_dataset(source, tokenizer, tmp_path / "one", options).record
    assert record.documents == 80
    assert record.left_out == {"files of other kinds": 2, "hidden files": 1}


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte_of_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, options = hub_folder(tmp_path), BuildOptions(work_unit_bytes=3_000)
    build_dataset(source, tokenizer, tmp_path / "one", options)
    build_dataset(source, tokenizer, tmp_path / "two", options, processes=2)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_several_splits_of_one_folder_are_named_and_never_mixed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = hub_folder(tmp_path, ("train", "test"))
    with pytest.raises(InputError, match="files of several splits: test: 2, train: 2; expected one split at a time"):
        build_dataset(source, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options = BuildOptions(pattern="train-*")
    assert build_dataset(source, tokenizer, tmp_path / "out", options).record.documents == 80


def test_a_damaged_row_group_is_refused_or_left_out_by_itself(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{number} " * 50 for number in range(40)]
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": texts}), file, row_group_size=10, write_page_checksum=True, compression="none")
    content = bytearray(file.read_bytes())
    content[content.index(b"15 15 15")] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="row group 1: file: found"):
        build_dataset(file, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    record = build_dataset(file, tokenizer, tmp_path / "out", BuildOptions(skip_bad=True)).record
    assert (record.documents, record.skipped_by_reason) == (30, {"unreadable or damaged files": 1})
    line = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert line["path"] == "t.parquet" and "CRC" in line["found"]


def test_a_wrong_column_is_named_before_anything_is_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"content": ["x"], "license": ["MIT"], "id": [1]}), tmp_path / f"{name}.parquet")
    for options, words in (
        (BuildOptions(), "text: found no such column; expected a column of texts, named with --text-key"),
        (BuildOptions(text_key="id"), "id: found a column of int64; expected a column of texts"),
        (BuildOptions(text_key="content", keep_keys=["licence"]), "--keep-key: licence: found no such column in any"),
    ):
        with pytest.raises(InputError) as caught:
            build_dataset(tmp_path, tokenizer, tmp_path / "out", options)
        assert words in str(caught.value) and not (tmp_path / "out").exists()
        assert "content: string, license: string, id: int64" in str(caught.value)


def test_a_missing_pyarrow_is_named_with_what_to_install(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"expected pyarrow, which reads Parquet: pip install 'ebft-mega\[parquet\]'"):
        build_dataset(tmp_path, tokenizer, tmp_path / "out")


def test_where_nothing_can_be_used_it_is_said_how_much_there_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pq.write_table(pa.table({"text": pa.array([None] * 7, pa.string())}), tmp_path / "d.parquet")
    words = (
        r"no document with text \(left out: what cannot be used: 7\); expected at least one; without --skip-bad it is"
    )
    with pytest.raises(InputError, match=words):
        build_dataset(tmp_path / "d.parquet", tokenizer, tmp_path / "out", BuildOptions(skip_bad=True))
    assert not (tmp_path / "out").exists()
