"""`.gitignore` files, with the answers of git 2.39 (`git ls-files --others --exclude-standard`)."""

from pathlib import Path

import pytest

from ebft_mega.data.selection import folder_choice
from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.folder_choice import (
    IGNORE_LINKS,
    IGNORED_FILES,
    IGNORED_FOLDERS,
    FolderChoice,
    ignore_files_above,
)
from ebft_mega.data.text.listing import list_files

RULES = {
    ".gitignore": "\ufeff*.log\r\n!keep.log\nbuild/\n/only-here\n# comment\n\ndocs/**/*.html\n*.tmp  \n",
    "a/.gitignore": "!b.log\n/x/\n!build/\n",
    "a/c/.gitignore": "*\n!*/\n!*.py\n",
}
STAY = [
    *("keep.log", "a/b.log", "a/keep.log", "a/build/r.py", "a/c/d/f.py", "a/only-here", "docs/x/a.css", "x/x/a.py"),
    *("buildings", "a/c/z.py"),
]
IGNORED = [
    *("a.log", "a/a.log", "build/b.log", "build/keep.log", "b/build/x.py", "only-here", "docs/x/y/i.html", "i.tmp"),
    *("a/x/a.py", "a/c/a.log", "a/c/d/b.log", "a/c/d/e.md"),
]


def write(base: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    return base


def listed(base: Path, choice: FolderChoice) -> list[str]:
    return [file.relative_to(base).as_posix() for file in list_files(base, choice).files]


def test_nested_rules_negations_and_folders(tmp_path: Path) -> None:
    write(tmp_path, RULES | dict.fromkeys([*STAY, *IGNORED], "text"))
    assert listed(tmp_path, FolderChoice(tmp_path, FileChoice())) == sorted([*STAY, *IGNORED])
    choice = FolderChoice(tmp_path, FileChoice(), uses_gitignore=True)
    assert listed(tmp_path, choice) == sorted(STAY)
    counts = list_files(tmp_path, FolderChoice(tmp_path, FileChoice(), uses_gitignore=True)).left_out
    assert counts[IGNORED_FOLDERS] == 3 and counts[IGNORED_FILES] == 8  # build, b/build, a/x
    chosen = FolderChoice(tmp_path, FileChoice(include=("*.py",), exclude=("z.py",)), uses_gitignore=True)
    assert listed(tmp_path, chosen) == ["a/build/r.py", "a/c/d/f.py", "x/x/a.py"]
    assert chosen.matched == {"--include '*.py'": 4, "--exclude 'z.py'": 1}


def test_a_link_is_not_followed_and_what_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(tmp_path / "base", {"a.py": "", "b/a.py": "", "c/a.py": ""})
    write(tmp_path, {"rules": "*.py\n"})
    (base / ".gitignore").symlink_to("../rules")
    monkeypatch.setattr(folder_choice, "MAX_IGNORE_BYTES", 50)
    monkeypatch.setattr(folder_choice, "MAX_IGNORE_LINES", 5)
    write(base, {"b/.gitignore": "x" * 51, "c/.gitignore": "x\n" * 6})
    choice = FolderChoice(base, FileChoice(), uses_gitignore=True)
    assert listed(base, choice) == ["a.py", "b/a.py", "c/a.py"]
    assert choice.left_out == {IGNORE_LINKS: 1}
    assert sorted(problem.found for problem in choice.problems) == ["7 lines", "more than 50 bytes"]


def test_files_above_the_input_are_said(tmp_path: Path) -> None:
    write(tmp_path, {".git/HEAD": "", ".gitignore": "*.log", "a/.gitignore": "", "a/b/c.py": ""})
    assert ignore_files_above(tmp_path / "a" / "b") == [tmp_path / "a/.gitignore", tmp_path / ".gitignore"]
    assert list(FolderChoice(tmp_path / "a" / "b", FileChoice(), uses_gitignore=True).notes()) == [
        "no .gitignore in it",
        ".gitignore files of its repository that lie above it and are not read: 2",
    ]
    assert list(FolderChoice(tmp_path / "a" / "b", FileChoice()).notes()) == []
    assert ignore_files_above(tmp_path) == []
