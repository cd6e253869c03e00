"""Build a dataset directory from text with several processes; resume a build that was stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.build_options import DEFAULT_BUILD_OPTIONS, BuildOptions
from ebft_mega.data.builder.build_record import BuildRecord
from ebft_mega.data.builder.build_summary import late_notes, make_record, require_texts, write_skipped
from ebft_mega.data.builder.scanning import MAX_LISTED_PROBLEMS, ScanJob, scan_work_unit
from ebft_mega.data.builder.shard_writer import complete_dataset
from ebft_mega.data.builder.tokenizing import TextEncoder, TokenizeJob, lines_before, tokenize_work_unit
from ebft_mega.data.builder.unit_files import (
    Scan,
    TokenizedUnit,
    load_digests,
    load_scan,
    load_tokenized,
    load_unit_index,
    unit_directory,
)
from ebft_mega.data.builder.work_plan import Plan, make_plan
from ebft_mega.data.builder.worker_pool import Workers
from ebft_mega.data.selection.deduplication import first_occurrences
from ebft_mega.data.store.format import MANIFEST_NAME, Manifest, shard_name
from ebft_mega.data.text.text_files import ARCHIVE_SUFFIX
from ebft_mega.data.tokenizers.tokenizer import Tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.durable import flush_to_disk
from ebft_mega.io.output_directory import unfinished_directory
from ebft_mega.io.standard_streams import print_line


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote and what it left out."""

    manifest: Manifest
    record: BuildRecord


def build_dataset(
    sources: Path | Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    options: BuildOptions = DEFAULT_BUILD_OPTIONS,
    *,
    processes: int = 1,
    overwrite: bool = False,
) -> BuildResult:
    """Tokenize every document of some sources, in the order of their paths, and write a dataset directory.

    The result depends neither on the number of processes nor on stops in between: work units are cut by the inputs
    alone, and numbers of documents and duplicates are decided over all work units before any is tokenized. The
    directory appears only when it is complete. A build that was stopped (not one that found bad input) is resumed
    when it is called again with the same inputs and options; until then what is done stays in `.NAME.partial` beside
    the output.

    Memory: about 700 bytes per input file and 90 bytes per document here, and in each worker 32 bytes per document
    of a work unit, 2 kB per document of a shard, and one document (for one of 10 MB, sentencepiece takes 430 MB). No
    input makes that more: what is longer than `options.max_document_bytes` is not read.

    Args:
        sources: directories of text files, of JSONL files or of text webdataset shards, or such files.
        tokenizer: makes the token ids.
        output: the directory to make.
        options: what decides the result beside inputs and tokenizer.
        processes: at most so many work at a time.
        overwrite: replace an existing dataset.

    Raises:
        InputError: with the documents that cannot be used (the first 1,000 of them); nothing is written then.
        WorkerDiedError: a worker process died; the same call resumes the build.
        OSError: the disk is full, for example; the same call resumes the build when there is room.
    """
    sources = [sources] if isinstance(sources, Path) else list(sources)
    plan = make_plan(sources, options, tokenizer.identity, output)
    notes = [*tokenizer.notes, *plan.notes]
    _print_notes(notes)
    with (
        unfinished_directory(output, MANIFEST_NAME, overwrite, plan.identity) as (directory, result),
        Workers(processes) as workers,
    ):
        scans = _scan(plan, directory, options.skip_bad, workers)
        require_texts(sources, scans)
        keep = _documents_to_keep(directory, scans, options.deduplicate)
        texts = TextEncoder(tokenizer if processes == 1 else None, tokenizer.files[0].parent)
        tokenized = _tokenize(plan, directory, scans, keep, texts, options, workers)
        manifest = _join(directory, result, tokenized, tokenizer)
        late = list(late_notes(options, scans, tokenized))
        _print_notes(late)
        skipped = write_skipped(result, directory, plan, tokenized)
        record = make_record(plan, scans, tokenized, skipped, tokenizer, [*notes, *late])
        record.write(result)
        for path in result.rglob("*"):
            if path.is_file() and path.suffix != ARCHIVE_SUFFIX:  # shards were flushed when they were written
                flush_to_disk(path)
    return BuildResult(manifest, record)


