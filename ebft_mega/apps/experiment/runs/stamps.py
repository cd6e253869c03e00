"""What a run or an evaluation was made from: recorded beside it before it begins, and compared ever after. No torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from ebft_mega.errors import Problem
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.records import Record, parse_record

_LONGEST_VALUE = 200
_HASH = re.compile("[0-9a-f]{64}")
SETTINGS = "settings"  # of the inputs: values by dotted key


class Start(Record):
    """One start of a job's command."""

    wall_seconds: float
    cpu_seconds: float | None  # of all its processes; None: it ended without telling
    exit_code: int | None


class Stamp(Record):
    """What a job's result is made from, and what it took so far."""

    version: Literal[1] = 1
    inputs: dict[str, Any]
    is_done: bool = False
    starts: tuple[Start, ...] = ()

    @property
    def wall_seconds(self) -> float:
        """Wall seconds of all starts together."""
        return sum(start.wall_seconds for start in self.starts)

    @property
    def cpu_seconds(self) -> float | None:
        """CPU seconds of all starts together; None where one of them is not known."""
        found = [start.cpu_seconds for start in self.starts]
        return None if None in found else sum(seconds for seconds in found if seconds is not None)


def stamp_path(output: Path) -> Path:
    """Where the stamp of what lies in a directory is: beside it, as a run's directory holds nothing of others."""
    return output.parent / f".{output.name}.json"


def read_stamp(output: Path) -> Stamp | None:
    """Read the stamp of a directory; None if there is none.

    Raises:
        BrokenCheckpointError: it is damaged.
        InputError: a newer version of this program has written it.
    """
    path = stamp_path(output)
    try:
        return parse_record(Stamp, path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_stamp(output: Path, stamp: Stamp) -> None:
    """Write the stamp of a directory, whose parents are made if needed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(stamp_path(output), (stamp.model_dump_json(indent=1) + "\n").encode())


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """sha256 of what something is made from."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def differences(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """What a result would be made from now and was not made from then.

    Args:
        name: of the run or evaluation.
        now: a value that is None is not known yet, and no difference.
    """
    plain = to_jsonable_python(dict(now))
    for key in sorted(then.keys() | plain.keys()):
        old, new = then.get(key), plain.get(key)
        if old == new or new is None:
            continue
        if key == SETTINGS and isinstance(old, dict) and isinstance(new, dict):
            for setting in sorted(old.keys() | new.keys()):
                if old.get(setting) != new.get(setting):
                    yield Problem(name, setting, _shown(new.get(setting)), f"{_shown(old.get(setting))}, as it was run")
        else:
            yield Problem(name, key, _shown(new), f"{_shown(old)}, as it was run")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if _HASH.fullmatch(text):
        return f"{text[:12]}..."
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
