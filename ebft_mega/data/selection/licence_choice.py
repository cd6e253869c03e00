"""Which documents stay by their licences: `--keep-licence` and `--drop-licence`."""

import fnmatch
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

# Why a document is left out: keys of the counts of `build.json`.
OTHER_LICENCES = "documents whose licence --keep-licence does not name"
DROPPED_LICENCES = "documents whose licence --drop-licence names"
NAMES_LICENCE = "--licence-key"  # beside the patterns that match: documents that name a licence by the key

_BETWEEN = ", "  # licences of one document


@dataclass(frozen=True)
class LicenceChoice:
    """A choice by names of licences, or shell patterns such as `GPL-*`, whatever their case.

    A document with several licences stays only if each of them may: if `keep` (where it is not empty) names each, and
    `drop` none. One that names no licence has that of its input, or "unknown".
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def given(self) -> dict[str, str]:
        """The options that choose, each with the reason by which it is counted."""
        options = {"--keep-licence": (self.keep, OTHER_LICENCES), "--drop-licence": (self.drop, DROPPED_LICENCES)}
        return {option: reason for option, (patterns, reason) in options.items() if patterns}

    def patterns(self) -> tuple[str, ...]:
        """Each pattern as `matched` names it."""
        return tuple(f"{option} {text!r}" for option in self.given() for text in self._of(option))

    def reason_to_leave_out(self, licence: str, matched: Counter[str] | None = None) -> str | None:
        """Why a document with a licence is left out; None if it stays.

        Args:
            licence: one name, or several with ", " between them.
            matched: takes each option with its pattern that matches.
        """
        reason = None
        names = licence.split(_BETWEEN)
        if self.keep:
            found = self._matching("--keep-licence", licence, matched)
            each = [self._matching("--keep-licence", name, matched) for name in names]
            reason = None if found or all(each) else OTHER_LICENCES
        if self.drop:
            found = self._matching("--drop-licence", licence, matched)
            each = [self._matching("--drop-licence", name, matched) for name in names]
            reason = reason or (DROPPED_LICENCES if found or any(each) else None)
        return reason

    def _of(self, option: str) -> tuple[str, ...]:
        return self.keep if option == "--keep-licence" else self.drop

    def _matching(self, option: str, name: str, matched: Counter[str] | None) -> bool:
        found = [text for text in self._of(option) if _compiled(text).match(name.casefold())]
        if matched is not None:
            matched.update(f"{option} {text!r}" for text in found)
        return bool(found)


@lru_cache(maxsize=1024)
def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(text.casefold()))