def _scan(plan: Plan, directory: Path, skip_bad: bool, workers: Workers) -> list[Scan]:
    scans = {number: scan for number in range(len(plan.work_units)) if (scan := load_scan(directory, number))}
    jobs = [
        ScanJob(plan.reader, work_unit, number, directory, skip_bad)
        for number, work_unit in enumerate(plan.work_units)
        if number not in scans
    ]
    num_problems = 0
    for number, scan in workers.run(scan_work_unit, jobs, None, "reading and hashing documents"):
        scans[number] = scan
        num_problems += len(scan.problems)
        if num_problems >= MAX_LISTED_PROBLEMS:
            break
    problems = [problem for number in sorted(scans) for problem in scans[number].problems]
    if problems:
        raise InputError(problems[:MAX_LISTED_PROBLEMS])
    return [scans[number] for number in sorted(scans)]


def _documents_to_keep(directory: Path, scans: list[Scan], deduplicate: bool) -> list[np.ndarray]:
    """Which documents of each work unit stay: one bool array per work unit."""
    if not deduplicate:
        return [np.ones(scan.documents, bool) for scan in scans]
    digests = np.concatenate([load_digests(directory, number) for number in range(len(scans))])
    ends = np.cumsum([scan.documents for scan in scans])
    return np.split(first_occurrences(digests), ends[:-1])


def _tokenize(
    plan: Plan,
    directory: Path,
    scans: list[Scan],
    keep: list[np.ndarray],
    texts: TextEncoder,
    options: BuildOptions,
    workers: Workers,
) -> list[TokenizedUnit]:
    """Tokenize all work units.

    What a tokenizer cannot write is known only now. Where that is skipped, later documents get other numbers, and their
    work units are done once more.
    """
    numbers = range(len(plan.work_units))
    tokenized = {number: done for number in numbers if (done := load_tokenized(directory, number))}
    first_lines = lines_before(plan, scans)
    while True:
        counts = [tokenized[n].documents if n in tokenized else int(keep[n].sum()) for n in numbers]
        first_documents = np.cumsum([0, *counts]).tolist()
        jobs = [
            TokenizeJob(
                plan.reader,
                plan.work_units[number],
                number,
                directory,
                texts,
                options.shard_bytes,
                first_documents[number],
                first_lines[number],
                scans[number].skipped_ranges,
                keep[number],
                options.skip_bad,
            )
            for number in numbers
            if number not in tokenized or tokenized[number].first_document != first_documents[number]
        ]
        if not jobs:
            return [tokenized[number] for number in numbers]
        total = sum(scans[job.number].documents for job in jobs)
        for number, done in workers.run(tokenize_work_unit, jobs, total, "tokenizing documents"):
            tokenized[number] = done


def _join(directory: Path, result: Path, tokenized: list[TokenizedUnit], tokenizer: Tokenizer) -> Manifest:
    """Number the shards of all work units consecutively, and write index and manifest. Can be repeated after a stop."""
    result.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    first_shards = []
    for number, unit in enumerate(tokenized):
        first_shards.append(len(entries))
        for shard in unit.shards:
            entry = shard | {"name": shard_name(len(entries))}
            source, target = unit_directory(directory, number) / shard["name"], result / entry["name"]
            if source.exists():  # else moved before a stop
                source.replace(target)
            if target.stat().st_size != entry["bytes"]:
                raise OSError(f"{target}: {target.stat().st_size} bytes, wrote {entry['bytes']}")
            entries.append(entry)
    indexes = (_moved_index(directory, number, first_shard) for number, first_shard in enumerate(first_shards))
    return complete_dataset(result, tokenizer, entries, indexes, max(unit.max_token_id for unit in tokenized))


def _moved_index(directory: Path, number: int, first_shard: int) -> np.ndarray:
    index = load_unit_index(directory, number)
    index["shard"] += first_shard
    return index


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print_line(f"note: {note}")
