"""Text to a dataset directory, by several processes, resumed where it stopped."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.build_record import SKIPPED_NAME, BuildRecord
from ebft_mega.data.builder.deduplication import first_occurrences
from ebft_mega.data.builder.shard_writer import complete_dataset
from ebft_mega.data.builder.work_plan import ARCHIVE_SUFFIX, Plan, make_plan
from ebft_mega.data.builder.work_units import (
    MAX_LISTED_PROBLEMS,
    Scan,
    ScanJob,
    TextEncoder,
    TokenizedPart,
    TokenizeJob,
    lines_before,
    load_digests,
    load_part,
    load_part_index,
    load_scan,
    part_directory,
    scan_part,
    tokenize_part,
)
from ebft_mega.data.builder.worker_pool import Workers
from ebft_mega.data.store.format import MANIFEST_NAME, Manifest, shard_name
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.data.text.tokenizer import Tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.durable import flush_to_disk
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.output_directory import unfinished_directory

DEFAULT_SHARD_BYTES = 256 * 1024 * 1024
# Part of an unfinished build's identity: another version must not go on with it.
_BUILD_VERSION = 1


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote and what it left out."""

    manifest: Manifest
    record: BuildRecord


def build_dataset(
    sources: Path | Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    pattern: str = "*",
    text_key: str = "text",
    text_member: str = "txt",
    licence: str | None = None,
    licence_key: str | None = None,
    keep_keys: Sequence[str] = (),
    deduplicate: bool = True,
    skip_bad: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    part_bytes: int | None = None,
    processes: int = 1,
    overwrite: bool = False,
) -> BuildResult:
    """Tokenizes every document of some sources, in the order of their paths, and writes a dataset directory.

    The result depends neither on the number of processes nor on stops in between: parts are cut by the inputs
    alone, and numbers of documents and duplicates are decided over all parts before any is tokenized. The
    directory appears only when it is complete. A build that was stopped (not one that found bad input) goes on
    where it stopped when it is called again with the same inputs and options; until then its parts stay in
    `.NAME.partial` beside the output.

    Memory: about 700 bytes per input file and 90 bytes per document here, and in each worker 32 bytes per document
    of a part, 2 kB per document of a shard, and one document (for one of 10 MB, sentencepiece takes 430 MB).

    Args:
        sources: directories of text files, of JSONL files or of text webdataset shards, or such files.
        tokenizer: makes the token ids.
        output: the directory to make.
        pattern: shell pattern on the file names of directories.
        text_key: the member of a JSON line that holds the text.
        text_member: the suffix of the member of a webdataset sample that holds the text.
        licence: recorded with every document that names none; None takes it from the corpus manifest of
            `tools/build_corpus.py` in or above each source, else "unknown".
        licence_key: the member of a JSON line, or of a sample's `.json` member, that names the licence.
        keep_keys: members of the same that are copied into each document's metadata.
        deduplicate: leave out a document whose text an earlier one has, in the order of the inputs.
        skip_bad: leave out documents that cannot be used, and list them in `skipped.jsonl`. A file that cannot be
            read to its end remains an error.
        shard_bytes: bytes after which a shard is closed.
        part_bytes: input bytes of a part, see `make_plan`; part of what decides the result.
        processes: at most so many work at a time.
        overwrite: replace an existing dataset.

    Raises:
        InputError: with the documents that cannot be used (the first 1,000 of them); nothing is written then.
        WorkerDiedError: a worker process died; the same call goes on.
    """
    sources = [sources] if isinstance(sources, Path) else list(sources)
    read = ReadOptions(text_key, text_member, licence_key, tuple(keep_keys))
    options: dict[str, object] = {
        "version": _BUILD_VERSION,
        "tokenizer": tokenizer.sha256,
        "shard_bytes": shard_bytes,
        "deduplicate": deduplicate,
        "skip_bad": skip_bad,
    }
    plan = make_plan(sources, pattern, licence, read, part_bytes, options)
    with (
        unfinished_directory(output, MANIFEST_NAME, overwrite, plan.identity) as (directory, result),
        Workers(processes) as workers,
    ):
        scans = _scan(plan, directory, skip_bad, workers)
        if not sum(scan.documents for scan in scans):
            found = "no document with text"
            raise bad_input("--input", ", ".join(map(str, sources)), found, "at least one")
        keep = _documents_to_keep(directory, scans, deduplicate)
        texts = TextEncoder(tokenizer if processes == 1 else None, tokenizer.files[0].parent)
        parts = _tokenize(plan, directory, scans, keep, texts, shard_bytes, workers)
        manifest = _join(directory, result, parts, tokenizer)
        record = _record(plan, scans, keep, parts)
        record.write(result)
        _write_skipped(result, parts)
        for path in result.rglob("*"):
            if path.is_file() and path.suffix != ARCHIVE_SUFFIX:  # shards were flushed when they were written
                flush_to_disk(path)
    return BuildResult(manifest, record)


