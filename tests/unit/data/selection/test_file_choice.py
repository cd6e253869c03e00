"""`--pattern`, `--include` and `--exclude`."""

from collections import Counter

import pytest

from ebft_mega.data.selection.file_choice import (
    EXCLUDED_FILES,
    EXCLUDED_FOLDERS,
    MAX_PATTERN_CHARACTERS,
    NOT_INCLUDED,
    FileChoice,
    path_pattern,
)
from ebft_mega.data.text.listing import OTHER_NAMES


def test_pattern_include_and_exclude_together() -> None:
    choice = FileChoice("*.py", include=("src", "/tools/*.py"), exclude=("tests/", "*_pb2.py"))
    paths = {
        "src/a.py": None,
        "x/src/y/a.py": None,
        "tools/a.py": None,
        "tools/x/a.py": NOT_INCLUDED,
        "setup.py": NOT_INCLUDED,
        "src/a.md": OTHER_NAMES,
        "src/tests/a.py": EXCLUDED_FILES,
        "src/a_pb2.py": EXCLUDED_FILES,
        "src/tests.py": None,
    }
    assert {path: choice.reason_to_leave_out(path) for path in paths} == paths
    assert [path for path in paths if choice.keeps(path)] == [path for path, reason in paths.items() if reason is None]
    assert choice.reason_to_skip_folder("src/tests") == EXCLUDED_FOLDERS
    assert choice.reason_to_skip_folder("src") is None and choice.reason_to_skip_folder("docs") is None
    assert choice.chooses and not FileChoice().chooses and FileChoice().keeps("a/b")


def test_what_has_matched_is_counted() -> None:
    choice = FileChoice(include=("*.py", "*.md"), exclude=("x/", "gone"))
    matched = Counter[str]()
    choice.reason_to_skip_folder("x", matched)
    choice.reason_to_leave_out("a.py", matched)
    choice.reason_to_leave_out("b.py", matched)
    assert matched == {"--exclude 'x/'": 1, "--include '*.py'": 2}
    assert set(choice.given()) - set(matched) == {"--include '*.md'", "--exclude 'gone'"}


@pytest.mark.parametrize("text", ["", "#a", "/", "!a", "a[", "a\\", "a" * (MAX_PATTERN_CHARACTERS + 1)])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        path_pattern(text)
    assert path_pattern("src/**/*.py") == "src/**/*.py"
