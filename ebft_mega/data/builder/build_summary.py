"""What a build tells about itself when it is done: counts over its work units, what it skipped, and its last notes."""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import MAX_LISTED_LICENCES, SKIPPED_NAME, BuildRecord
from ebft_mega.data.builder.document_choice import DocumentChoice, Side
from ebft_mega.data.builder.skipped_list import MAX_LISTED_SKIPPED, SkippedList, join_skipped
from ebft_mega.data.builder.unit_files import Scan, TokenizedUnit, unit_directory
from ebft_mega.data.builder.work_plan import Plan
from ebft_mega.data.selection.file_choice import EXCLUDED_FILES, NOT_INCLUDED
from ebft_mega.data.selection.licence_choice import NAMES_LICENCE
from ebft_mega.data.text.listing import HIDDEN_FILES, OTHER_NAMES, in_words, total_counts
from ebft_mega.data.text.source_archives import COMPILED_FILES, MEMBER_LINKS
from ebft_mega.data.text.text_files import LONG_DOCUMENTS, UNREADABLE
from ebft_mega.data.tokenizers.tokenizer import Tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.input_errors import bad_input

# Why members of archives of source are left out; files are counted where they are listed.
REASONS_OF_MEMBERS = (
    *(HIDDEN_FILES, COMPILED_FILES, MEMBER_LINKS),
    *(OTHER_NAMES, NOT_INCLUDED, EXCLUDED_FILES),
)


def make_record(
    plan: Plan,
    scans: list[Scan],
    tokenized: list[TokenizedUnit],
    skipped: Mapping[str, int],
    tokenizer: Tokenizer,
    notes: list[str],
    sides: Sequence[Side],
    split: dict[str, Any],
) -> BuildRecord:
    """Add up what the work units of a build tell.

    Args:
        plan: of the build.
        scans: of all work units.
        tokenized: of all work units of the dataset, or of both datasets.
        skipped: what was left out as bad, by reason.
        tokenizer: made the token ids.
        notes: lines that the build printed.
        sides: of the choice of documents, those that were tokenized.
        split: of a build that held documents out.
    """
    files = {(file_range.input, file_range.name) for work_unit in plan.work_units for file_range in work_unit}
    licences = Counter(total_counts(unit.licences for unit in tokenized))
    listed = dict(licences.most_common(MAX_LISTED_LICENCES))
    return BuildRecord(
        input_files=dict(Counter(plan.reader.inputs[number].source for number, _ in files)),
        documents=sum(unit.documents for unit in tokenized),
        empty=sum(scan.empty for scan in scans),
        duplicates=sum(side.duplicates for side in sides),
        near_duplicates=sum(side.near_duplicates for side in sides),
        skipped=sum(skipped.values()),
        text_bytes=sum(unit.text_bytes for unit in tokenized),
        licences=listed,
        sources=total_counts(unit.sources for unit in tokenized),
        left_out=total_counts([plan.left_out, *(scan.left_out for scan in scans)]),
        followed=dict(plan.followed),
        skipped_by_reason=dict(skipped),
        encodings=total_counts(unit.encodings for unit in tokenized),
        not_round_trip=sum(unit.not_round_trip for unit in tokenized),
        unlisted_licences=licences.total() - sum(listed.values()),
        tokenizer={
            **({} if tokenizer.bos_id is None else {"begin_of_document": tokenizer.bos_id}),
            "end_of_document": tokenizer.eos_id,
            "file": tokenizer.main_file,
            "library": tokenizer.library,
            "sha256": tokenizer.sha256,
        },
        notes=tuple(notes),
        split=split,
        formats=plan.formats,
    )


def write_records(
    plan: Plan,
    scans: list[Scan],
    choice: DocumentChoice,
    tokenized: list[list[TokenizedUnit]],
    tokenizer: Tokenizer,
    notes: list[str],
    partial: Path,
    result: Path,
) -> BuildRecord:
    """Write `skipped.jsonl` of an output, its `build.json`, and that of each dataset within; the output's record.

    Args:
        plan: of the build.
        scans: of all work units.
        choice: of all documents.
        tokenized: for each side of the choice, of all work units.
        tokenizer: made the token ids.
        notes: lines that the build printed.
        partial: where the build works.
        result: the output.
    """
    numbers = range(len(plan.work_units))
    places = [unit_directory(partial / side.folder, number) for number in numbers for side in choice.sides]
    every = [unit for units in tokenized for unit in units]
    skipped = write_skipped(result, partial, plan, every, places)

    def write(directory: Path, units: list[TokenizedUnit], sides: Sequence[Side], more: dict[str, str]) -> BuildRecord:
        record = make_record(plan, scans, units, skipped, tokenizer, notes, sides, choice.split | more)
        record.write(directory)
        return record

    if choice.split:
        for side, units in zip(choice.sides, tokenized, strict=True):
            write(result / side.folder, units, [side], {"side": side.folder})
    return write(result, every, choice.sides, {})


