"""Whole runs on data of every kind: several sources, masked documents, damaged shards, text shards."""

import json
import shutil
import tarfile

import pytest

from ebft_mega.data.store.opening import open_dataset
from tests.integration.conftest import launch, settings
from tests.unit.data.store.https_server import make_certificate, trusted_server

CONFIG = ["--config", "configs/tiny_cpu.yaml"]
PLAIN = ("ebft.rl_coef=0", "ebft.ce_coef=1", "evaluation.shards=null")


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def status_of(output):
    return json.loads((output / "status.json").read_text())


@pytest.mark.slow
def test_several_sources_with_masked_documents(data, tmp_path):
    output = tmp_path / "out"
    more = (
        "data.shards=null",
        f"data.sources.large={{shards: {data.train}, weight: 3}}",
        f"data.sources.small={{shards: {data.held_out}, weight: 1, max_epochs: 2}}",
        "data.document_masking=true",
        "data.workers=2",
        "train.max_steps=3",
    )
    completed = launch([*CONFIG, *settings(data, output, *more)], ranks=2)
    assert completed.returncode == 0, completed.stdout
    steps = metrics_of(output)[1:]
    for line in steps:
        tokens = 4 * 32 * line["step"]
        assert line["data/tokens"] == tokens
        assert (line["data/tokens/large"], line["data/tokens/small"]) == (tokens * 3 / 4, tokens / 4)
        assert 0 <= line["data/dropped_anchor_share"] < 0.5
        assert 0 < line["data/epochs/small"] < 1
    assert "eval/feature_matching_loss" in steps[-1]


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory):
    """The training set with one flipped bit in its longest document."""
    directory = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(data.train, directory)
    dataset = open_dataset(directory)
    record = dataset.index[dataset.index["tokens"].argmax()]
    dataset.close()
    shard = next(directory.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[int(record["offset"]) + 600] ^= 1
    shard.write_bytes(content)
    return directory


@pytest.mark.slow
def test_damaged_rows_are_left_out_and_written_down(data, damaged, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "data_errors.jsonl").write_text("of an earlier run\n")
    more = ("data.on_error=skip", "data.max_skipped_rows=1000", "data.max_skipped_share=1", "train.max_steps=12")
    completed = launch([*CONFIG, *settings(data, output, f"data.shards={damaged}", *PLAIN, *more)], ranks=2)
    assert completed.returncode == 0, completed.stdout
    records = [json.loads(line) for line in (output / "data_errors.jsonl").read_text().splitlines()]
    steps = metrics_of(output)
    assert len(records) == sum(line["data/skipped_rows"] for line in steps) == steps[-1]["data/skipped_rows_total"]
    assert 5 < len(records) < 48
    assert all("crc32" in record["expected"] and record["shard"].endswith(".tar") for record in records)
    assert len({record["row"] for record in records}) == len(records)
    assert all(line["data/skipped_rows"] == sum(r["step"] == line["step"] for r in records) for line in steps)

    # The same rows by their numbers there, which are then not even read: the same losses, and no row counts as damaged.
    rows = f"data.skip_rows={[[record['row']] * 2 for record in records]}"
    named = tmp_path / "named"
    more = (f"data.shards={damaged}", *PLAIN, "train.max_steps=12", "data.workers=2", rows)
    completed = launch([*CONFIG, *settings(data, named, *more)], ranks=2)
    assert completed.returncode == 0, completed.stdout
    assert not (named / "data_errors.jsonl").exists()
    keys = ("train/loss", "train/grad_norm")
    for line, other in zip(steps, metrics_of(named), strict=True):
        assert [line[key] for key in keys] == [other[key] for key in keys]
        assert other["data/left_out_rows"] == line["data/skipped_rows"] and "data/skipped_rows" not in other


@pytest.mark.slow
def test_more_damage_than_the_budget_ends_every_rank_with_code_4(data, damaged, tmp_path):
    output = tmp_path / "out"
    more = ("data.on_error=skip", "data.max_skipped_rows=2", "data.max_skipped_share=1", "train.max_steps=60")
    completed = launch([*CONFIG, *settings(data, output, f"data.shards={damaged}", *PLAIN, *more)], ranks=2)
    assert completed.returncode == 4, completed.stdout
    assert "data.max_skipped_rows" in completed.stdout and status_of(output)["exit_code"] == 4
    assert len((output / "data_errors.jsonl").read_text().splitlines()) > 2


@pytest.mark.slow
def test_text_shards_are_tokenized_once(data, tmp_path):
    texts, cache = tmp_path / "texts", tmp_path / "cache"
    texts.mkdir()
    with tarfile.open(texts / "part-0.tar", "w") as shard:
        for number, path in enumerate(sorted((data.train.parent / "text" / "train").iterdir())):
            shard.add(path, arcname=f"{number:04d}.txt")
    more = (f"data.shards={texts}", f"data.tokenizer={data.train.parent / 'tokenizer'}", f"data.cache={cache}")
    output = tmp_path / "out"
    arguments = [*CONFIG, *settings(data, output, *more, *PLAIN, "train.max_steps=2")]
    completed = launch(arguments, ranks=None)
    assert completed.returncode == 0, completed.stdout
    (made,) = cache.glob("text-*/dataset.json")
    assert json.loads(made.read_text())["tokens"] == open_dataset(data.train).manifest.tokens
    written = made.stat().st_mtime_ns
    assert launch([*arguments, "--dry-run"], ranks=None).returncode == 0
    assert made.stat().st_mtime_ns == written


@pytest.mark.slow
def test_shards_behind_a_url_are_downloaded_once_for_all_ranks(data, tmp_path, monkeypatch):
    public, output = tmp_path / "public", tmp_path / "out"
    shutil.copytree(data.train, public / "train")
    shutil.copytree(data.held_out, public / "held_out")
    with trusted_server(public, make_certificate(tmp_path), monkeypatch) as server:
        more = (
            f"data.shards={server.url}/train",
            f"evaluation.shards={server.url}/held_out",
            f"data.cache={tmp_path / 'cache'}",
            "train.max_steps=2",
        )
        arguments = [*CONFIG, *settings(data, output, *more)]
        completed = launch(arguments, ranks=2)
        assert completed.returncode == 0, completed.stdout
        shards = [f"{part}/{path.name}" for part in ("train", "held_out") for path in (public / part).glob("*.tar")]
        assert all(len(server.asked("GET", shard)) == 1 for shard in shards)
        one_too_small = max(
            sum(p.stat().st_size for p in (public / part).glob("*.tar")) for part in ("train", "held_out")
        )
        refused = launch([*arguments, "--dry-run", "--set", f"data.cache_gigabytes={one_too_small / 1e9}"], ranks=None)
        assert refused.returncode == 2 and "data.cache_gigabytes" in refused.stdout, refused.stdout


def test_sources_that_end_before_the_run_are_refused_before_it_starts(data, tmp_path):
    output = tmp_path / "out"
    more = ("data.shards=null", f"data.sources.only={{shards: {data.train}, max_epochs: 1}}", "train.max_steps=100000")
    completed = launch([*CONFIG, *settings(data, output, *more)], ranks=None)
    assert completed.returncode == 2, completed.stdout
    assert "data.sources" in completed.stdout and "400000 rows" in completed.stdout
    assert not output.exists()
