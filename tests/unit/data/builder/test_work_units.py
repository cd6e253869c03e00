"""A build is the same whoever does it, and is resumed where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.work_plan import LARGEST_WORK_UNIT_BYTES, SMALLEST_WORK_UNIT_BYTES, make_plan
from ebft_mega.data.builder.worker_pool import WorkerDiedError, Workers
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.input_errors import bad_input

REPOSITORY = Path(__file__).resolve().parents[4]
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def sources(tmp_path: Path, texts: dict[str, str]) -> list[Path]:
    """A directory of texts and a JSONL file of several work units, with equal documents and empty ones among them."""
    names = sorted(texts)
    for name in names[:20]:
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[name])
    lines = []
    for number in range(200):
        text = "" if number % 17 == 0 else f"value_{number % 60} = {number % 60}\n" * (number % 6 + 1)
        lines.append(json.dumps({"text": text, "license": f"L{number % 3}", "stars": number}))
    lines[40] = json.dumps({"text": texts[names[3]], "stars": 0})
    (tmp_path / "dump.jsonl").write_text("\n".join(lines) + "\n")
    return [tmp_path / "files", tmp_path / "dump.jsonl"]


OPTIONS = BuildOptions(shard_bytes=9_000, work_unit_bytes=2_500, licence_key="license", keep_keys=["stars"])


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def expected(tmp_path: Path, sources: list[Path], tokenizer: Tokenizer) -> dict[str, bytes]:
    build_dataset(sources, tokenizer, tmp_path / "expected", OPTIONS)
    return contents(tmp_path / "expected")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_no_byte(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, expected: dict[str, bytes], processes: int
) -> None:
    build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS, processes=processes)
    assert contents(tmp_path / "out") == expected
    assert len([name for name in expected if name.endswith(".tar")]) > 8
    assert not (tmp_path / ".out.partial").exists()


def test_the_result_holds_what_a_plain_reading_gives(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, expected: dict[str, bytes]
) -> None:
    texts = [(path.relative_to(sources[0]).as_posix(), path.read_text()) for path in sources[0].rglob("*.py")]
    texts.sort()
    lines = sources[1].read_text().splitlines()
    texts += [(f"dump.jsonl:{number + 1}", json.loads(line)["text"]) for number, line in enumerate(lines)]
    first_paths: dict[str, str] = {}
    for path, text in texts:
        if text:
            first_paths.setdefault(text, path)
    dataset = open_dataset(tmp_path / "expected")
    found = [tokenizer.decode(dataset.tokens(number)) for number in range(dataset.manifest.documents)]
    assert found == list(first_paths)
    paths = []
    for entry in dataset.manifest.shards:
        content = expected[entry.name]
        for line in content.split(b"\0"):
            if line.startswith(b'{"'):
                paths.append(json.loads(line)["path"])
    assert paths == list(first_paths.values())
    record = json.loads(expected["build.json"])
    assert record["documents"] == len(first_paths)
    assert record["empty"] == sum(not text for _, text in texts)
    assert record["duplicates"] == len(texts) - record["empty"] - len(first_paths) > 100
    assert record["text_bytes"] == sum(len(text.encode()) for text in first_paths)
    assert record["input_files"] == {"files": 20, tmp_path.name: 1}
    assert record["licences"].keys() == {"L0", "L1", "L2", "unknown"}
    assert sum(record["licences"].values()) == sum(record["sources"].values()) == len(first_paths)


# Ends the process without a chance to tidy up, at the n-th call of a function.
KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from ebft_mega.data.builder import dataset_build as build
from ebft_mega.data.builder import build_summary, scanning, shard_writer, tokenizing
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer

module, name, calls = {place!r}
owners = (build_summary, scanning, shard_writer, tokenizing)
owner = {{owner.__name__.rpartition(".")[2]: owner for owner in owners}}.get(module, Path)
function, left = getattr(owner, name), [calls]

def killing(*arguments, **options):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

setattr(owner, name, killing)
sources = [Path(path) for path in {sources!r}]
build.build_dataset(sources, load_tokenizer({tokenizer!r}), Path({output!r}), BuildOptions(**{options!r}))
"""


