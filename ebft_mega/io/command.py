"""Run a command-line tool: errors of this package become messages on standard error and an exit code."""

import argparse
import sys
from collections.abc import Callable

from ebft_mega.errors import EXIT_FAILED, EbftError, InputProblems

MAX_SHOWN_PROBLEMS = 50


def add_overrides_option(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add `--set KEY=VALUE ...`, which may be given again; its texts are in `overrides`.

    Args:
        meaning: help text.
    """
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=meaning
    )


def run_command(main: Callable[[], int | None]) -> int:
    """Run a tool.

    Args:
        main: the tool; raises `EbftError` for what the user can correct. It may return an exit code.

    Returns:
        The process's exit code: that of `main`, 0 if it returns none, or that of the error, whose problems are
        printed on standard error.
    """
    try:
        exit_code = main()
    except InputProblems as error:
        for problem in error.problems[:MAX_SHOWN_PROBLEMS]:
            print(f"error: {problem}", file=sys.stderr)
        if len(error.problems) > MAX_SHOWN_PROBLEMS:
            print(f"error: and {len(error.problems) - MAX_SHOWN_PROBLEMS} more problems", file=sys.stderr)
        return error.exit_code
    except EbftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a directory that may not be written
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    return exit_code or 0
