"""Which columns of a Parquet file hold texts and fields of documents, and their values."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebft_mega.data.text.document_groups import wanted_keys
from ebft_mega.data.text.text_files import MAX_FIELDS_BYTES, NO_GROUP, NO_TEXT, WRONG_FIELD, ReadOptions
from ebft_mega.errors import Problem

if TYPE_CHECKING:
    from pyarrow import Buffer, DataType, Scalar, Schema

_SHOWN_COLUMNS = 50
_MAX_LIST = 10_000  # elements of a list that is kept
# What a column holds: texts, lists of texts, numbers or truth values or nothing, lists of those, anything else.
TEXT, TEXTS, PLAIN, LIST, OTHER = "text", "texts", "plain", "list", "other"


class Column(NamedTuple):
    """A column of the top level."""

    name: str
    type: str  # as the library writes it
    kind: str  # one of the five above


def columns_of(schema: "Schema") -> tuple[Column, ...]:
    """The columns of a file."""
    return tuple(Column(field.name, str(field.type)[:_SHOWN_COLUMNS], _kind_of(field.type)) for field in schema)


def read_columns(columns: tuple[Column, ...], options: ReadOptions) -> list[str]:
    """Names of the columns of a file that are read: the text's first, then what the options name and the file has."""
    names = {column.name for column in columns}
    return [name for name in _named(options, columns) if name in names]


def _named(options: ReadOptions, columns: tuple[Column, ...]) -> dict[str, None]:
    """What the options name, each once; of the members that can name a group those that can be one."""
    licence = [options.licence_key] if options.licence_key else []
    groups = [name for name in options.group_keys if _can_be_group(name, columns)]
    return dict.fromkeys([options.text_key, *licence, *options.keep_keys, *groups])


def _can_be_group(name: str, columns: tuple[Column, ...]) -> bool:
    return any(column.name == name and column.kind in (TEXT, PLAIN) for column in columns)


def column_problems(file: Path, columns: tuple[Column, ...], options: ReadOptions) -> Iterator[Problem]:
    """Report columns that cannot be read as what the options name; licence and kept columns may be missing.

    Args:
        file: for messages.
        columns: of the file.
        options: which are read.
    """
    names = [column.name for column in columns]
    key = options.text_key
    texts = f"a column of texts, named with --text-key (columns: {in_words(columns)})"
    if key not in names:
        near = difflib.get_close_matches(key, names, 1)
        yield Problem(str(file), key, "no such column", texts, near[0] if near else "")
    if options.group_keys and not any(_can_be_group(name, columns) for name in options.group_keys):
        there = ", ".join(f"{column.name}: {column.type}" for column in columns if column.name in options.group_keys)
        there = there or f"the columns {in_words(columns)}"
        yield Problem(str(file), "--split-by", there, wanted_keys(options.group_keys))
    for name in _named(options, columns):
        found = [column for column in columns if column.name == name]
        if len(found) > 1:
            yield Problem(str(file), name, f"{len(found)} columns of this name", "one")
        elif name == key and found and found[0].kind != TEXT:
            yield Problem(str(file), name, f"a column of {found[0].type}", texts)
        elif name == options.licence_key and found and found[0].kind not in (TEXT, TEXTS):
            yield Problem(str(file), name, f"a column of {found[0].type}", "a column of texts, or of lists of texts")
        elif found and found[0].kind == OTHER:
            expected = "a column of texts, numbers or truth values, or of lists of them"
            yield Problem(str(file), name, f"a column of {found[0].type}", expected)


def unknown_columns(columns: tuple[Column, ...], options: ReadOptions) -> Iterator[Problem]:
    """Report columns of licences, and kept ones, that no file has.

    Args:
        columns: of all files.
        options: which are read.
    """
    names = {column.name for column in columns}
    licence = [("--licence-key", options.licence_key)] if options.licence_key else []
    for option, key in [*licence, *(("--keep-key", key) for key in options.keep_keys)]:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            expected = f"a column of the Parquet files ({in_words(columns)})"
            yield Problem(option, key, "no such column in any of them", expected, near[0] if near else "")


def in_words(columns: tuple[Column, ...]) -> str:
    """Columns as a phrase, such as `text: string, id: int64`."""
    words = [f"{column.name}: {column.type}" for column in columns[:_SHOWN_COLUMNS]]
    return ", ".join([*words, *["..."] * (len(columns) > len(words))])


def _kind_of(kind: "DataType") -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        return TEXT if _kind_of(kind.value_type) == TEXT else OTHER
    is_text = (types.is_string, types.is_large_string, types.is_string_view)
    is_bytes = (
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    )  # older writers do not say which are texts
    if any(check(kind) for check in (*is_text, *is_bytes)):
        return TEXT
    if any(check(kind) for check in (types.is_integer, types.is_floating, types.is_boolean, types.is_null)):
        return PLAIN
    if types.is_list(kind) or types.is_large_list(kind):
        return {TEXT: TEXTS, PLAIN: LIST}.get(_kind_of(kind.value_type), OTHER)
    return OTHER


def text_buffer(scalar: "Scalar") -> "Buffer | None":
    """The bytes of a text, not copied; None where there is none."""
    plain = getattr(scalar, "value", scalar) if type(scalar).__name__ == "DictionaryScalar" else scalar
    return plain.as_buffer() if scalar.is_valid and plain.is_valid else None


def value_of(scalar: "Scalar") -> Any:
    """The value of a field as JSON has it.

    Raises:
        UnicodeDecodeError: a text is not UTF-8.
        ValueError: it is not finite, or too much.
    """
    from pyarrow import types

    if not scalar.is_valid:
        return None
    kind = scalar.type
    if types.is_list(kind) or types.is_large_list(kind):
        if len(scalar) > _MAX_LIST:
            raise ValueError(f"a list of {len(scalar)} values, where {_MAX_LIST} are the most")
        total = 0
        values = []
        for element in scalar:
            values.append(value_of(element))
            total += len(values[-1]) if isinstance(values[-1], str) else 1
            if total > MAX_FIELDS_BYTES:
                raise ValueError(f"a list of more than {MAX_FIELDS_BYTES} characters")
        return values
    if _kind_of(kind) == TEXT:
        content = text_buffer(scalar)
        if content is None:
            return None
        if content.size > MAX_FIELDS_BYTES:
            raise ValueError(f"{content.size} bytes, where {MAX_FIELDS_BYTES} are the most")
        return content.to_pybytes().decode("utf-8")
    value = scalar.as_py()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number that is not finite ({value})")
    return value


def reason_of(problem: Problem, options: ReadOptions) -> str:
    """Why a row is left out whose column of some name cannot be used."""
    return {options.text_key: NO_TEXT, "--split-by": NO_GROUP}.get(problem.key, WRONG_FIELD)
