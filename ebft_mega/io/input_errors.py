"""Errors about the user's input files and options, and reading JSON files with such errors."""

import json
from pathlib import Path
from typing import Any

from ebft_mega.errors import InputError, Problem


def bad_input(where: object, key: str, found: object, expected: object) -> InputError:
    """An `InputError` with one problem; see `Problem` for the fields."""
    return InputError([Problem(str(where), key, str(found), str(expected))])


def read_json_object(path: Path, description: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        description: what the file should be, for the message.

    Raises:
        InputError: there is no such file or it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise bad_input(str(path), path.name, "no such file", description) from error
    except json.JSONDecodeError as error:
        raise bad_input(f"{path}:{error.lineno}", path.name, error.msg, "valid JSON") from error
    except UnicodeDecodeError as error:
        raise bad_input(str(path), path.name, f"byte {error.start} is not UTF-8", "UTF-8 text") from error
    if not isinstance(value, dict):
        raise bad_input(str(path), path.name, f"a JSON {type(value).__name__}", "a JSON object")
    return value
