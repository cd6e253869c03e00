"""Paths as people write them: `~`, `~user`, `$NAME` and `${NAME}`. No file is opened."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Where the relative paths of a configuration start, whatever the working directory.
REPOSITORY = Path(__file__).resolve().parents[2]
_SIGN = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)(?P<end>\}?))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SIMILAR = 0.6
SET_VARIABLE = "a variable that is set ($$ stands for a dollar sign)"


class PathTextError(ValueError):
    """A path names something that cannot be put in its place.

    Args:
        found, expected: in words; suggestion: the nearest variable that is set, else empty.
    """

    def __init__(self, found: str, expected: str, suggestion: str = ""):
        super().__init__(found, expected, suggestion)
        self.found, self.expected, self.suggestion = found, expected, suggestion


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Put home directories and variables into a path; nothing else of a shell's language is known.

    Args:
        text: the path.
        variables: the environment.

    Raises:
        PathTextError: a variable is not set or empty, a name in braces is none, there is no such user, HOME is set to
            something that is no absolute path.
    """
    if text.startswith("~"):
        text = _with_home(text, variables)
    return _SIGN.sub(lambda sign: _value(text, sign, variables), text)


def written(text: str) -> str:
    """Write a path such that `expanded` gives it back."""
    text = text.replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _with_home(text: str, variables: Mapping[str, str]) -> str:
    user, slash, rest = text.partition("/")
    own = variables.get("HOME")
    if user == "~" and own is not None and not os.path.isabs(own):
        found = f"{text!r}, where HOME is {own!r}" if own else f"{text!r}, where HOME is empty"
        raise PathTextError(found, "a HOME that is an absolute path, or none")
    # The system's list of users takes no such name.
    home = user if "\0" in user else os.path.expanduser(user)
    if home == user:
        raise PathTextError(
            f"{text!r}, where {user} is nobody's home", "~, or ~ and the name of a user of this machine"
        )
    # A dollar sign of the home directory's own name is no variable.
    return home.replace("$", "$$") + slash + rest


def _value(text: str, sign: re.Match[str], variables: Mapping[str, str]) -> str:
    if sign["dollar"]:
        return "$"
    name = sign["name"] or sign["braced"]
    if not sign["name"] and not (sign["end"] and _NAME.fullmatch(name)):
        raise PathTextError(f"{text!r}", "$NAME or ${NAME} for a variable ($$ stands for a dollar sign)")
    value = variables.get(name)
    if value:
        return value
    state = "is not set" if value is None else "is empty"
    near = _nearest(name, [known for known, filled in variables.items() if filled and known != name])
    raise PathTextError(f"{text!r}, where {name} {state}", SET_VARIABLE, f"${near}" if near else "")


def _nearest(name: str, known: list[str]) -> str:
    """The variable that was meant, whatever its case; empty if none is near."""
    by_folded = {each.casefold(): each for each in known if _NAME.fullmatch(each)}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=_SIMILAR)
    return by_folded[near[0]] if near else ""
