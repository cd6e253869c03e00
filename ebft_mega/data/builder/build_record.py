"""`build.json`, the record of how a dataset was made. It is for people: no reader of the dataset uses it."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ebft_mega.errors import InputError
from ebft_mega.io.contained_files import read_contained_json

BUILD_RECORD_NAME = "build.json"
SKIPPED_NAME = "skipped.jsonl"
MAX_LISTED_LICENCES = 1000  # documents name their licences themselves, and could all name another one


@dataclass(frozen=True)
class BuildRecord:
    """Counts of a build. Holds no path of the machine and no time, so a rebuild gives the same bytes."""

    input_files: dict[str, int]  # by source
    documents: int  # in the dataset
    empty: int  # left out: no text
    duplicates: int  # left out: the same text came before
    skipped: int  # left out with --skip-bad, listed in `skipped.jsonl`
    text_bytes: int  # of the documents in the dataset, as UTF-8
    licences: dict[str, int]  # documents of each of the `MAX_LISTED_LICENCES` most frequent
    sources: dict[str, int]  # documents of each
    # What follows is empty in the records of earlier builds.
    left_out: dict[str, int] = field(default_factory=dict)  # files, folders, blank lines, ... by reason
    followed: dict[str, int] = field(default_factory=dict)  # links to files
    skipped_by_reason: dict[str, int] = field(default_factory=dict)  # `skipped`, folders and files each as one
    encodings: dict[str, int] = field(default_factory=dict)  # documents that are not UTF-8, by encoding
    not_round_trip: int = 0  # documents in the dataset whose tokens do not give back their text exactly
    unlisted_licences: int = 0  # documents of all other licences
    tokenizer: dict[str, Any] = field(default_factory=dict)  # file that is used, library, end-of-document token
    notes: tuple[str, ...] = ()  # the lines that the build printed
    near_duplicates: int = 0  # left out: nearly the same as an earlier document
    split: dict[str, Any] = field(default_factory=dict)  # of a build that held documents out, see `SplitOptions`
    # What was said about formats, and the plugins in use with the sha256 of their code; absent where there is nothing.
    formats: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write `build.json`."""
        values = {key: value for key, value in asdict(self).items() if key != "formats" or value}
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        (directory / BUILD_RECORD_NAME).write_text(text, encoding="utf-8")


def read_build_record(directory: Path) -> BuildRecord | None:
    """The record of a dataset directory; None if it has none that can be read, for nothing depends on it."""
    try:
        known = {field.name for field in fields(BuildRecord)}
        content = read_contained_json(directory, BUILD_RECORD_NAME, "the record of a build")
        values = {key: value for key, value in content.items() if key in known}
        return BuildRecord(**values | {"notes": tuple(values.get("notes", ()))})
    except (InputError, TypeError, AttributeError):
        return None
