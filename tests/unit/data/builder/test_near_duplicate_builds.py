"""A build without near-duplicates: the same at any number of processes, counted, and bad values refused."""

import random
import runpy
import sys
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import read_build_record
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.selection.held_out_split import SplitOptions
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.io.command import run_command
from tests.unit.data.builder.test_held_out_build import bytes_of, paths_of

TOOL = Path(__file__).resolve().parents[4] / "tools" / "build_shards.py"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten folders; each has a file, one that is equal, and one that is nearly so; f9 is f0 with another ending."""
    base = tmp_path / "source"
    for folder in range(9):
        numbers = random.Random(folder)
        words = [f"w{numbers.randrange(500)}" for _ in range(200)]
        (base / f"f{folder}").mkdir(parents=True)
        (base / f"f{folder}" / "a.py").write_text(" ".join(words))
        (base / f"f{folder}" / "b.py").write_text(" ".join(words))
        (base / f"f{folder}" / "c.py").write_text(" ".join([*words, "changed"]))
    (base / "f9").mkdir()
    (base / "f9" / "a.py").write_text((base / "f0" / "a.py").read_text() + "\nand more")
    return base


def test_the_earliest_stays_whatever_the_processes(tmp_path: Path, source: Path, tokenizer: Tokenizer) -> None:
    options = BuildOptions(near_deduplicate=0.8, work_unit_bytes=900)
    build_dataset(source, tokenizer, tmp_path / "one", options)
    assert paths_of(tmp_path / "one") == [f"f{folder}/a.py" for folder in range(9)]
    record = read_build_record(tmp_path / "one")
    assert record is not None and (record.duplicates, record.near_duplicates) == (9, 10)
    build_dataset(source, tokenizer, tmp_path / "two", options, processes=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_equal_documents_that_are_kept_are_near_to_each_other(
    tmp_path: Path, source: Path, tokenizer: Tokenizer
) -> None:
    build_dataset(source, tokenizer, tmp_path / "out", BuildOptions(near_deduplicate=1.0, deduplicate=False))
    record = read_build_record(tmp_path / "out")
    assert record is not None and record.duplicates == 0
    assert not any(path.endswith("b.py") for path in paths_of(tmp_path / "out"))


@pytest.mark.parametrize(("near", "across"), [(None, 1), (0.8, 0)])
def test_what_two_sides_have_in_common_is_counted(
    tmp_path: Path,
    source: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    near: float | None,
    across: int,
) -> None:
    # Which folders are held out follows from their names; one of f0 and f9, which are near to each other, has to be.
    for seed in range(40):
        options = BuildOptions(near_deduplicate=near, split=SplitOptions("30%", "top-folder", seed))
        result = build_dataset(source, tokenizer, tmp_path / "out", options, overwrite=True)
        sides = [
            {path.partition("/")[0] for path in paths_of(tmp_path / "out" / side)} for side in ("train", "held-out")
        ]
        if near is not None or sum({"f0", "f9"} <= side for side in sides) == 0:
            break
    assert result.record.split["near_across"] >= across
    assert ("nearly the same as one for training" in capsys.readouterr().err) == (across > 0)


@pytest.mark.parametrize("value", ["0", "1.5", "-1", "abc", "nan"])
def test_bad_values_are_named(tmp_path, source, monkeypatch, capsys, value):
    main = runpy.run_path(str(TOOL))["main"]
    arguments = ["--input", str(source), "--tokenizer", "t", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [TOOL.name, *arguments, f"--near-deduplicate={value}"])
    try:
        code = run_command(main)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and not (tmp_path / "out").exists()
    assert "--near-deduplicate" in capsys.readouterr().err


def test_a_text_of_both_sides_stays_on_one_where_copies_stay_and_near_duplicates_go(
    source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for folder in range(9):  # each text lies in two folders, so that most splits have it on both sides
        (source / f"f{folder}" / "other.py").write_text((source / f"f{(folder + 1) % 9}" / "a.py").read_text())
    for seed in range(4):
        options = BuildOptions(near_deduplicate=0.8, deduplicate=False, split=SplitOptions("40%", "top-folder", seed))
        record = build_dataset(source, tokenizer, tmp_path / f"out{seed}", options).record
        assert (record.documents, record.near_duplicates, record.duplicates) == (9, 28, 0)


def test_what_was_left_out_as_nearly_the_same_is_shown(
    source: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (source / "latin.py").write_bytes("größer und länger als fünf Wörter".encode("latin-1"))
    options = BuildOptions(near_deduplicate=0.8, encoding_fallback="latin-1")
    build_dataset(source, tokenizer, tmp_path / "out", options)
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", str(tmp_path / "out")])
    assert run_command(runpy.run_path(str(TOOL.with_name("inspect_shards.py")))["main"]) == 0
    shown = capsys.readouterr().out
    assert "10 near-duplicates, 9 duplicates, 0 empty" in shown
    assert "encodings    latin-1: 1" in shown
