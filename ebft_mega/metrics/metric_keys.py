"""Metric keys that depend on the configuration: one for each term of the reward."""

import re
from collections.abc import Iterable

from ebft_mega.extension.reward_term import RESERVED_NAMES

_TERM = re.compile(r"ebft/([a-z][a-z0-9_]{0,63})")


def term_key(name: str) -> str:
    """Key of the mean of a reward term."""
    return f"ebft/{name}"


def terms_among(keys: Iterable[str]) -> tuple[str, ...]:
    """Names of the reward terms that keys are of, in their order; the keys may be any text."""
    names = [match[1] for key in keys if (match := _TERM.fullmatch(key))]
    return tuple(name for name in names if name not in RESERVED_NAMES)
