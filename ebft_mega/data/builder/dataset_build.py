"""Build a dataset directory from text with several processes; resume a build that was stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebft_mega.data.builder.build_options import DEFAULT_BUILD_OPTIONS, BuildOptions
from ebft_mega.data.builder.build_record import BuildRecord
from ebft_mega.data.builder.build_summary import late_notes, require_texts, write_records
from ebft_mega.data.builder.document_choice import Side, choose_documents, needs_signatures, split_of
from ebft_mega.data.builder.scanning import MAX_LISTED_PROBLEMS, ScanJob, scan_work_unit
from ebft_mega.data.builder.shard_writer import join_units
from ebft_mega.data.builder.tokenizing import TextEncoder, TokenizeJob, lines_before, tokenize_work_unit
from ebft_mega.data.builder.unit_files import (
    Scan,
    TokenizedUnit,
    load_scan,
    load_tokenized,
)
from ebft_mega.data.builder.work_plan import Plan, make_plan
from ebft_mega.data.builder.worker_pool import Workers
from ebft_mega.data.selection.held_out_split import TRAIN, SplitOptions
from ebft_mega.data.store.format import MANIFEST_NAME, SHARD_SUFFIX, Manifest
from ebft_mega.data.tokenizers.tokenizer import Tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.durable import flush_to_disk
from ebft_mega.io.output_directory import unfinished_directory
from ebft_mega.io.standard_streams import print_line


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote and what it left out."""

    manifest: Manifest  # of the dataset for training, where documents are held out
    record: BuildRecord  # of the whole build
    held_out: tuple[Manifest, ...] = ()  # of each held-out dataset


@dataclass(frozen=True)
class _Work:
    """What a build does with every dataset that it makes."""

    plan: Plan
    options: BuildOptions
    scans: list[Scan]
    directory: Path  # of the scans
    texts: TextEncoder
    workers: Workers


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
    directory appears only when it is complete. With `options.split` it holds `train` and `held-out`, or other names of
    the latter, which appear together. A build that was stopped (not one that found bad input) is resumed when it is
    called again with the same inputs and options; until then what is done stays in `.NAME.partial` beside the output.

    Memory: about 700 bytes per input file and 110 bytes per document here, and in each worker 32 bytes per document
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
    split = split_of(plan, options)
    notes = [*tokenizer.notes, *plan.notes]
    with (
        unfinished_directory(output, _marker(output, options), overwrite, plan.identity) as (directory, result),
        Workers(processes, options.prepare_process()) as workers,
    ):
        _print_start(tokenizer, notes)
        scans = _scan(plan, directory, options, split, workers)
        require_texts(sources, options, plan, scans)
        choice = choose_documents(directory, scans, options, split)
        _print_notes(choice.notes)
        texts = TextEncoder.of(tokenizer, is_shared=processes > 1)
        work = _Work(plan, options, scans, directory, texts, workers)
        tokenized = [_tokenize(work, side, number == 0) for number, side in enumerate(choice.sides)]
        manifests = [
            join_units(directory / side.folder, result / side.folder, units, tokenizer)
            for side, units in zip(choice.sides, tokenized, strict=True)
        ]
        late = list(late_notes(options, plan, scans, [unit for units in tokenized for unit in units]))
        _print_notes(late)
        notes += [*choice.notes, *late]
        record = write_records(plan, scans, choice, tokenized, tokenizer, notes, directory, result)
        _flush(result)
    return BuildResult(manifests[0], record, tuple(manifests[1:]))


def _flush(result: Path) -> None:
    for path in result.rglob("*"):
        if path.is_file() and path.suffix != SHARD_SUFFIX:  # shards were flushed when they were written
            flush_to_disk(path)


def _marker(output: Path, options: BuildOptions) -> str:
    """A file by which an output is known as made by this tool, whether it held documents out or not."""
    usual, split = MANIFEST_NAME, f"{TRAIN}/{MANIFEST_NAME}"
    known = [name for name in (usual, split) if (output / name).is_file()]
    return known[0] if known else (split if options.split else usual)


def _scan(
    plan: Plan, directory: Path, options: BuildOptions, split: SplitOptions | None, workers: Workers
) -> list[Scan]:
    scans = {number: scan for number in range(len(plan.work_units)) if (scan := load_scan(directory, number))}
    is_all = sum(map(len, plan.work_units)) == 1
    jobs = [
        ScanJob(plan.reader, work_unit, number, directory, options.skip_bad, split, needs_signatures(options), is_all)
        for number, work_unit in enumerate(plan.work_units)
        if number not in scans
    ]
    num_problems = 0
    for number, scan in workers.run(scan_work_unit, jobs, None, "reading and hashing documents"):
        scans[number] = scan
        num_problems += len(scan.problems)
        if num_problems >= MAX_LISTED_PROBLEMS:
            break
    # A fault of a whole file is found in each work unit that reads a part of it.
    problems = list(dict.fromkeys(problem for number in sorted(scans) for problem in scans[number].problems))
    if problems:
        if len(problems) >= MAX_LISTED_PROBLEMS:
            print_line(f"note: reading ends at {MAX_LISTED_PROBLEMS} problems; there may be more")
        raise InputError(problems[:MAX_LISTED_PROBLEMS])
    return [scans[number] for number in sorted(scans)]


def _tokenize(work: _Work, side: Side, lists_bad: bool) -> list[TokenizedUnit]:
    """Tokenize all work units for one dataset.

    What a tokenizer cannot write is known only now. Where that is skipped, later documents get other numbers, and their
    work units are done once more.
    """
    plan, keep, scans, directory = work.plan, side.keep, work.scans, work.directory / side.folder
    directory.mkdir(exist_ok=True)
    numbers = range(len(plan.work_units))
    tokenized = {number: done for number in numbers if (done := load_tokenized(directory, number))}
    first_lines = lines_before(plan, scans)
    what = f"tokenizing documents{f' ({side.folder})' if side.folder else ''}"
    while True:
        counts = [tokenized[n].documents if n in tokenized else int(keep[n].sum()) for n in numbers]
        first_documents = np.cumsum([0, *counts]).tolist()
        jobs = [
            TokenizeJob(
                plan.reader,
                plan.work_units[number],
                number,
                directory,
                work.texts,
                work.options.shard_bytes,
                first_documents[number],
                first_lines[number],
                scans[number].skipped_ranges,
                keep[number],
                work.options.skip_bad,
                work.directory,
                lists_bad,
            )
            for number in numbers
            if number not in tokenized or tokenized[number].first_document != first_documents[number]
        ]
        if not jobs:
            return [tokenized[number] for number in numbers]
        total = sum(scans[job.number].documents for job in jobs if lists_bad or job.keep.any())
        for number, done in work.workers.run(tokenize_work_unit, jobs, total, what):
            tokenized[number] = done


def _print_start(tokenizer: Tokenizer, notes: Sequence[str]) -> None:
    for name, token in (("end", tokenizer.eos_id), ("begin", tokenizer.bos_id)):
        if token is not None:
            print_line(f"{name} of document: {token} {tokenizer.spelling(token)!r}")
    _print_notes(notes)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print_line(f"note: {note}")
