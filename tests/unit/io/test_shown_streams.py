"""What reaches a terminal, a pipe or a log is letters, whatever the texts hold and whoever prints them."""

import contextlib
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ebft_mega.io.progress_bar import Meter
from ebft_mega.runtime.run_files import setup_rank_log
from tests.unit.hostile import FORGED_LINE, TEXTS, dangers

REPOSITORY = Path(__file__).resolve().parents[3]
PRINTER = """
import argparse, logging, sys, warnings
from ebft_mega.errors import CheckpointError, InputError, Problem
from ebft_mega.io.arguments import ToolParser
from ebft_mega.io.command import run_command
from ebft_mega.io.progress_bar import Meter
from tests.unit.hostile import TEXTS

def main():
    logging.getLogger("transformers").addHandler(logging.StreamHandler())  # a library's own
    for name, text in TEXTS.items():
        print("a document:", text, flush=True)
        sys.stdout.write(text + "\\n")
        sys.stdout.writelines([text, "\\n"])
        print(text, file=sys.stderr)
        warnings.warn(text)
        logging.getLogger("ebft_mega.any").warning("a name: %s", text)
        logging.getLogger("transformers").warning("a name: %s", text)
        with Meter(2, f"reading {text}") as meter:
            print("while a bar is drawn:", text)
            print("while a bar is drawn:", text, file=sys.stderr)
            if meter._bar is not None:
                meter._bar.note(text)
            meter.show(1)
        parser = ToolParser(prog="tool", exit_on_error=True)
        parser.add_argument("--kind", choices=("a", "b"))
        for arguments in (["--kind", text], ["--unknown" + text], ["--kind"]):
            try:
                parser.parse_args(arguments)
            except SystemExit:
                pass
        try:
            raise ValueError(text)
        except ValueError:
            sys.excepthook(*sys.exc_info())
    ENDING

sys.exit(run_command(main, prints_its_result=PRINTS))
"""
ENDINGS = {
    "raise InputError([Problem(text, text, text, text, text) for text in TEXTS.values()])": 2,
    "raise CheckpointError(''.join(TEXTS.values()))": 1,
    "raise OSError(5, 'broken', ''.join(TEXTS.values()))": 1,
    "raise RuntimeError(''.join(TEXTS.values()))": 1,
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8", "COLUMNS": "300"}


def written(ending, prints=False):
    """The program, with the error that it ends with."""
    return PRINTER.replace("ENDING", ending).replace("PRINTS", str(prints))


@pytest.fixture(scope="module")
def printed():
    """The two streams of the program, in pipes."""
    program = written(next(iter(ENDINGS)))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    return done.stdout.decode(), done.stderr.decode()


def test_what_is_printed_into_a_pipe_is_letters(printed):
    for stream in printed:
        assert dangers(stream, "\n\t") == set()
        assert r"a\u001b[31mred\u001b[0m" in stream and r"caf\udce9\udcff" in stream


def test_errors_options_and_records_are_one_line_each(printed):
    lines = printed[1].splitlines()
    forging = [line for line in lines if "forged" in line and not line.startswith(FORGED_LINE)]
    assert sum(line.startswith(("error: ", "tool: error: ")) for line in forging) == 2 * 3
    assert sum(line.startswith("a name: ") for line in forging) == 2 + 1  # the library's own handler is not ours
    assert sum(line.startswith("reading ") for line in forging) == 2


@pytest.mark.parametrize(("ending", "code"), list(ENDINGS.items())[1:])
def test_however_a_tool_ends_its_last_words_are_letters(ending, code):
    program = written(ending, prints=True).replace("TEXTS.items()", "()")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=60, check=False)
    assert done.returncode == code and done.stderr
    assert dangers((done.stdout + done.stderr).decode(), "\n\t") == set()


def test_on_a_terminal_only_the_bar_moves_the_cursor():
    """Nothing of the texts comes through: neither what is printed nor what is shown beside or above a bar."""
    parent, child = pty.openpty()
    program = written(next(iter(ENDINGS)))
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT | {"TERM": "xterm"}, stdout=child, stderr=child, stdin=child
    )
    os.close(child)
    shown = b""
    try:
        while chunk := os.read(parent, 1 << 16):
            shown += chunk
    except OSError:  # the program has ended
        pass
    finally:
        os.close(parent)
        code = process.wait(timeout=60)
    text = shown.decode()
    assert code == 2 and "\x1b[?25l" in text, "the bar hides the cursor"
    for forbidden in ("\x1b[31mred", "\x1b]0;", "\x07", "\x08", "\x9b", "\x9d", "\u202e", "\u200b", "\x0b", "\x0c"):
        assert forbidden not in text, forbidden.encode("unicode_escape")
    assert "refused\raccepted" not in text and "[red]text[/red]" in text


@contextlib.contextmanager
def rank_log(tmp_path):
    """A rank's logger and its file."""
    logger = logging.getLogger("ebft_mega")
    handlers, propagates = list(logger.handlers), logger.propagate
    path = setup_rank_log(tmp_path, 0)
    own = list(logger.handlers)
    try:
        yield logging.getLogger("ebft_mega.test"), path
    finally:
        for handler in own:
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.propagate = propagates


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_log_is_letters_and_each_record_has_one_line_at_the_margin(tmp_path, capsys, text):
    with rank_log(tmp_path) as (logger, path):
        logger.warning("a name: %s", text)
        try:
            raise ValueError(text)
        except ValueError:
            logger.exception("a document: %s", text)
    for shown in (path.read_text(encoding="utf-8"), capsys.readouterr().err):
        assert dangers(shown, "\n") == set()
        at_the_margin = [line for line in shown.split("\n") if line and not line.startswith("  ")]
        assert [line.split()[2] for line in at_the_margin] == ["WARNING", "ERROR"]
        assert "  ValueError: " in shown


def test_a_log_record_is_bounded(tmp_path):
    with rank_log(tmp_path) as (logger, path):
        logger.warning("%s", "x" * 10_000_000)
    assert len(path.read_text()) < 30_000


def test_a_meter_shows_one_line(capsys):
    with Meter(1, "reading a\nb\x1b[0m") as meter:
        meter.show(1)
    assert capsys.readouterr().err.startswith(r"reading a\nb\u001b[0m: 1/1")