@pytest.mark.parametrize(
    "place",
    [
        ("scanning", "write_bytes", 3),  # a few work units scanned
        ("tokenizing", "flush_to_disk", 5),  # in the middle of a work unit that is being tokenized
        ("Path", "replace", 30),  # in the middle of joining the shards
        ("shard_writer", "complete_dataset", 0),  # the shards joined, no manifest yet
        ("build_summary", "write_skipped", 0),  # all but the name
    ],
)
def test_a_killed_build_is_resumed(
    tmp_path: Path,
    sources: list[Path],
    tokenizer: Tokenizer,
    expected: dict[str, bytes],
    place: tuple[str, str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = KILLED_BUILD.format(
        place=place,
        sources=[str(path) for path in sources],
        tokenizer=str(tokenizer.files[0].parent),
        output=str(tmp_path / "out"),
        options=asdict(OPTIONS),
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = tmp_path / ".out.partial"
    assert not (tmp_path / "out").exists()
    num_done = len(list(partial.rglob("part.json")))
    has_shards = any((partial / "result").glob("*.tar"))
    build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == expected
    assert "resuming what" in capsys.readouterr().err
    assert not partial.exists()
    assert (num_done > 0) == (place[1] != "write_bytes")
    assert has_shards == (place[1] in ("replace", "complete_dataset", "write_skipped"))


def test_finished_work_units_are_not_done_again(
    tmp_path: Path,
    sources: list[Path],
    tokenizer: Tokenizer,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(
            "ebft_mega.data.builder.dataset_build.join_units", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)

    def again(*_: object) -> None:
        raise AssertionError("this work unit was done")

    monkeypatch.setattr("ebft_mega.data.builder.dataset_build.scan_work_unit", again)
    monkeypatch.setattr("ebft_mega.data.builder.dataset_build.tokenize_work_unit", again)
    build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_killed_build_of_several_processes_is_resumed(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, expected: dict[str, bytes]
) -> None:
    command = [sys.executable, "tools/build_shards.py", "--input", *map(str, sources), "--processes", "2"]
    command += ["--tokenizer", str(tokenizer.files[0].parent), "--output", str(tmp_path / "out")]
    command += ["--shard-bytes", "9000", "--part-bytes", "2500", "--licence-key", "license", "--keep-key", "stars"]
    builder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not any(partial.glob("part-*/part.json")) and builder.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)  # leave the core to the builder
    builder.kill()
    # The workers hold the other ends of the pipe: it ends when the last of them has ended.
    output, _ = builder.communicate(timeout=DEADLINE_SECONDS)
    if builder.returncode == 0:
        pytest.skip("the build was done before it could be killed")
    assert builder.returncode == -signal.SIGKILL, output
    assert any(partial.glob("part-*/part.json"))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


def test_another_input_or_option_starts_anew(
    tmp_path: Path,
    sources: list[Path],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise OSError("disk full")

    for change in ("a file", "an option"):
        with monkeypatch.context() as patches, pytest.raises(OSError):
            patches.setattr("ebft_mega.data.builder.dataset_build.join_units", stop)
            build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
        if change == "a file":
            (sources[0] / "new.py").write_text("new = 1\n")
        options = OPTIONS if change == "a file" else replace(OPTIONS, deduplicate=False)
        build_dataset(sources, tokenizer, tmp_path / "out", options, overwrite=True)
        build_dataset(sources, tokenizer, tmp_path / "fresh", options, overwrite=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
        assert "starting anew" in capsys.readouterr().err
        for path in (tmp_path / "out").iterdir():
            if path.is_file():
                path.unlink()
        os.rename(tmp_path / "out", tmp_path / f"done with {change}")


def test_a_file_rewritten_with_its_old_size_and_time_is_another_file(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patches, pytest.raises(OSError):
        patches.setattr("ebft_mega.data.builder.dataset_build.join_units", stop)
        build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    path = next(path for path in sorted(sources[0].rglob("*.py")) if path.read_bytes())
    times = path.stat()
    path.write_bytes(b"#" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    build_dataset(sources, tokenizer, tmp_path / "fresh", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_file_that_changes_during_the_build_is_refused(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebft_mega.data.builder import dataset_build as build

    def and_change(*arguments: object) -> object:
        scans = build_scan(*arguments)
        (sources[0] / "package1" / "module_05.py").write_text("changed\n")
        return scans

    build_scan = build._scan
    monkeypatch.setattr("ebft_mega.data.builder.dataset_build._scan", and_change)
    with pytest.raises(InputError, match=r"module_05\.py: file: found other text"):
        build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_one_build_of_an_output_at_a_time(
    tmp_path: Path, sources: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebft_mega.data.builder import dataset_build as build

    def and_another(*arguments: object) -> object:
        monkeypatch.setattr("ebft_mega.data.builder.dataset_build._scan", build_scan)
        with pytest.raises(InputError, match="another process"):
            build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
        return build_scan(*arguments)

    build_scan = build._scan
    monkeypatch.setattr("ebft_mega.data.builder.dataset_build._scan", and_another)
    build_dataset(sources, tokenizer, tmp_path / "out", OPTIONS)
    assert open_dataset(tmp_path / "out").manifest.documents


def refuse(number: int, advance: Callable[[int], None]) -> None:
    advance(1)
    raise bad_input(f"unit {number}", "key", "this", "that")


def test_an_error_in_a_worker_arrives_whole() -> None:
    with pytest.raises(InputError) as caught, Workers(2) as workers:
        list(workers.run(refuse, [7, 7], None, "refusing"))
    assert str(caught.value) == "unit 7: key: found this; expected that"


def die(_: int, advance: object) -> None:
    os._exit(9)


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerDiedError, match="fewer processes"), Workers(2) as workers:
        list(workers.run(die, [1, 2, 3], None, "dying"))


def test_work_units_are_cut_by_the_inputs_alone(tmp_path: Path) -> None:
    (tmp_path / "dump.jsonl").write_text("{}\n" * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 2000)
    plan = make_plan([tmp_path], BuildOptions(work_unit_bytes=700), "tokenizer")
    assert [[(each.name, each.begin, each.end) for each in work_unit] for work_unit in plan.work_units] == [
        [("a.jsonl.gz", 0, 2000)],
        *[[("dump.jsonl", begin, min(begin + 700, 3000))] for begin in range(0, 3000, 700)],
    ]
    small = make_plan([tmp_path], BuildOptions(), "tokenizer")
    assert len(small.work_units) == 1
    assert small.identity != plan.identity
    with (tmp_path / "large.jsonl").open("wb") as sparse:
        sparse.truncate(64 * 6 * SMALLEST_WORK_UNIT_BYTES)
    assert len(make_plan([tmp_path], BuildOptions(pattern="large*"), "tokenizer").work_units) == 64
    with (tmp_path / "large.jsonl").open("wb") as sparse:
        sparse.truncate(100 * LARGEST_WORK_UNIT_BYTES)
    assert len(make_plan([tmp_path], BuildOptions(pattern="large*"), "tokenizer").work_units) == 100


def process_id(argument: int, advance: Callable[[int], None]) -> int:
    """A job that takes long enough for all processes of a pool to get one."""
    time.sleep(0.2)
    return os.getpid()


def test_a_short_beginning_leaves_room_for_more_processes() -> None:
    with Workers(3) as workers:
        assert len(list(workers.run(process_id, [0, 1], None, "few"))) == 2
        assert len(set(workers.run(process_id, range(12), None, "many"))) == 3


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, sources: list[Path], tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="expected a place to write to"):
        build_dataset(sources, tokenizer, tmp_path / "file" / "out")
