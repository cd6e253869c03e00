"""Where a run stands in its data (the next row), and what must be unchanged when it resumes from there."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ebft_mega.errors import BrokenCheckpointError, InputError, Problem
from ebft_mega.io.records import Count, Record, Sha256, parse_record

STATE_VERSION: Literal[1] = 1


class SourceState(Record):
    """What a run reads from one source, and how far it has come."""

    name: str
    fingerprint: Sha256  # of the dataset
    tokenizer_sha256: Sha256
    weight: Annotated[str, Field(pattern=r"^[1-9][0-9]*(/[1-9][0-9]*)?$")]  # exact share of the rows, such as 3/10
    max_epochs: float | None
    rows: Count  # of the committed ones; follows from the other fields, and is here for people to read


class StreamState(Record):
    """All that exact resumption needs, whatever the number of ranks and workers and the global batch size."""

    version: Literal[1] = STATE_VERSION
    seed: int | None
    next_row: Count  # first row of the run that no committed step has used
    sequence_length: Annotated[int, Field(ge=1)]
    sources: tuple[SourceState, ...]
    skipped_rows: Count = 0  # of the rows before next_row, those that were damaged and became filler

    def to_json(self) -> str:
        """The state as one JSON object."""
        return self.model_dump_json()

    def sources_at(self) -> str:
        """How far each source has come, in words."""
        return ", ".join(f"row {source.rows} of {source.name}" for source in self.sources)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "data state") -> "StreamState":
        """Read what `to_json` wrote.

        Args:
            text: a JSON object.
            where: the file that it comes from, for messages.

        Raises:
            InputError: it is no such state, with all problems found.
        """
        try:
            return parse_record(cls, text, where)
        except BrokenCheckpointError as error:  # of its own it is part of none
            raise InputError(error.problems) from error


def check_resumable(saved: StreamState, current: StreamState, allow_changed: bool = False) -> list[str]:
    """Compare the data that a run has used with the data that it is about to resume with.

    Args:
        saved: the state that the run left.
        current: the state that the new stream would have at `resumed_row`.
        allow_changed: resume although something has changed; the rows are then not exactly those of the old run.

    Returns:
        What has changed and what that means, for the user; nothing has changed where it is empty.

    Raises:
        InputError: something has changed and `allow_changed` is false; lists every difference, with the saved value
            as the expected one.
    """
    changes = list(_changes(saved, current))
    if not changes:
        return []
    if not allow_changed:
        raise InputError([Problem("resuming", key, str(new), f"{old}, as before") for key, old, new in changes])
    notes = [f"{key} was {old} and is {new} now" for key, old, new in changes]
    if saved.sequence_length != current.sequence_length:
        notes.append(
            f"row {saved.next_row} of {saved.sequence_length} tokens became row {current.next_row} of "
            f"{current.sequence_length} tokens"
        )
    notes.append(f"the sources continue at {current.sources_at()}; they were left at {saved.sources_at()}")
    notes.append(_consequence({key.rsplit(".", 1)[-1] for key, _, _ in changes}, saved, current))
    return notes


def resumed_row(saved: StreamState, sequence_length: int) -> int:
    """The first row to use after a state, for rows of another length: the same number of tokens, rounded up."""
    return -(-saved.next_row * saved.sequence_length // sequence_length)


def _changes(saved: StreamState, current: StreamState) -> Iterator[tuple[str, object, object]]:
    """Key, old value and new value of everything that differs."""
    for key in ("seed", "data.sequence_length"):
        field = key.removeprefix("data.")
        old, new = getattr(saved, field), getattr(current, field)
        if old != new:
            yield key, old, new
    names, new_names = ([source.name for source in state.sources] for state in (saved, current))
    if names != new_names:
        yield "data.sources", ", ".join(names), ", ".join(new_names)
    new_sources = {source.name: source for source in current.sources}
    for old_source in saved.sources:
        new_source = new_sources.get(old_source.name)
        for key in ("fingerprint", "tokenizer_sha256", "weight", "max_epochs") if new_source else ():
            old, new = getattr(old_source, key), getattr(new_source, key)
            if old != new:
                yield _source_key(old_source.name, key), old, new


def _source_key(name: str, field: str) -> str:
    """How the configuration calls a source or one of its keys; `data.shards` alone is a source of this name."""
    source = "data.shards" if name == "shards" else f"data.sources.{name}"
    return f"{source}.{field}" if field in ("weight", "max_epochs") else f"{source} ({field})"


def _consequence(changed: set[str], saved: StreamState, current: StreamState) -> str:
    if changed == {"max_epochs"} and saved.sources_at() == current.sources_at():
        return "the rows before and those to come are the same until the first source ends"
    if changed == {"sequence_length"}:
        return (
            "documents of the current windows, and of a row beside them, may be seen twice or missed in this epoch, "
            "because rows of another length are shuffled anew"
        )
    return "documents of the current epochs may be seen twice or missed"
