"""Values of a model's `config.json`: what is refused in words, and whether a value is a count or a number. No torch."""

import math
from typing import Any, NamedTuple

MAX_COUNT = 2**31 - 1  # of a width, a vocabulary, positions


class Missing:
    """Stands where a key is not there; only its text is used."""

    def __repr__(self) -> str:
        """What a message says."""
        return "no such key"


MISSING = Missing()


class Refusal(NamedTuple):
    """A key that cannot be used as it stands."""

    key: str
    found: Any
    expected: str
    suggestion: str = ""  # nearest valid spelling of the key


def is_count(value: Any, most: int = MAX_COUNT) -> bool:
    """Whether a value is a whole number from 1 to `most`, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether a value is a finite number from `least` to `most`, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and least <= value <= most
    except OverflowError:  # a whole number that no float can hold
        return False
