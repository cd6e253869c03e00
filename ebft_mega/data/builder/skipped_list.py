"""`skipped.jsonl`: what a build with `--skip-bad` leaves out, a line each. Memory holds the counts only."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO

from ebft_mega.data.builder.build_record import SKIPPED_NAME
from ebft_mega.errors import Problem

# Of one work unit: further ones are counted. A dump of another kind would be listed with many times its size.
MAX_LISTED_SKIPPED = 100_000


class SkippedList:
    """Write the lines of one work unit, or of what could not be accessed; used as a context manager.

    Args:
        directory: takes the file, if there is any line.
    """

    def __init__(self, directory: Path):
        self._path = directory / SKIPPED_NAME
        self._file: IO[str] | None = None
        self.counts: Counter[str] = Counter()  # by reason

    def __enter__(self) -> "SkippedList":
        return self

    def add(self, source: str, path: str, reason: str, problem: Problem) -> None:
        """Count something that is left out, and list it unless there are too many lines.

        Args:
            source: name of the input.
            path: within it.
            reason: a few words, the same for all of a kind.
            problem: what is wrong.
        """
        self.counts[reason] += 1
        if self.counts.total() > MAX_LISTED_SKIPPED:
            return
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        place = {"source": source, "path": path, "reason": reason}
        line = place | {"key": problem.key, "found": problem.found, "expected": problem.expected}
        self._file.write(json.dumps(line, sort_keys=True) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def join_skipped(target: Path, directories: list[Path]) -> None:
    """Write one file of those in some directories, in their order; none where they have none.

    Args:
        target: the directory to write to.
        directories: of `SkippedList`s.
    """
    parts = [part for directory in directories if (part := directory / SKIPPED_NAME).is_file()]
    if not parts:
        return
    with (target / SKIPPED_NAME).open("wb") as joined:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, joined)
