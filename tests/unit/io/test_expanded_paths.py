"""Home directories and variables in paths; what cannot be put in their place; the way back."""

import argparse
import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.io.arguments import output_directory, output_file, path_argument, place_argument
from ebft_mega.io.expanded_paths import PathTextError, expanded, written

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = {"DATA": "/data", "data_dir": "rel/x", "EMPTY": "", "MONEY": "/a$b", "TILDE": "~"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("plain/x", "plain/x"),
        ("$DATA/x", "/data/x"),
        ("${DATA}x", "/datax"),
        ("a/$data_dir", "a/rel/x"),
        ("$MONEY", "/a$b"),
        ("$TILDE/x", "~/x"),
        ("$$DATA", "$DATA"),
        ("a$", "a$"),
        ("$1/$-", "$1/$-"),
        ("~", "/home/me"),
        ("~/x$$", "/home/me/x$"),
        ("x/~", "x/~"),
    ],
)
def test_what_becomes_of_a_path(monkeypatch, text, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded(text, VARIABLES) == path


@pytest.mark.parametrize(
    ("text", "found", "suggestion"),
    [
        ("$DATE/x", "'$DATE/x', where DATE is not set", "$DATA"),
        ("${data}/x", "'${data}/x', where data is not set", "$DATA"),
        ("$EMPTY/x", "'$EMPTY/x', where EMPTY is empty", ""),
        ("$QQQQQQ/x", "'$QQQQQQ/x', where QQQQQQ is not set", ""),
        ("${DATA:-x}", "'${DATA:-x}'", ""),
        ("${DATA", "'${DATA'", ""),
        ("${}", "'${}'", ""),
        ("~nobody-of-this-name/x", "'~nobody-of-this-name/x', where ~nobody-of-this-name is nobody's home", ""),
    ],
)
def test_what_cannot_be_put_in_place(text, found, suggestion):
    with pytest.raises(PathTextError) as refused:
        expanded(text, VARIABLES)
    assert (refused.value.found, refused.value.suggestion) == (found, suggestion)
    assert refused.value.expected


@pytest.mark.parametrize(
    ("home", "words"), [("", "HOME is empty"), ("rel", "HOME is 'rel'"), ("~", "HOME is '~'"), (".", "HOME is '.'")]
)
def test_a_home_that_is_no_place(monkeypatch, home, words):
    monkeypatch.setenv("HOME", home)
    with pytest.raises(PathTextError) as refused:
        expanded("~/x", VARIABLES | {"HOME": home})
    assert refused.value.found == f"'~/x', where {words}"


def test_without_a_home_it_is_the_one_that_the_system_knows(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert Path(expanded("~/x", VARIABLES)).is_absolute()


def test_a_name_that_no_user_can_have():
    with pytest.raises(PathTextError, match="nobody's home"):
        expanded("~\0/x", VARIABLES)


@given(st.text("a$~{}/. ", min_size=1))
def test_what_is_written_is_read_back(text):
    again = expanded(written(text), {})
    assert again == text or again == f"./{text}"


def test_arguments_start_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    (tmp_path / "a$b").touch()
    for text, path in (
        ("x", tmp_path / "x"),
        ("../x", tmp_path / ".." / "x"),
        ("~/x", tmp_path / "home" / "x"),
        ("$DATA/x", tmp_path / "data" / "x"),
        ("a$b", tmp_path / "a$b"),  # a file that a shell's pattern has found
        ("/x", Path("/x")),
    ):
        assert path_argument(text) == place_argument(text) == path
        if text != "a$b":
            assert output_directory(text) == path
        if text != "/x":
            assert output_file(text) == path
    assert place_argument("https://host/~x/$y") == "https://host/~x/$y"


@pytest.mark.parametrize("kind", [path_argument, place_argument, output_directory, output_file])
def test_arguments_that_are_no_paths(kind, monkeypatch):
    monkeypatch.setenv("SCRATCH_PLACE", "/x")
    with pytest.raises(argparse.ArgumentTypeError, match=r"found nothing; expected a path"):
        kind("")
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        kind("$SCRACH_PLACE/x")
    assert str(refused.value) == (
        "found '$SCRACH_PLACE/x', where SCRACH_PLACE is not set; expected a variable that is set ($$ stands for a "
        "dollar sign). Did you mean '$SCRATCH_PLACE'?"
    )


def test_every_path_of_a_command_line_is_read_in_one_place():
    """No tool turns a text of its command line into a path by itself."""
    found = []
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "launcher").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type" and ast.unparse(node.value) in ("Path", "str"):
                found.append(f"{path.name}:{node.value.lineno}")
            if isinstance(node, ast.keyword) and node.arg == "default" and "Path(" in ast.unparse(node.value):
                found.append(f"{path.name}:{node.value.lineno}")
    assert found == []
