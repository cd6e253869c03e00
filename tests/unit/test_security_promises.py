"""Every promise of docs/security.md names tests that exist, and every link of the page leads somewhere."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
HEADER = "| promise | test |"


def rows(text, header):
    """The cells of every row of the tables with this header."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line == header:
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    break
                yield [cell.strip() for cell in row.strip("|").split(" | ")]


@cache
def known_tests(path):
    """Names of the test functions of a file; none if there is no such file."""
    if not (ROOT / path).is_file():
        return frozenset()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_")


def unproved(text):
    """Promises without a test, and tests that do not exist."""
    for promise, *named in rows(text, HEADER):
        tests = re.findall(r"`([^`]+)`", named[0]) if len(named) == 1 else []
        if not tests:
            yield promise
        for test in tests:
            path, _, name = test.partition("::")
            if name not in known_tests(path):
                yield test


def test_every_promise_has_a_test_that_exists():
    assert len(list(rows(PAGE, HEADER))) > 20
    assert list(unproved(PAGE)) == []


def test_every_table_below_promises_is_one_of_promises():
    section = re.search(r"^## Promises\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
    heads = re.findall(r"^(\|.*)\n\|---", section, re.MULTILINE)
    assert heads and set(heads) == {HEADER}


@pytest.mark.parametrize(
    "row",
    [
        "| Nothing is promised. | |",
        "| Something is promised. | `tests/unit/test_security_promises.py::test_that_nobody_wrote` |",
        "| Something is promised. | `tests/unit/test_absent.py::test_every_promise_has_a_test_that_exists` |",
        "| Something is promised. | `tests/unit/test_security_promises.py` |",
    ],
)
def test_the_check_of_promises_can_fail(row):
    assert list(unproved(f"{HEADER}\n|---|---|\n{row}\n"))


def test_links_lead_to_sections():
    """As the host of the repository names them: lower case, hyphens, nothing else."""
    for name, anchor in re.findall(r"\]\(([a-z]*(?:\.md)?)#([a-z-]+)\)", PAGE):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8") if name else PAGE
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads], anchor
