"""No option is given twice."""

import argparse

import pytest

from ebft_mega.io.arguments import ToolParser


def parser() -> ToolParser:
    made = ToolParser(prog="tool")
    made.add_argument("--output")
    made.add_argument("--outline", action="store_true")
    made.add_argument("--check", action=argparse.BooleanOptionalAction)
    made.add_argument("--input", nargs="+", action="extend")
    made.add_argument("rest", nargs="*")
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", "a", "--outline", "--check"],
        ["--input", "a", "--input", "b", "--outp=c"],
        ["--output", "a", "--", "--output", "b"],
        ["--no-check"],
    ],
)
def test_options_that_are_given_once(arguments: list[str]) -> None:
    assert parser().parse_args(arguments)


def test_options_of_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    made = ToolParser(prog="tool")
    made.add_subparsers().add_parser("make").add_argument("--output")
    assert made.parse_args(["make", "--output", "a"]).output == "a"
    with pytest.raises(SystemExit):
        made.parse_args(["make", "--output", "a", "--output", "b"])
    assert "--output: found 2 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--output", "a", "--output", "a"], "--output"),
        (["--output=a", "--outp", "b"], "--output"),
        (["--check", "--no-check"], "--check"),
        (["--outline", "--outline"], "--outline"),
    ],
)
def test_options_that_are_given_twice(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    assert f"{named}: found 2 times; expected at most once" in capsys.readouterr().err
