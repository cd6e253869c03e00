"""`build.json`, the record of how a dataset was made. It is for people: no reader of the dataset uses it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

BUILD_RECORD_NAME = "build.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class BuildRecord:
    """Counts of a build. Holds no path of the machine and no time, so a rebuild gives the same bytes."""

    input_files: dict[str, int]  # by source
    documents: int  # in the dataset
    empty: int  # left out: no text
    duplicates: int  # left out: the same text came before
    skipped: int  # left out with --skip-bad, listed in `skipped.jsonl`
    text_bytes: int  # of the documents in the dataset, as UTF-8
    licences: dict[str, int]  # documents of each
    sources: dict[str, int]  # documents of each

    def write(self, directory: Path) -> None:
        """Write `build.json`."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        (directory / BUILD_RECORD_NAME).write_text(text, encoding="utf-8")


def read_build_record(directory: Path) -> BuildRecord | None:
    """The record of a dataset directory; None if it has none that can be read, for nothing depends on it."""
    try:
        return BuildRecord(**json.loads((directory / BUILD_RECORD_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
