"""Which files and folders below a folder are read: a `FileChoice`, and the `.gitignore` files on request."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.git_patterns import GitPattern, git_pattern
from ebft_mega.data.text.bounded_reading import read_at_most
from ebft_mega.errors import Problem
from ebft_mega.io.parse_boundary import words_of

IGNORE_FILE = ".gitignore"
# Why something is left out: keys of the counts of a listing and of `build.json`.
IGNORED_FILES = f"files that {IGNORE_FILE} names"
IGNORED_FOLDERS = f"folders that {IGNORE_FILE} names"
IGNORE_LINKS = f"links named {IGNORE_FILE}"

MAX_IGNORE_BYTES = 256 << 10
MAX_IGNORE_LINES = 10_000


class FolderChoice:
    """What of a folder is read; told of each folder before it is asked about what that holds.

    As in git, the last line that matches decides, a deeper `.gitignore` before those above it, and what a folder that
    is left out holds is not looked at. Those above the input are not read, nor is one that is a link.
    """

    def __init__(self, base: Path, choice: FileChoice, uses_gitignore: bool = False):
        self.matched: Counter[str] = Counter()  # options with their patterns
        self.left_out: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.num_ignore_files = 0
        self._base = base
        self._choice = choice
        self._uses_gitignore = uses_gitignore
        # Of each folder: its own rules and those above it, each with the length of its folder's path.
        self._rules: dict[str, tuple[tuple[int, tuple[GitPattern, ...]], ...]] = {}

    def enter(self, folder: str, names: Iterable[str]) -> None:
        """Take note of a folder.

        Args:
            folder: its path relative to the base, with a slash at its end; empty for the base itself.
            names: of all in it that is no folder.
        """
        if not self._uses_gitignore:
            return
        above = folder[: folder.rstrip("/").rfind("/") + 1]
        rules = self._rules.get(above, ()) if folder else ()
        if IGNORE_FILE in names:
            rules = (*rules, (len(folder), self._read(self._base / folder / IGNORE_FILE)))
        self._rules[folder] = rules

    def reason_to_leave_out(self, path: str) -> str | None:
        """Why a file is not read; None if it is."""
        reason = self._choice.reason_to_leave_out(path, self.matched)
        return reason or (IGNORED_FILES if self._ignores(path, is_folder=False) else None)

    def reason_to_skip_folder(self, path: str) -> str | None:
        """Why nothing of a folder is read; None if something may be."""
        reason = self._choice.reason_to_skip_folder(path, self.matched)
        return reason or (IGNORED_FOLDERS if self._ignores(path, is_folder=True) else None)

    def notes(self) -> Iterator[str]:
        """What a person should know of the `.gitignore` files, one sentence each."""
        if self._uses_gitignore and not self.num_ignore_files:
            yield f"no {IGNORE_FILE} in it"
        if self._uses_gitignore and (above := ignore_files_above(self._base)):
            yield f"{IGNORE_FILE} files of its repository that lie above it and are not read: {len(above)}"

    def _ignores(self, path: str, is_folder: bool) -> bool:
        folder = path[: path.rfind("/") + 1]
        for length, patterns in reversed(self._rules.get(folder, ())):
            for pattern in reversed(patterns):
                if pattern.matches(path[length:], is_folder):
                    return not pattern.negated
        return False

    def _read(self, file: Path) -> tuple[GitPattern, ...]:
        if file.is_symlink():
            self.left_out[IGNORE_LINKS] += 1
            return ()
        self.num_ignore_files += 1
        expected = f"at most {MAX_IGNORE_BYTES} bytes and {MAX_IGNORE_LINES} lines"
        try:
            content = read_at_most(file, MAX_IGNORE_BYTES)
        except OSError as error:
            self.problems.append(Problem(str(file), "--gitignore", words_of(error), "a file that can be read"))
            return ()
        lines = () if content is None else content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        if content is None or len(lines) > MAX_IGNORE_LINES:
            found = f"more than {MAX_IGNORE_BYTES} bytes" if content is None else f"{len(lines)} lines"
            self.problems.append(Problem(str(file), "--gitignore", found, expected))
            return ()
        return tuple(pattern for line in lines if (pattern := git_pattern(line.removesuffix(b"\r"))))


def ignore_files_above(base: Path) -> list[Path]:
    """The `.gitignore` files between a folder and the root of the repository in which it lies, which are not read."""
    found: list[Path] = []
    above = base.absolute()
    while not (above / ".git").exists():
        if above == above.parent:
            return []  # in no repository
        above = above.parent
        if (above / IGNORE_FILE).is_file():
            found.append(above / IGNORE_FILE)
    return found
