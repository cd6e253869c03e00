"""Parse JSON text of which every reader makes the same: no key twice, no NaN, no number beyond all bounds."""

import json
import math
import re
from collections import Counter
from typing import Any

MAX_DIGITS = 40  # of an integer: Hugging Face writes some of 31
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # no other way leads to one


def parse_json(text: str, half_pairs: bool = False) -> Any:
    """Parse JSON that leaves no choice to its reader.

    Args:
        text: all of it.
        half_pairs: take texts with half of a surrogate pair, too, which cannot be written as UTF-8.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: an object has a key more than once, a number is NaN, infinite or an integer of more than
            `MAX_DIGITS` digits, or a text has half of a surrogate pair.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(
        text,
        object_pairs_hook=_with_single_keys,
        parse_constant=_refuse_constant,
        parse_int=_bounded_integer,
        parse_float=_finite_number,
    )
    if not half_pairs and _HALF_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; of equal ones, readers would take different values."""
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        repeated = next(name for name in values if times[name] > 1)
        raise ValueError(f"the key {repeated!r} more than once")
    return values


def _bounded_integer(digits: str) -> int:
    # The first question alone for nearly all: a vocabulary has 150,000 of them.
    if len(digits) > MAX_DIGITS and (count := len(digits.removeprefix("-"))) > MAX_DIGITS:
        raise ValueError(f"an integer of {count} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:MAX_DIGITS]}, which is beyond the numbers of 64 bits")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not JSON")
