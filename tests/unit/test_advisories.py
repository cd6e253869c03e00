"""The versions in use are not below the fixes of known advisories, and the page shows what is pinned."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.unit.test_security_promises import PAGE, rows

ROOT = Path(__file__).resolve().parents[2]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Of users: what is needed, and the extras; developers have what is pinned.
EXTRAS = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "dev" for text in texts]
REQUIREMENTS = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS]]
LOWEST = {
    canonicalize_name(requirement.name): next(part.version for part in requirement.specifier if part.operator == ">=")
    for requirement in REQUIREMENTS
}
ROWS = {canonicalize_name(row[0]): row for row in rows(PAGE, "| package | pinned | fixed in | advisories |")}


def below_a_fix(name, fix):
    """Versions of a package that are older than its fix, with where they come from."""
    found = {"constraints.txt": PINS[name], "installed": metadata.version(name), "pyproject.toml": LOWEST.get(name)}
    return {place: version for place, version in found.items() if version and Version(version) < Version(fix)}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row[2] != "none"])
def test_no_version_is_below_a_fix(name):
    assert below_a_fix(name, ROWS[name][2]) == {}


def test_the_check_of_versions_can_fail():
    assert below_a_fix("torch", "99.0").keys() == {"constraints.txt", "installed", "pyproject.toml"}


def test_the_page_shows_what_is_pinned_and_every_dependency():
    assert {name: row[1] for name, row in ROWS.items()} == {name: PINS[name] for name in ROWS}
    assert LOWEST.keys() - ROWS.keys() == set()
