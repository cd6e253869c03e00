"""The package's exceptions and the exit code of each."""

from dataclasses import dataclass, replace

from ebft_mega.shown_text import LONGEST_PATH, shown

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_HANG = 3
EXIT_DAMAGED_DATA = 4
EXIT_STOPPED = 75
EXIT_UNREAD = 141  # of a tool whose output nobody reads any more: what a shell makes of SIGPIPE
# Characters of a message. Lists of what is valid are long.
_LONGEST_FOUND = 1000
_LONGEST_EXPECTED = 4000
_LONGEST_MESSAGE = 8000

MAX_SHOWN_PROBLEMS = 50
# More problems that differ in nothing but their places are one line with so many of these.
_SHOWN_PLACES = 3


class EbftError(Exception):
    """Base of the package's own errors. As text they are one line, with escapes for what a terminal would obey."""

    exit_code = EXIT_FAILED

    def __str__(self) -> str:
        return shown(super().__str__(), _LONGEST_MESSAGE)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration or an input, in words that a user can act on.

    `where` is `file:line` (or the command-line option), `key` the full dotted key or the path in question,
    `found` and `expected` say what stands there and what would be valid, `suggestion` the nearest valid spelling.
    As text it is one line, with escapes for what a terminal would obey.
    """

    where: str
    key: str
    found: str
    expected: str
    suggestion: str = ""

    def __str__(self) -> str:
        place, key = shown(self.where, LONGEST_PATH), shown(self.key, LONGEST_PATH)
        found, expected = shown(self.found, _LONGEST_FOUND), shown(self.expected, _LONGEST_EXPECTED)
        text = f"{place}: {key}: found {found}; expected {expected}"
        return f"{text}. Did you mean {shown(repr(self.suggestion))}?" if self.suggestion else text

    def within(self, where: str) -> "Problem":
        """The same problem, found on behalf of another place: the configuration key that names the file, say."""
        return replace(self, where=f"{where}: {self.where}")


def problem_lines(problems: "list[Problem] | tuple[Problem, ...]") -> list[str]:
    """One line for each problem, and one for many that differ only in their places, with number and examples.

    Args:
        problems: lines are in the order of the first problem of each.
    """
    places: dict[Problem, list[Problem]] = {}
    for problem in problems:
        places.setdefault(replace(problem, where=""), []).append(problem)
    lines = []
    for equal in places.values():
        if len(equal) <= _SHOWN_PLACES:
            lines += [str(problem) for problem in equal]
            continue
        others = ", ".join(shown(problem.where, LONGEST_PATH) for problem in equal[1:_SHOWN_PLACES])
        lines.append(f"{equal[0]} ({len(equal)} times; also at {others}, ...)")
    return lines


class InputProblems(EbftError):
    """Several problems at once, found before anything has started (exit code 2). As text, see `problem_lines`."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: "list[Problem] | tuple[Problem, ...]"):
        self.problems = tuple(problems)
        super().__init__(self.problems)  # what pickling between processes hands to the constructor again

    def __str__(self) -> str:
        lines = problem_lines(self.problems)
        more = len(lines) - MAX_SHOWN_PROBLEMS
        return "\n".join([*lines[:MAX_SHOWN_PROBLEMS], *[f"and {more} more problems"] * (more > 0)])


class ConfigError(InputProblems):
    """The configuration is wrong."""


class PluginError(ConfigError):
    """The configuration is wrong, and among that is a plugin: every machine says it, since others may have the file."""


class InputError(InputProblems):
    """A file that the run needs (data set, tokenizer, model) is missing, damaged or of another kind."""


class SurroundingsError(InputProblems):
    """What surrounds this process is wrong: its launcher's variables, its locale, the port at which ranks meet.

    Other ranks may have found nothing, so every machine says it.
    """


class BrokenCheckpointError(InputProblems):
    """A checkpoint folder is not whole, or its files are not those that were written."""


class CheckpointError(EbftError):
    """A checkpoint could not be written, and the run cannot end or continue without it."""


class LockLostError(EbftError):
    """Another run has taken the run directory over, because this one gave no sign of life."""


class DirectoryLostError(EbftError):
    """The run directory was removed or renamed while the run was running, and no outcome can be recorded in it."""


class ResultsLostError(EbftError):
    """A run has come to its end, and something of what it leaves is missing or damaged."""


class DamagedDataError(EbftError):
    """Data that passed the checks before the run is damaged, truncated, missing or unreachable when read (exit code 4).

    Args:
        shard: path or URL of the file.
        offset: byte in it; None where no place can be named.
        expected, found: what the index says and what is there.
        document: number of the document in its dataset; None where it is not known.
    """

    exit_code = EXIT_DAMAGED_DATA

    def __init__(self, shard: str, offset: int | None, expected: str, found: str, document: int | None = None):
        # All arguments go to the base, so that the error survives pickling between processes.
        super().__init__(shard, offset, expected, found, document)
        self.shard, self.offset, self.expected, self.found, self.document = shard, offset, expected, found, document

    def __str__(self) -> str:
        place = [self.shard]
        place += [f"offset {self.offset}"] * (self.offset is not None)
        place += [f"document {self.document}"] * (self.document is not None)
        text = f"{': '.join(place)}: expected {self.expected}, found {self.found}"
        return shown(text, _LONGEST_MESSAGE)


class UnreachableDataError(DamagedDataError):
    """No answer of a server to any attempt, or one that says to try again later; another time it may have one."""


class SkipBudgetError(EbftError):
    """Damaged data made the run skip more rows than the configuration allows (exit code 4)."""

    exit_code = EXIT_DAMAGED_DATA


class PeerFailedError(EbftError):
    """Another rank failed or was stopped first, and this one lost its connection; both end with the same code."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        ended = "was stopped during the start" if exit_code == EXIT_STOPPED else f"failed with exit code {exit_code}"
        super().__init__(f"another rank {ended}")


class PeerLostError(EbftError):
    """Another rank has ended without leaving an outcome, and this one lost its connection to it."""

    def __init__(self) -> None:
        super().__init__("another rank has ended, and this one lost its connection to it; logs/ says where it was")


class FirstRankFailedError(EbftError):
    """What the first rank does for all of them failed there, and the others end with it."""


class ForeignMessageError(EbftError):
    """What another rank has sent is no message of this program: not of this version of it, or of somebody else."""


class OutOfMemoryError(EbftError):
    """There was not enough memory, on the device or in the machine."""


class ShortageError(EbftError):
    """The machine or this process has too few file descriptors or too little shared memory."""


class EntryError(EbftError):
    """An entry (a reward term, a schedule, an optimizer, ...) does what its contract rules out.

    Args: a `Problem`: the entry's file and line, the configuration key that names it, what it does and should do.
    """


class NonFiniteStepError(EbftError):
    """Too many steps in a row had a loss or gradient that is not finite."""