def require_texts(sources: Sequence[Path], options: BuildOptions, plan: Plan, scans: list[Scan]) -> None:
    """Check that there is anything to tokenize, chosen by what the documents say.

    Raises:
        InputError: there is not; it says what was left out. Or licences are chosen by a key that no document has.
    """
    _require_licences(options, plan, scans)
    if not sum(scan.documents for scan in scans):
        bad = sum(scan.bad for scan in scans) + len(plan.unreadable)
        empty = {"empty documents": sum(scan.empty for scan in scans), "what cannot be used": bad}
        counts = total_counts([plan.left_out, empty, *(scan.left_out for scan in scans)])
        chosen = {**plan.reader.limits.given(), **plan.reader.licences.given()}
        choosing = [option for option, reason in chosen.items() if counts.get(reason)]
        found = "no document with text"
        if choosing:
            found = f"no document that stays: {' and '.join(choosing)} left out everything"
        found += f" (left out: {left_out})" if (left_out := in_words(counts)) else ""
        expected = "at least one" + ("; without --skip-bad it is said why they cannot be used" if bad else "")
        raise bad_input("--input", ", ".join(map(str, sources)), found, expected)


def _require_licences(options: BuildOptions, plan: Plan, scans: list[Scan]) -> None:
    """Check that some document has the key by which licences are chosen: else what is to be dropped would stay."""
    key, chosen = options.licence_key, " and ".join(options.licences.given())
    counts = total_counts(scan.left_out for scan in scans)
    texts = sum(scan.documents for scan in scans) + sum(
        counts.get(each, 0) for each in options.licences.given().values()
    )
    if key is None or not chosen or not texts or any(scan.matched.get(NAMES_LICENCE) for scan in scans):
        return
    keys = first_keys(plan)
    found = "no document with this key" + (f"; the first record has the keys {', '.join(keys)}" if keys else "")
    near = difflib.get_close_matches(key, keys, 1)
    expected = f"the key that names documents' licences, for {chosen}"
    raise InputError([Problem("--licence-key", key, found, expected, *near)])


def first_keys(plan: Plan) -> list[str]:
    """Keys of the first record of JSON lines that a build reads; none where there is no such file."""
    for work_unit in plan.work_units:
        for file_range in work_unit:
            try:
                keys = plan.reader.first_keys(file_range)
            except OSError:
                return []
            if keys is not None:
                return keys
    return []


def write_skipped(
    directory: Path, partial: Path, plan: Plan, tokenized: list[TokenizedUnit], units: Sequence[Path]
) -> dict[str, int]:
    """Write `skipped.jsonl` if anything was skipped: what could not be accessed, then documents in their order.

    Args:
        directory: the dataset, or what holds both.
        partial: where the build works.
        plan: of the build.
        tokenized: of all work units.
        units: their directories, in the order in which they are listed.

    Returns:
        How much was skipped, by reason.
    """
    bases = {source.source: source.base for source in plan.reader.inputs}
    with SkippedList(partial) as skipped:
        for source, problem in plan.unreadable:
            # What cannot be accessed is named by the place where it lies; the record names no place of the machine.
            place = Path(problem.where if problem.key == "--input" else problem.key)
            path = place.relative_to(bases[source]).as_posix() if place.is_relative_to(bases[source]) else place.name
            skipped.add(source, path, UNREADABLE, problem)
    join_skipped(directory, [partial, *units])
    return total_counts([skipped.counts, *(unit.skipped for unit in tokenized)])


def late_notes(options: BuildOptions, plan: Plan, scans: list[Scan], tokenized: list[TokenizedUnit]) -> Iterator[str]:
    """What only the texts themselves tell, one sentence each."""
    yield from _choice_notes(options, plan, scans)
    for encoding, number in total_counts(unit.encodings for unit in tokenized).items():
        documents = "1 document is" if number == 1 else f"{number} documents are"
        yield f"{documents} not UTF-8 and read as {encoding} (--encoding-fallback)"
    if long := sum(scan.left_out.get(LONG_DOCUMENTS, 0) for scan in scans):
        documents = "1 document" if long == 1 else f"{long} documents"
        verb = "is" if long == 1 else "are"
        yield f"{documents} of more than {options.max_document_bytes} bytes {verb} left out (--max-document-bytes)"
    left_out = total_counts(scan.left_out for scan in scans)
    members = {reason: number for reason, number in left_out.items() if reason in REASONS_OF_MEMBERS}
    if members:
        yield f"left out of archives: {in_words(members)}"
    if unlisted := sum(max(0, sum(unit.skipped.values()) - MAX_LISTED_SKIPPED) for unit in tokenized):
        yield f"{unlisted} that cannot be used are counted, but not listed in {SKIPPED_NAME}"
    fields = total_counts(scan.fields for scan in scans)
    for key in dict.fromkeys([*([options.licence_key] if options.licence_key else []), *options.keep_keys]):
        if not fields.get(key):
            yield f"no document has the key {key!r}"
    changed = sum(unit.not_round_trip for unit in tokenized)
    if changed:
        first = next(path for unit in tokenized for path in unit.changed)
        yield (
            f"{changed} documents do not come back exactly from their tokens: the tokenizer normalises text or lacks "
            f"characters (the first: {first})"
        )


def _choice_notes(options: BuildOptions, plan: Plan, scans: list[Scan]) -> Iterator[str]:
    """Options that choose and have changed nothing: a word may be spelt wrong."""
    matched = total_counts([plan.matched, *(scan.matched for scan in scans)])
    given = [*options.files.given(), *options.licences.patterns()]
    if unmatched := [pattern for pattern in given if not matched.get(pattern)]:
        yield f"{', '.join(unmatched)}: nothing matches"
    counts = total_counts([plan.left_out, *(scan.left_out for scan in scans)])
    chosen = {**options.limits.given(), **options.licences.given()}
    if idle := [option for option, reason in chosen.items() if not counts.get(reason)]:
        yield f"{', '.join(idle)}: nothing is left out"
