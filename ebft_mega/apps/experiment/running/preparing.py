"""Make an experiment's inputs by its commands, each once. No torch."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Sequence, Set
from datetime import UTC, datetime
from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import place_of
from ebft_mega.apps.experiment.running.phases import PhaseRunner, inputs_stamp, source_fingerprint
from ebft_mega.apps.experiment.spec import Preparation
from ebft_mega.io.expanded_paths import REPOSITORY, PathTextError, expanded
from ebft_mega.lifecycle.setting_aside import DATE_FORMAT

# All that a dataset's contents depend on, below `ebft_mega/`.
DATA_CODE = ("config", "data", "extension", "io", "registry", "errors.py")
MOST_HASHED_BYTES = 2**26  # of a file that a command names


def prepare(preparations: Sequence[Preparation], runner: PhaseRunner) -> None:
    """Run the commands that make inputs, in order; what was made from the same is reused.

    What stands in the place of a result, and was made by something else, is renamed.

    Raises:
        PhaseFailed: a command failed.
    """
    code = source_fingerprint(REPOSITORY / "ebft_mega" / name for name in DATA_CODE)
    made: dict[str, str] = {}
    for each in preparations:
        output = place_of(each.makes)
        inputs = {
            "python": sys.version,
            "code": code,
            "command": list(each.run),
            "tool": source_fingerprint([REPOSITORY / each.run[0]]),
            "files": _files(each.run, made.keys() | {each.makes}),
            "prepared": {name: mark for name, mark in made.items() if any(name in word for word in each.run)},
        }
        if output.exists() and not inputs_stamp(output).exists():
            aside = output.with_name(f"{output.name}.{datetime.now(UTC):{DATE_FORMAT}}")
            runner.say(f"{output} was made by something else: it is renamed to {aside}")
            output.rename(aside)
        command = [sys.executable, *each.run]
        made[each.makes] = runner.run_once(f"prepare {each.makes}", command, output, inputs)


def _files(words: Sequence[str], made: Set[str]) -> dict[str, str]:
    """A mark of each file and directory that a command names, so that another text in its place is noticed.

    Args:
        made: places that preparations make; what they are made from has marks of its own.
    """
    found = {}
    for word in words[1:]:
        with contextlib.suppress(PathTextError):  # the tool says so
            word = expanded(word, os.environ)
        path = REPOSITORY / word
        if len(word) >= 256 or any(name in word for name in made):
            continue
        if path.is_file() and path.stat().st_size <= MOST_HASHED_BYTES:
            found[word] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not REPOSITORY.is_relative_to(path):
            found[word] = _directory_mark(path)
    return found


def _directory_mark(directory: Path) -> str:
    """One sha256 over names, sizes and times of change of all files below a directory: their contents may be large."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            stat = path.lstat()
            if not path.is_dir():
                digest.update(f"{path.relative_to(directory)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
