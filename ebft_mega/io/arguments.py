"""A command line on which no option is given twice, and no number is beyond its bounds."""

import argparse
import errno
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ebft_mega.io.expanded_paths import PathTextError, expanded
from ebft_mega.shown_text import LONGEST_PATH, shown

MOST = 1 << 40  # of anything that an option counts
# A name that no file can have, and a link that leads back to itself.
NAMES_OF_NOTHING = (errno.ENAMETOOLONG, errno.ELOOP)
# Actions that add to what was given before.
_REPEATABLE = ("_AppendAction", "_ExtendAction", "_CountAction")


class PlainParser(argparse.ArgumentParser):
    """The standard parser, whose errors quote what the user has typed; this one quotes it as a harmless line."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and a message, and end the process with exit code 2."""
        super().error(shown(message, LONGEST_PATH))


class ToolParser(PlainParser):
    """The standard parser, which lets the last of two contradicting options win; this one refuses the second."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as the standard parser does, which calls this for the arguments of subcommands, too.

        Args:
            args: the command line; the process's own if None.
            namespace: takes the values; a new one if None.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        given = arguments[: arguments.index("--")] if "--" in arguments else arguments
        counts = Counter(name for argument in given if (name := self._single_option(argument)))
        for name, count in counts.items():
            if count > 1:
                self.error(f"{name}: found {count} times; expected at most once")
        return super().parse_known_args(arguments, namespace)

    def _single_option(self, argument: str) -> str | None:
        """Name of the option that an argument is, shortened or not, if it may be given once only."""
        if not argument.startswith("--"):
            return None
        name = argument.partition("=")[0]
        known = self._option_string_actions
        actions = {
            id(known[each]): known[each] for each in ([name] if name in known else known) if each.startswith(name)
        }
        if len(actions) != 1:
            return None
        (action,) = actions.values()
        return None if type(action).__name__ in _REPEATABLE else action.option_strings[0]


def whole_number(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""

    def read(text: str) -> int:
        # Python refuses to read an integer of thousands of digits.
        if re.fullmatch(r"[-+]?[0-9]{1,20}", text) and least <= int(text) <= most:
            return int(text)
        upwards = f"a whole number from {least}" + f" to {most}" * (most < MOST)
        raise argparse.ArgumentTypeError(f"found {_shown(text)}; expected {upwards}")

    return read


def real_number(least: float = 0.0, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number from `least` (or, with `above`, above it) to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (least < value if above else least <= value) and value <= most:
            return value
        bounds = f"a number {'above' if above else 'from'} {least:g}" + f" to {most:g}" * math.isfinite(most)
        raise argparse.ArgumentTypeError(f"found {_shown(text)}; expected {bounds}")

    return read


def path_argument(text: str) -> Path:
    """The type of an option that names a file or directory: an absolute path, relative ones start where the user is.

    Shells leave `~` in `--option=~/x` and variables in quotes as they are; here they are expanded. A file whose name
    has a dollar sign in it is that file.
    """
    if not text:
        raise argparse.ArgumentTypeError("found nothing; expected a path")
    try:
        place = expanded(text.replace("$", "$$") if os.path.lexists(text) else text, os.environ)
    except PathTextError as error:
        near = f". Did you mean {error.suggestion!r}?" if error.suggestion else ""
        raise argparse.ArgumentTypeError(f"found {error.found}; expected {error.expected}{near}") from None
    return Path(place).absolute()


def place_argument(text: str) -> Path | str:
    """The type of an option that names a local file or directory, or what lies at an address, which stays as it is."""
    return text if re.match(r"\w+:", text) else path_argument(text)


def output_directory(text: str) -> Path:
    """The type of an option that names a directory to be made or written to."""
    path = path_argument(text)
    _check_directory(path, text)
    return path


def _check_directory(path: Path, text: str) -> None:
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise argparse.ArgumentTypeError(f"found {_shown(text)}, where {there} is a file; expected a directory")
    except OSError as error:
        # What may not be seen can be there all the same: writing will say so.
        if error.errno in NAMES_OF_NOTHING:
            found = f"{_shown(text)} ({error.strerror})"
            raise argparse.ArgumentTypeError(f"found {found}; expected a directory") from None


def output_file(text: str) -> Path:
    """The type of an option that names a file to be written."""
    path = path_argument(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"found {_shown(text)}, which is a directory; expected a file")
    _check_directory(path.parent, text)
    if path.parent.is_dir():
        try:
            _try_to_write(path)
        except OSError as error:
            found = f"{_shown(text)}, which cannot be written ({error.strerror})"
            raise argparse.ArgumentTypeError(f"found {found}; expected a file to write") from None
    return path


def add_new_file_option(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite` to a tool whose `--output` is one file."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def require_new_file(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the process with exit code 2 if `--output` is there and is not to be replaced."""
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"--output: found a file {arguments.output}; expected a new one, or --overwrite")


def _try_to_write(path: Path) -> None:
    """Open a file for writing and leave everything as it was: what fails would fail after the work otherwise."""
    is_new = not path.exists()
    # A pipe that nobody reads is not waited for.
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
    if is_new:
        path.unlink()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
