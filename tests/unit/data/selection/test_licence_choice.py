"""Licences to keep and to drop."""

from collections import Counter

import pytest

from ebft_mega.data.selection.licence_choice import DROPPED_LICENCES, OTHER_LICENCES, LicenceChoice


@pytest.mark.parametrize(
    ("keep", "drop", "licence", "reason"),
    [
        ((), (), "GPL-3.0", None),
        (("MIT", "apache-2.0"), (), "mit", None),
        (("MIT", "apache-2.0"), (), "Apache-2.0", None),
        (("MIT",), (), "MIT-0", OTHER_LICENCES),
        (("BSD-*",), (), "bsd-3-clause", None),
        (("MIT",), (), "unknown", OTHER_LICENCES),  # a document that names none
        (("MIT", "unknown"), (), "unknown", None),
        (("MIT",), (), "MIT, GPL-3.0", OTHER_LICENCES),  # each of them must be allowed
        (("MIT", "GPL-*"), (), "MIT, GPL-3.0", None),
        (("MIT, GPL-3.0",), (), "MIT, GPL-3.0", None),
        ((), ("GPL-*",), "gpl-2.0", DROPPED_LICENCES),
        ((), ("GPL-*",), "MIT, GPL-3.0", DROPPED_LICENCES),
        ((), ("GPL-*",), "unknown", None),
        ((), ("GPL-*", "unknown"), "unknown", DROPPED_LICENCES),
        (("GPL-*",), ("GPL-3*",), "GPL-3.0", DROPPED_LICENCES),
        (("GPL-*",), ("GPL-3*",), "GPL-2.0", None),
    ],
)
def test_which_stay(keep: tuple[str, ...], drop: tuple[str, ...], licence: str, reason: str | None) -> None:
    assert LicenceChoice(keep, drop).reason_to_leave_out(licence) == reason


def test_what_has_matched_is_counted() -> None:
    choice, matched = LicenceChoice(("MIT", "Apache"), ("GPL-*",)), Counter[str]()
    for licence in ("MIT", "GPL-3.0"):
        choice.reason_to_leave_out(licence, matched)
    assert set(choice.patterns()) - set(matched) == {"--keep-licence 'Apache'"}
    assert set(choice.given()) == {"--keep-licence", "--drop-licence"}
