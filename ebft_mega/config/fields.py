"""How the schema declares a key, a section and a path.

Which keys there are, and their defaults, stands in `schema.py` and `input_keys.py` alone.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from pydantic.fields import FieldInfo

from ebft_mega.config.paths import PathKind, StoredModel, written_path
from ebft_mega.registry.registry import Registry
from ebft_mega.registry.store_addresses import address_problem, schemes_in_words


def allowed_text(field: FieldInfo) -> str:
    """Say what a key accepts: its own words if it has any, else its type, limits and unit."""
    words = cast(dict[str, str], field.json_schema_extra or {})  # none of an option that is declared in another way
    allowed = words.get("allowed", "").replace(STORES_IN_WORDS, schemes_in_words())
    return allowed or ", ".join(filter(None, (_type_text(field), words.get("unit"))))


def one_of(registry: Registry[Any]) -> tuple[object, ...]:
    """Metadata of a key that takes the name of an entry: `Annotated[str, *one_of(REGISTRY)]`."""

    def check(name: str) -> str:
        if name not in registry.names():
            raise ValueError(f"no {registry.kind} has this name")
        return name

    return AfterValidator(check), registry


def registry_of(field: FieldInfo) -> Registry[Any] | None:
    """The registry whose names a key takes; None for every other kind of key."""
    return next((item for item in field.metadata if isinstance(item, Registry)), None)


def registry_of_names(field: FieldInfo) -> Registry[Any] | None:
    """The registry whose names are the keys of a mapping; None for every other kind of key."""
    inner = get_args(field.annotation)
    metadata = _metadata(inner[0]) if get_origin(field.annotation) is dict and inner else ()
    return next((item for item in metadata if isinstance(item, Registry)), None)


def takes_addresses(field: FieldInfo) -> bool:
    """Whether a key takes addresses that stores read."""
    words = field.json_schema_extra
    return isinstance(words, dict) and STORES_IN_WORDS in str(words.get("allowed", ""))


def _type_text(field: FieldInfo) -> str:
    registry = registry_of(field)
    if registry is not None or get_origin(field.annotation) is Literal:
        *others, last = map(str, registry.names() if registry is not None else get_args(field.annotation))
        return f"{', '.join(others)} or {last}" if others else last
    kinds = get_args(field.annotation) or (field.annotation,)
    if bool in kinds:
        return "true or false"
    if str in kinds:
        return "a text"
    if not {int, float}.intersection(kinds) or get_origin(field.annotation) in (tuple, list, dict):
        return "a value of another kind"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{signs[name]} {getattr(item, name)}" for name in signs for item in field.metadata if hasattr(item, name)
    ]
    return f"{'an integer' if int in kinds else 'a number'} {' and '.join(limits)}".rstrip()


def path_kind(field: FieldInfo) -> PathKind | None:
    """What a key of a path takes; None for every other kind of key."""
    metadata = [*field.metadata, *(item for part in get_args(field.annotation) for item in _metadata(part))]
    if _WRITTEN not in metadata:
        return None
    return PathKind(field.annotation is str, str(field.default) if isinstance(field.default, Path) else None)


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def default_text(field: FieldInfo) -> str:
    """Write a key's default as the file would have it; `required` and `not set` where there is none."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "not set"
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(yaml_text, field.default))}]"
    return yaml_text(field.default)


def yaml_text(value: Any) -> str:
    """Write a single value as the file would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def as_tuple(value: Any) -> Any:
    """Turn a list into a tuple; what is no list stays and is refused."""
    return tuple(value) if isinstance(value, list) else value


def as_integer(value: Any) -> Any:
    """Let `1e9` stand for an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def is_possible_path(text: str) -> bool:
    """Whether a file could have this path, as far as its length and its characters tell."""
    data = text.encode("utf-8", "surrogateescape")
    return b"\0" not in data and len(data) <= MAX_PATH_BYTES and max(map(len, data.split(b"/"))) <= MAX_NAME_BYTES


def _as_path(value: Any) -> Any:
    """Turn text into a path; what could be taken for a command or a download stays text and is refused.

    So does what no file system takes, of which every question about the file would raise an error.
    """
    if isinstance(value, str) and value and not re.match(r"\w+:", value) and is_possible_path(value):
        return Path(value)
    return value


def _as_address(text: str) -> str:
    """Let addresses pass that a store reads. None holds a user or a query: both may be secrets, and places are logged.

    Raises:
        ValueError: it is another one; in words without it.
    """
    if (problem := address_problem(text)) is not None:
        raise ValueError(problem)
    return text


def _as_model_place(value: Any) -> Any:
    """Turn text into a path, that of a model's copy where it is an address that a store reads."""
    if isinstance(value, str) and "://" in value and address_problem(value) is None:
        return StoredModel.of(value)
    return _as_path(value)


MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_PORT = "(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
# A wildcard stands before a domain of two labels at least: `*.com` would name everybody.
_REDIRECT_HOST = rf"({_LABEL}(\.{_LABEL})*|\*(\.{_LABEL}){{2,}}|\[[0-9A-Fa-f:.]+\]){_PORT}"
RedirectHost = Annotated[str, Field(pattern=f"^{_REDIRECT_HOST}$", max_length=253 + len("*.:65535"))]
_WRITTEN = PlainSerializer(written_path, return_type=str, when_used="json")
LocalPath = Annotated[Path, BeforeValidator(_as_path), _WRITTEN]
DatasetPlace = Annotated[Path | Annotated[str, AfterValidator(_as_address)], BeforeValidator(_as_path), _WRITTEN]
ModelPlace = Annotated[Path, BeforeValidator(_as_model_place), _WRITTEN]
# A word that stands for itself, or the text of a path.
WordOrPath = Annotated[str, Field(min_length=1), _WRITTEN]
PATH = "a local path (relative paths start at the repository root)"
STORES_IN_WORDS = "{stores}"  # in a key's words: the addresses that are read, plugins' among them
DATASET_PLACE = f"{PATH} or an address that begins with {STORES_IN_WORDS}"
