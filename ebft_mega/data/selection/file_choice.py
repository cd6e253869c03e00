"""Which files of an input are read, by their names and paths: `--pattern`, `--include` and `--exclude`."""

import fnmatch
from collections import Counter
from dataclasses import dataclass

from ebft_mega.data.selection.git_patterns import GitPattern, git_pattern, path_bytes
from ebft_mega.data.text.listing import OTHER_NAMES

# Why something is left out: keys of the counts of a listing, of an archive, and of `build.json`.
NOT_INCLUDED = "files that --include does not name"
EXCLUDED_FILES = "files that --exclude names"
EXCLUDED_FOLDERS = "folders that --exclude names"

MAX_PATTERN_CHARACTERS = 1000


@dataclass(frozen=True)
class FileChoice:
    """A choice among the files of an input, or the members of an archive of source.

    A file is read if its name matches `pattern`, one of `include` (where there are any) matches its path, and none of
    `exclude` does. Paths are relative to the input, with `/`; those of an archive's members begin at the archive's
    root. Include and exclude patterns are those of git: one without a slash holds at any depth, a slash within it or
    before it binds it to the input's root, one that ends with a slash is for folders, `**` crosses folders, and what
    matches a folder matches all that it holds.
    """

    pattern: str = "*"  # shell pattern on the file's name
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether anything can be left out."""
        return self != FileChoice()

    def keeps(self, path: str) -> bool:
        """Whether a file or a member of an archive is read."""
        return self.reason_to_leave_out(path) is None

    def reason_to_leave_out(self, path: str, matched: Counter[str] | None = None) -> str | None:
        """Why a file or a member of an archive is not read; None if it is.

        Args:
            path: relative to the input or to the archive.
            matched: takes each option with its pattern that matches the path.
        """
        included = _covered("--include", self.include, path, False, matched)
        excluded = _covered("--exclude", self.exclude, path, False, matched)
        if not fnmatch.fnmatchcase(path.rpartition("/")[2], self.pattern):
            return OTHER_NAMES
        if self.include and not included:
            return NOT_INCLUDED
        return EXCLUDED_FILES if excluded else None

    def reason_to_skip_folder(self, path: str, matched: Counter[str] | None = None) -> str | None:
        """Why nothing of a folder is read, whatever it holds; None if something may be.

        Args:
            path: relative to the input, without a slash at its end.
            matched: as above.
        """
        return EXCLUDED_FOLDERS if _covered("--exclude", self.exclude, path, True, matched) else None

    def given(self) -> tuple[str, ...]:
        """Each `--include` and `--exclude` as `matched` names it."""
        return tuple(_named("--include", text) for text in self.include) + tuple(
            _named("--exclude", text) for text in self.exclude
        )


def nothing_stays(choice: FileChoice, uses_gitignore: bool) -> str:
    """What is found where no file of a directory is left, and which options are the reason."""
    given = {"--include": choice.include, "--exclude": choice.exclude, "--gitignore": uses_gitignore}
    if any(given.values()):
        return f"no file that stays: {' and '.join(name for name in given if given[name])} left out everything"
    return f"no file that matches {choice.pattern!r}"


def path_pattern(text: str) -> str:
    """A pattern of `--include` or `--exclude`, unless it is none.

    Raises:
        ValueError: it says what is wrong with it.
    """
    if text.startswith("!"):
        raise ValueError("a negation; the other of --include and --exclude says it, and \\! stands for the character")
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"{len(text)} characters; at most {MAX_PATTERN_CHARACTERS} are read")
    if git_pattern(path_bytes(text)) is None:
        raise ValueError("a pattern that can match nothing")
    return text


def _covered(option: str, patterns: tuple[str, ...], path: str, is_folder: bool, matched: Counter[str] | None) -> bool:
    if matched is None:
        return any(_compiled(text).covers(path, is_folder) for text in patterns)
    found = [text for text in patterns if _compiled(text).covers(path, is_folder)]
    matched.update(_named(option, text) for text in found)
    return bool(found)


def _named(option: str, text: str) -> str:
    return f"{option} {text!r}"


def _compiled(text: str) -> GitPattern:
    pattern = git_pattern(path_bytes(text))
    if pattern is None:
        raise ValueError(f"{text!r} can match nothing")
    return pattern
