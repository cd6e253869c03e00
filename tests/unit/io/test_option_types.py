"""Numbers and places on a command line: bounded, and refused in one line with exit code 2."""

import argparse
import ast
import os
from pathlib import Path

import pytest

from ebft_mega.errors import EXIT_BAD_INPUT, EXIT_FAILED
from ebft_mega.io.arguments import output_directory, output_file, real_number, whole_number
from ebft_mega.io.command import run_command

ROOT = Path(__file__).resolve().parents[3]
# Their own checks know more, such as the number of documents.
CHECKED_AFTERWARDS = {"build_shards.py", "inspect_shards.py"}


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("7", 7), ("+7", 7)])
def test_whole_numbers(text, value):
    assert whole_number(0)(text) == value


@pytest.mark.parametrize("text", ["-1", "1.5", "", "x", "nan", "1e3", "9" * 5000, "\u0663", str(1 << 41)])
def test_no_whole_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 0$") as refused:
        whole_number(0)(text)
    assert len(str(refused.value)) < 120


def test_real_numbers():
    assert real_number()("0") == 0 and real_number(above=True)("1e-3") == 1e-3
    for text in ("nan", "inf", "-1", "1e999", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number from 0$"):
            real_number()(text)
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number above 0 to 2$"):
        real_number(most=2.0, above=True)("0")


def test_places_to_write_to(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert output_directory(str(tmp_path / "new" / "er")) == tmp_path / "new" / "er"
    assert output_file(str(file)) == file and output_directory(str(tmp_path)) == tmp_path
    for place in (file, file / "below"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a file; expected a directory"):
            output_directory(str(place))
    with pytest.raises(argparse.ArgumentTypeError, match="is a file; expected a directory"):
        output_file(str(file / "below"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a directory; expected a file"):
        output_file(str(tmp_path))
    for check in (output_directory, output_file):
        with pytest.raises(argparse.ArgumentTypeError, match="File name too long"):
            check("a" * 5000)


@pytest.mark.timeout(20)
def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(argparse.ArgumentTypeError, match="which cannot be written"):
        output_file(str(tmp_path / "pipe"))
    assert (tmp_path / "pipe").is_fifo() and output_file("/dev/null") == Path("/dev/null")


@pytest.mark.parametrize("read", [Path.is_dir, Path.read_bytes, Path.mkdir])
def test_a_name_that_no_file_can_have_is_bad_input(tmp_path, capsys, read):
    (tmp_path / "circle").symlink_to("circle")
    assert run_command(lambda: read(tmp_path / ("a" * 5000))) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.endswith(": File name too long\n")
    assert run_command(lambda: (tmp_path / "circle" / "x").read_bytes() and None) == EXIT_BAD_INPUT
    assert run_command(lambda: (tmp_path / "none").read_bytes() and None) == EXIT_FAILED


def test_every_number_of_a_tool_has_bounds():
    unbounded = []
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "launcher").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith(
                ("add_argument", "option")
            ):
                types = [
                    word.value.id for word in node.keywords if word.arg == "type" and isinstance(word.value, ast.Name)
                ]
                if {"int", "float"}.intersection(types) and path.name not in CHECKED_AFTERWARDS:
                    unbounded.append(f"{path.name} {ast.unparse(node.args[0])}")
    # What launchers add, which nothing reads.
    assert sorted(unbounded) == ["evaluate.py '--local_rank'", "train.py '--local_rank'"]
