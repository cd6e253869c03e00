"""Every wait of a test has an end: what fails must not leave a suite that hangs, in a clean-up least of all."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# Of processes, threads, events and barriers, whose first argument is a time limit or that take one by name.
WAITS = ("join", "wait", "communicate")
SUSPECT = re.compile(r"\.(?:join|wait)\(\s*(?:timeout=)?(?:None)?\s*\)|\.communicate\(")  # the others are not parsed
COLLECTIVES = ("work",)  # handles of collectives, which the process group's own time limit ends


def unbounded_waits(text: str) -> list[int]:
    """Lines of a program's calls of `join`, `wait` and `communicate` that have no time limit."""
    lines = []
    if not SUSPECT.search(text):
        return lines
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in WAITS:
            continue
        owner = node.func.value
        is_collective = isinstance(owner, ast.Call) or (isinstance(owner, ast.Name) and owner.id in COLLECTIVES)
        limits = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
        if node.func.attr != "communicate":  # whose first argument is the input
            limits += node.args
        if not is_collective and all(isinstance(limit, ast.Constant) and limit.value is None for limit in limits):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("process.join()", True),
        ("self._first.wait()", True),
        ("processes[0].wait(timeout=None)", True),
        ("process.communicate('yes')", True),
        ("process.communicate('yes', timeout=SECONDS)", False),
        ("process.wait(10)", False),
        ("', '.join(names)", False),
        ("work.wait()", False),
    ],
)
def test_waits_that_have_no_limit_are_told_from_others(text, is_found):
    assert unbounded_waits(text) == [1] * is_found


def test_every_wait_has_a_time_limit():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        for line in unbounded_waits(path.read_text(encoding="utf-8"))
    }
    assert not found
