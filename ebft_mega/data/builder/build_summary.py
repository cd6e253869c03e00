"""What a build tells about itself when it is done: counts over its work units, what it skipped, and its last notes."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import SKIPPED_NAME, BuildRecord
from ebft_mega.data.builder.work_plan import Plan
from ebft_mega.data.builder.work_units import Scan, TokenizedUnit, skipped_entry
from ebft_mega.data.text.listing import total_counts
from ebft_mega.data.text.text_files import UNREADABLE
from ebft_mega.data.text.tokenizer import Tokenizer


def make_record(
    plan: Plan,
    scans: list[Scan],
    tokenized: list[TokenizedUnit],
    skipped: list[dict[str, str]],
    tokenizer: Tokenizer,
    notes: list[str],
) -> BuildRecord:
    """Add up what the work units of a build tell.

    Args:
        plan: of the build.
        scans: of all work units.
        tokenized: of all work units.
        skipped: lines of `skipped.jsonl`.
        tokenizer: made the token ids.
        notes: lines that the build printed.
    """
    documents = sum(shard["documents"] for unit in tokenized for shard in unit.shards)
    files = {(file_range.input, file_range.name) for work_unit in plan.work_units for file_range in work_unit}
    return BuildRecord(
        input_files=dict(Counter(plan.reader.inputs[number].source for number, _ in files)),
        documents=documents,
        empty=sum(scan.empty for scan in scans),
        duplicates=sum(scan.documents for scan in scans) - documents,
        skipped=len(skipped),
        text_bytes=sum(unit.text_bytes for unit in tokenized),
        licences=total_counts(unit.licences for unit in tokenized),
        sources=total_counts(unit.sources for unit in tokenized),
        left_out=total_counts([plan.left_out, *(scan.left_out for scan in scans)]),
        followed=dict(plan.followed),
        skipped_by_reason=dict(Counter(entry["reason"] for entry in skipped)),
        not_round_trip=sum(unit.not_round_trip for unit in tokenized),
        tokenizer={
            "end_of_document": tokenizer.eos_id,
            "file": tokenizer.main_file,
            "library": tokenizer.library,
            "sha256": tokenizer.sha256,
        },
        notes=tuple(notes),
    )


def write_skipped(directory: Path, plan: Plan, tokenized: list[TokenizedUnit]) -> list[dict[str, str]]:
    """Write `skipped.jsonl` if anything was skipped: what could not be accessed, then documents in their order.

    Returns:
        Its lines.
    """
    bases = {source.source: source.base for source in plan.reader.inputs}
    entries = []
    for source, problem in plan.unreadable:
        # What cannot be accessed is named by the place where it lies; the record names no place of the machine.
        place = Path(problem.where if problem.key == "--input" else problem.key)
        path = place.relative_to(bases[source]).as_posix() if place.is_relative_to(bases[source]) else place.name
        entries.append(skipped_entry(source, path, UNREADABLE, problem))
    entries += [bad for unit in tokenized for bad in unit.bad]
    lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in entries]
    if lines:
        (directory / SKIPPED_NAME).write_text("".join(lines), encoding="utf-8")
    return entries


def late_notes(options: BuildOptions, scans: list[Scan], tokenized: list[TokenizedUnit]) -> Iterator[str]:
    """What only the texts themselves tell, one sentence each."""
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
