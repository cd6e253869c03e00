"""Time the data path: packed rows in training order, whole shards, and resuming in a dataset of millions of documents.

It writes synthetic shards into a temporary directory and reads them from there, so from memory where the system keeps
files in memory: this is what the code costs, not the disk. Every read is checked. No document is kept for another row.
With --build it times `build_shards.py` on a text instead, with one process and with several, turn and turn about.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import filecmp
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.builder.shard_writer import DatasetWriter
from ebft_mega.data.rows.stream import RowStream, Source
from ebft_mega.data.store.checks import index_problems
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    file_sha256,
)
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.reader import ShardFiles
from ebft_mega.data.store.verify import shard_documents
from ebft_mega.data.tokenizers.tokenizer import HuggingFaceTokenizer, tokenizer_sha256
from ebft_mega.io.arguments import ToolParser, path_argument, whole_number
from ebft_mega.io.child_processes import obey_the_parent_only, signals_blocked
from ebft_mega.io.command import run_command

VOCABULARIES = {"uint16": 50_000, "uint32": 151_000}
BATCH_ROWS = 64  # of one process
SHARD_BYTES = 32 << 20
RESUME_SHARD_DOCUMENTS = 20_000


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents", type=whole_number(), default=12_000, help="documents in the shards (default: 12000)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(), default=6_000, help="mean tokens of a document (default: 6000)"
    )
    parser.add_argument("--sequence-length", type=whole_number(), default=1024, help="tokens in a row (default: 1024)")
    parser.add_argument(
        "--batches", type=whole_number(), default=400, help=f"of {BATCH_ROWS} rows a process (default: 400)"
    )
    parser.add_argument("--processes", type=whole_number(), default=2, help="processes that read at once (default: 2)")
    parser.add_argument("--repeats", type=whole_number(), default=3, help="times each figure is measured (default: 3)")
    parser.add_argument(
        "--resume-documents",
        type=whole_number(),
        default=10_000_000,
        help="documents of the large index (default: 10000000)",
    )
    parser.add_argument("--build", type=path_argument, metavar="PATH", help="time building a dataset of this text")
    parser.add_argument("--tokenizer", type=path_argument, help="with --build: sentencepiece or Hugging Face directory")
    options = parser.parse_args()
    if (options.build is None) != (options.tokenizer is None):
        parser.error("--build, --tokenizer: found one without the other; expected both or neither")
    if options.build is not None and options.processes < 2:
        parser.error("--processes: found 1; expected at least 2 with --build, to compare with one")
    return options


def main() -> None:
    """Measure and print everything."""
    options = parse_arguments()
    if options.build is not None:
        measure_building(options)
        return
    print(f"{'what':58} {'seconds':>9} {'CPU s':>7} {'M tokens/s':>11}", flush=True)
    for dtype, vocab_size in VOCABULARIES.items():
        with tempfile.TemporaryDirectory(prefix="bench-data-") as directory:
            dataset = synthetic_dataset(Path(directory), vocab_size, options)
            measure_reading(dataset, dtype, options)
            dataset.close()
    measure_resuming(options)


def synthetic_dataset(directory: Path, vocab_size: int, options: argparse.Namespace) -> Dataset:
    """Write documents of random tokens and lengths with the package's writer, and open them."""
    tokenizer_file = directory / "tokenizer.json"
    tokenizer_file.write_text('{"model": {}}', encoding="utf-8")
    sha256 = str(tokenizer_sha256(directory))
    tokenizer = HuggingFaceTokenizer(
        vocab_size, eos_id=0, sha256=sha256, files=(tokenizer_file,), backend=None, known_ids=frozenset()
    )
    (directory / "dataset").mkdir()
    writer = DatasetWriter(directory / "dataset", tokenizer, SHARD_BYTES)
    random = np.random.default_rng(0)
    for number in range(options.documents):
        length = int(random.integers(options.tokens // 10, 2 * options.tokens - options.tokens // 10))
        writer.add(random.integers(0, vocab_size, length).tolist(), {"path": f"synthetic/{number}"})
    writer.finish()
    return open_dataset(directory / "dataset")


def measure_reading(dataset: Dataset, dtype: str, options: argparse.Namespace) -> None:
    """Print the figures of one dataset."""
    stream = RowStream([Source("synthetic", dataset)], options.sequence_length, 0, document_cache_bytes=0)
    ranks = options.processes
    tokens = options.batches * BATCH_ROWS * options.sequence_length * ranks
    shards = range(len(dataset.manifest.shards))
    for _ in range(options.repeats):
        figures = timed_together(lambda rank: read_batches(stream, rank, ranks, 0, options.batches), ranks)
        show(f"packed rows, {dtype}, {ranks} processes that read for themselves", *figures, tokens)
    for _ in range(options.repeats):
        figures = timed_together(lambda _: read_batches(stream, 0, 1, ranks, options.batches * ranks), 1)
        show(f"packed rows, {dtype}, 1 process with {ranks} workers", *figures, tokens)
    for _ in range(options.repeats):
        figures = timed_together(lambda _: [sum(1 for _ in shard_documents(dataset, shard)) for shard in shards], 1)
        show(f"whole shards, {dtype}, 1 process", *figures, dataset.manifest.tokens)


def read_batches(stream: RowStream, rank: int, ranks: int, workers: int, num_batches: int) -> None:
    """Read batches as one rank of a run does."""
    from ebft_mega.data.rows.loader import BatchLoader

    loader = BatchLoader(stream, BATCH_ROWS * ranks, rank, ranks, workers=workers)
    for batch in itertools.islice(loader, num_batches):
        assert len(batch.rows.tokens) == BATCH_ROWS


def timed_together(work: Callable[[int], object], processes: int) -> tuple[float, float]:
    """Seconds that processes take for their parts of some work from a common start, and their CPU seconds.

    CPU seconds include those of the workers that a process starts and waits for.
    """
    import ebft_mega.data.rows.loader  # noqa: F401 (before the clock starts, and once for all processes)

    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    parent = os.getpid()

    def run(rank: int) -> None:
        obey_the_parent_only(parent)
        barrier.wait()
        started = time.perf_counter()
        work(rank)
        results.put((started, time.perf_counter(), sum(os.times()[:4])))

    children = [context.Process(target=run, args=(rank,)) for rank in range(processes)]
    try:
        with signals_blocked():
            for child in children:
                child.start()
        for child in children:
            child.join()
    except BaseException:  # a signal to this process
        for child in children:
            if child.is_alive():
                child.terminate()
        raise
    if any(child.exitcode for child in children):
        raise SystemExit("a process that read has failed")
    found = [results.get() for _ in children]
    return max(ended for _, ended, _ in found) - min(started for started, _, _ in found), sum(cpu for *_, cpu in found)


def measure_building(options: argparse.Namespace) -> None:
    """Print what building a dataset takes with one process and with several, and how many times faster those are."""
    print(f"{'processes':>9} {'seconds':>9} {'CPU s':>8} {'M tokens/s':>11} {'load before':>12}", flush=True)
    seconds: dict[int, list[float]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as directory:
        outputs = {processes: Path(directory) / str(processes) for processes in seconds}
        for processes in list(seconds) * options.repeats:
            command = [sys.executable, str(Path(__file__).with_name("build_shards.py")), "--input", str(options.build)]
            command += ["--tokenizer", str(options.tokenizer), "--output", str(outputs[processes]), "--overwrite"]
            load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            subprocess.run([*command, "--processes", str(processes)], check=True, stdout=subprocess.DEVNULL)
            taken = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds[processes].append(taken)
            tokens = json.loads((outputs[processes] / MANIFEST_NAME).read_text())["tokens"]
            print(f"{processes:9} {taken:9.1f} {cpu:8.1f} {tokens / taken / 1e6:11.3f} {load:12.2f}", flush=True)
        first, second = outputs.values()
        names = sorted(path.name for path in first.iterdir() if path.is_file())
        _, different, missing = filecmp.cmpfiles(first, second, names, shallow=False)
        if different or missing:
            raise SystemExit(f"other bytes with {options.processes} processes: {', '.join([*different, *missing])}")
    ratios = [one / several for one, several in zip(*seconds.values(), strict=True)]
    print(
        f"\n{tokens:,} tokens; {options.processes} processes are {statistics.median(ratios):.2f} times as fast as one"
    )


def show(what: str, seconds: float, cpu_seconds: float, tokens: int) -> None:
    """Print one line of the table."""
    print(f"{what:58} {seconds:9.2f} {cpu_seconds:7.2f} {tokens / seconds / 1e6:11.1f}", flush=True)


def measure_resuming(options: argparse.Namespace) -> None:
    """Print what opening an index costs, and the time from a saved state to the place of its first row."""
    from ebft_mega.data.rows.loader import BatchLoader
    from ebft_mega.data.rows.stream_state import StreamState

    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        manifest = large_index(Path(name), options.resume_documents)
        started = time.perf_counter()
        problems = index_problems(Path(name), manifest)
        opening = time.perf_counter() - started
        if problems:
            raise SystemExit(str(problems[0]))
        index = np.load(Path(name) / INDEX_NAME, mmap_mode="r", allow_pickle=False)
        dataset = Dataset(Path(name), manifest, index, ShardFiles([]))
        rows = manifest.tokens // options.sequence_length
        times = []
        for place in [0, *(rows * part // 8 for part in range(1, 24))]:  # through three epochs
            saved = RowStream.of(dataset, options.sequence_length, 0).state(place).to_json()
            stream = RowStream.of(dataset, options.sequence_length, 0)  # knows nothing of the place
            loader = BatchLoader(stream, 1)
            started = time.perf_counter()
            loader.resume(StreamState.from_json(saved))
            stream.locate(loader.state.next_row)
            times.append(1000 * (time.perf_counter() - started))
        print(f"\n{manifest.documents:,} documents in {len(manifest.shards)} shards")
        print(f"checking the index when it is opened: {opening:.2f} s for {index.nbytes / 1e6:.0f} MB")
        print(
            f"from a saved state to the place of its first row: median {statistics.median(times):.1f} ms, "
            f"longest {max(times):.1f} ms of {len(times)} places in three epochs"
        )


def large_index(directory: Path, num_documents: int) -> Manifest:
    """Write the index of a dataset whose shards do not exist, and describe it."""
    index = np.zeros(num_documents, INDEX_DTYPE)
    index["tokens"] = np.random.default_rng(0).integers(1, 12_000, num_documents)
    index["payload_bytes"] = 2 * (index["tokens"] - 1)
    index["shard"] = np.arange(num_documents) // RESUME_SHARD_DOCUMENTS
    members = 512 + -(-index["payload_bytes"].astype(np.int64) // 512) * 512
    starts = np.arange(0, num_documents, RESUME_SHARD_DOCUMENTS)
    before = np.cumsum(members) - members
    index["offset"] = before - before[starts][index["shard"]]
    np.save(directory / INDEX_NAME, index, allow_pickle=False)
    counts = np.diff([*starts, num_documents]).tolist()
    tokens = np.add.reduceat(index["tokens"].astype(np.int64), starts).tolist()
    num_bytes = np.add.reduceat(members, starts).tolist()
    sha256 = hashlib.sha256(b"synthetic").hexdigest()
    shards = [
        {"name": f"shard-{number:06d}.tar", "bytes": size, "sha256": sha256, "documents": count, "tokens": total}
        for number, (size, count, total) in enumerate(zip(num_bytes, counts, tokens, strict=True))
    ]
    path = directory / INDEX_NAME
    return Manifest.model_validate(
        {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "dtype": "uint16",
            "vocab_size": VOCABULARIES["uint16"],
            "eos_id": 0,
            "tokenizer_sha256": sha256,
            "documents": num_documents,
            "tokens": sum(tokens),
            "max_token_id": 0,
            "shards": tuple(shards),
            "index": {"name": INDEX_NAME, "bytes": path.stat().st_size, "sha256": file_sha256(path)},
            "fingerprint": sha256,
        }
    )


if __name__ == "__main__":
    sys.exit(run_command(main, prints_its_result=True))
