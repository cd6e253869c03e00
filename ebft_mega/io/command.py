"""Run a command-line tool: errors of this package become messages on standard error and an exit code."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, get_args

from ebft_mega.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNREAD, EbftError, InputProblems
from ebft_mega.io import process_signals
from ebft_mega.io.arguments import NAMES_OF_NOTHING
from ebft_mega.io.output_directory import Permissions, limit_permissions
from ebft_mega.io.parse_boundary import shortage
from ebft_mega.io.process_signals import StopNow
from ebft_mega.io.standard_streams import print_line, protect_standard_streams, to_nowhere
from ebft_mega.io.text_encoding import require_utf8


def add_overrides_option(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add `--set KEY=VALUE ...`, which may be given again; its texts are in `overrides`.

    Args:
        meaning: help text.
    """
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=meaning
    )


def add_permissions_option(parser: argparse.ArgumentParser) -> None:
    """Add `--permissions`, which acts as soon as it is read; without it a tool's output is private."""
    parser.add_argument(
        "--permissions",
        choices=get_args(Permissions),
        action=_LimitPermissions,
        help="who may use what is made: the owner alone (private, the default), the group too, or whoever the umask "
        "leaves",
    )


class _LimitPermissions(argparse.Action):
    """Limit the permissions of what the process makes."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        limit_permissions(values)


def run_command(main: Callable[[], int | None], prints_its_result: bool = False) -> int:
    """Run a tool.

    Args:
        main: the tool; raises `EbftError` for what the user can correct. It may return an exit code.
        prints_its_result: standard output is what the tool is for: when nobody reads it any more (`| head`), the tool
            ends without a word and with exit code 141, as the shell reports of other programs. Other tools do their
            work to the end whatever becomes of their output.

    Returns:
        The process's exit code: that of `main`, 0 if it returns none, or that of the error, whose problems are
        printed on standard error. A signal that asks for a stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) ends the process
        here: with one line, 128 and the signal's number, and every process that it has started.
    """
    signals = process_signals.listen()
    umask = os.umask(0o077)  # private, unless `--permissions` says otherwise
    try:
        signals.raise_from_now_on()
        exit_code = _run(main, prints_its_result)
        signals.finish_without_interruption()
        return exit_code
    except StopNow as stop:
        print_line(f"stopped by {stop}")
        process_signals.leave(signals.code_of(stop.number))
    finally:
        os.umask(umask)
        signals.release()


def _run(main: Callable[[], int | None], prints_its_result: bool) -> int:
    """Run a tool and see that what it has printed arrives."""
    protect_standard_streams(failing=("stdout",) if prints_its_result else ())
    exit_code = _exit_code(main, prints_its_result)
    try:
        if sys.stdout is not None:  # it was closed when the tool started
            sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends, and would change the exit code.
        to_nowhere(sys.stdout.fileno())
        return exit_code or _code_of(error, prints_its_result)
    return exit_code


def _exit_code(main: Callable[[], int | None], prints_its_result: bool) -> int:
    """Run a tool and print what it raises."""
    try:
        require_utf8()
        return main() or 0
    except SystemExit as end:  # of the parser: --help, or an unknown option
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    except InputProblems as error:
        for line in str(error).splitlines():
            print_line(f"error: {line}")
        return error.exit_code
    except EbftError as error:
        print_line(f"error: {error}")
        return error.exit_code
    except OSError as error:  # a full disk, a directory that may not be written
        return _code_of(error, prints_its_result)


def _code_of(error: OSError, prints_its_result: bool) -> int:
    """The exit code that an error of the system leads to, which is printed unless the tool's reader has just gone."""
    if isinstance(error, BrokenPipeError) and prints_its_result:
        return EXIT_UNREAD
    print_line(f"error: {error.filename or 'system'}: {shortage(error) or error.strerror or error}")
    # Such a name can only have come from the command line.
    return EXIT_BAD_INPUT if error.errno in NAMES_OF_NOTHING else EXIT_FAILED