def _scan(plan: Plan, directory: Path, skip_bad: bool, workers: Workers) -> list[Scan]:
    scans = {number: scan for number in range(len(plan.parts)) if (scan := load_scan(directory, number))}
    jobs = [
        ScanJob(plan.reader, units, number, directory, skip_bad)
        for number, units in enumerate(plan.parts)
        if number not in scans
    ]
    num_problems = 0
    for number, scan in workers.run(scan_part, jobs, None, "reading and hashing documents"):
        scans[number] = scan
        num_problems += len(scan.problems)
        if num_problems >= MAX_LISTED_PROBLEMS:
            break
    problems = [problem for number in sorted(scans) for problem in scans[number].problems]
    if problems:
        raise InputError(problems[:MAX_LISTED_PROBLEMS])
    return [scans[number] for number in sorted(scans)]


def _documents_to_keep(directory: Path, scans: list[Scan], deduplicate: bool) -> list[np.ndarray]:
    """Which documents of each part stay: one bool array per part."""
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
    shard_bytes: int,
    workers: Workers,
) -> list[TokenizedPart]:
    parts = {number: part for number in range(len(plan.parts)) if (part := load_part(directory, number))}
    first_lines = lines_before(plan, scans)
    first_documents = np.cumsum([0] + [int(kept.sum()) for kept in keep])
    jobs = [
        TokenizeJob(
            plan.reader,
            units,
            number,
            directory,
            texts,
            shard_bytes,
            int(first_documents[number]),
            first_lines[number],
            keep[number],
        )
        for number, units in enumerate(plan.parts)
        if number not in parts
    ]
    total = sum(scans[job.number].documents for job in jobs)
    for number, part in workers.run(tokenize_part, jobs, total, "tokenizing documents"):
        parts[number] = part
    return [parts[number] for number in sorted(parts)]


def _join(directory: Path, result: Path, parts: list[TokenizedPart], tokenizer: Tokenizer) -> Manifest:
    """Gives the shards of all parts running numbers, and writes index and manifest. May be done again after a stop."""
    result.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    first_shards = []
    for number, part in enumerate(parts):
        first_shards.append(len(entries))
        for shard in part.shards:
            entry = shard | {"name": shard_name(len(entries))}
            source, target = part_directory(directory, number) / shard["name"], result / entry["name"]
            if source.exists():  # else moved before a stop
                source.replace(target)
            if target.stat().st_size != entry["bytes"]:
                raise OSError(f"{target}: {target.stat().st_size} bytes, wrote {entry['bytes']}")
            entries.append(entry)
    indexes = (_moved_index(directory, number, first_shard) for number, first_shard in enumerate(first_shards))
    return complete_dataset(result, tokenizer, entries, indexes, max(part.max_token_id for part in parts))


def _moved_index(directory: Path, number: int, first_shard: int) -> np.ndarray:
    index = load_part_index(directory, number)
    index["shard"] += first_shard
    return index


def _record(plan: Plan, scans: list[Scan], keep: list[np.ndarray], parts: list[TokenizedPart]) -> BuildRecord:
    documents = sum(int(kept.sum()) for kept in keep)
    files = {(unit.input, unit.name) for units in plan.parts for unit in units}
    return BuildRecord(
        input_files=dict(Counter(plan.reader.inputs[number].source for number, _ in files)),
        documents=documents,
        empty=sum(scan.empty for scan in scans),
        duplicates=sum(scan.documents for scan in scans) - documents,
        skipped=sum(len(part.bad) for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        licences=_total(part.licences for part in parts),
        sources=_total(part.sources for part in parts),
    )


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _write_skipped(result: Path, parts: list[TokenizedPart]) -> None:
    lines = [json.dumps(bad, sort_keys=True) + "\n" for part in parts for bad in part.bad]
    if lines:
        (result / SKIPPED_NAME).write_text("".join(lines), encoding="utf-8")
