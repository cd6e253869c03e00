"""What ranks tell each other, as JSON text: values of plain kinds and of classes that the receiver names, no pickle.

A list, a text, a whole number, a finite float, true, false and null are themselves; everything else is an object with
one key: `{"tuple": […]}`, `{"dict": [[key, value], …]}`, `{"path": "…"}`, `{"float": "bits in hexadecimal"}`,
`{"error": ["KeyError", [arguments]]}`, or the name of a class with its fields. Reading such a text makes nothing else
than these, calls nothing but the constructors of the classes that the receiver expects, and gives the value back to
the last bit.
"""

import contextlib
import dataclasses
import functools
import json
import math
import struct
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ebft_mega import errors
from ebft_mega.errors import EbftError, FirstRankFailedError, ForeignMessageError, InputProblems, Problem
from ebft_mega.io.json_text import MAX_DIGITS, parse_json

_SHOWN_CHARACTERS = 200
# Rebuilt from their arguments; every other error becomes a text.
_OWN_ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, EbftError)
}


def to_message(value: Any, kinds: tuple[type, ...] = ()) -> bytes:
    """Write a value as JSON.

    Args:
        value: of plain kinds, an exception, or of `kinds` and the classes of their fields.
        kinds: frozen dataclasses, records and enumerations.
    Raises:
        TypeError: a part of the value is of another kind.
    """
    return json.dumps(_written(value, _with_fields(kinds)), allow_nan=False, separators=(",", ":")).encode("ascii")


def from_message(content: bytes, kinds: tuple[type, ...] = ()) -> Any:
    """Read what `to_message` wrote for the same `kinds`.

    Raises:
        ForeignMessageError: it is no such text.
    """
    try:
        return _read(parse_json(content.decode("ascii"), half_pairs=True), _with_fields(kinds))
    except Exception as error:  # whatever a constructor or the parser raises
        shown = content[:_SHOWN_CHARACTERS].decode("ascii", errors="replace")
        raise ForeignMessageError(f"no message of this program ({error}): {shown!r}") from None


def _written(value: Any, kinds: Mapping[str, type]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        if abs(value) >= 10**MAX_DIGITS:  # no reader would take it
            raise TypeError(f"an integer of more than {MAX_DIGITS} digits")
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is list:
        return [_written(item, kinds) for item in value]
    if kind is tuple:
        return {"tuple": [_written(item, kinds) for item in value]}
    if kind is dict:
        return {"dict": [[_written(key, kinds), _written(item, kinds)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, BaseException):
        return {"error": _written_error(value, kinds)}
    if kinds.get(kind.__name__) is not kind:
        raise TypeError(f"a {kind.__name__}, which ranks do not send each other here")
    if isinstance(value, Enum):
        return {kind.__name__: _written(value.value, kinds)}
    return {kind.__name__: {name: _written(getattr(value, name), kinds) for name in _field_names(value)}}


def _written_error(error: BaseException, kinds: Mapping[str, type]) -> list[Any]:
    name, arguments = type(error).__name__, error.args
    if isinstance(error, OSError):
        named = error.filename is not None
        return ["OSError", [error.errno, error.strerror or str(error), *[str(error.filename)] * named]]
    if _OWN_ERRORS.get(name) is type(error):
        with contextlib.suppress(TypeError):
            return [name, [_written(argument, kinds) for argument in arguments]]
    return [FirstRankFailedError.__name__, [f"the first rank: {name}: {error}"]]


def _read(found: Any, kinds: Mapping[str, type]) -> Any:
    if isinstance(found, list):
        return [_read(item, kinds) for item in found]
    if not isinstance(found, dict):
        return found
    [(name, content)] = found.items()
    if name == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if name == "tuple":
        return tuple(_read(_list(content), kinds))
    if name == "dict":
        return {_read(key, kinds): _read(item, kinds) for key, item in _list(content)}
    if name == "path":
        return Path(content)
    if name == "error":
        return _read_error(content, kinds)
    kind = kinds[name]
    if issubclass(kind, Enum):
        return kind(_read(content, kinds))
    return kind(**{key: _read(item, kinds) for key, item in content.items()})


def _read_error(content: Any, kinds: Mapping[str, type]) -> Exception:
    name, written = _list(content)
    arguments = _read(_list(written), kinds)
    if name == "OSError":
        return OSError(*arguments)
    kind = _OWN_ERRORS[name]
    if issubclass(kind, InputProblems):
        [problems] = arguments
        return kind(problems)
    return kind(*arguments)


def _list(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise TypeError(f"{type(found).__name__} in place of a list")
    return found


def _field_names(value: Any) -> list[str]:
    """The fields that make a value again: a record's defaults are its class's."""
    if isinstance(value, BaseModel):
        return [name for name in type(value).model_fields if name in value.model_fields_set]
    return [field.name for field in dataclasses.fields(value)]


@functools.cache
def _with_fields(kinds: tuple[type, ...]) -> Mapping[str, type]:
    """Classes by name: the given ones, `Problem`, and those that their fields may hold."""
    found: dict[str, type] = {}
    waiting: list[Any] = [Problem, *kinds]
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        is_class = isinstance(hint, type) and not typing.get_args(hint)
        if not is_class or not (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel | Enum)):
            continue
        if found.setdefault(hint.__name__, hint) is not hint:
            raise TypeError(f"two classes of the name {hint.__name__}")
        if not issubclass(hint, Enum):
            fields = typing.get_type_hints(hint)
            waiting += [inner for inner in fields.values() if inner not in found.values()]
    return found
