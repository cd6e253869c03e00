"""Files that describe a tokenizer or a model, checked to be what their names say. No tokenizer library is loaded.

They come from directories that nobody vouches for and are copied into datasets, checkpoints and final models, so that
whatever is none of these must not pass for one.
"""

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebft_mega.data.selection.text_formats import kind_of_bytes, kind_of_file, kind_within
from ebft_mega.data.text.file_kinds import JSON_LINES, TEKKEN, TIKTOKEN
from ebft_mega.data.tokenizers.tokenizer_kinds import HUGGING_FACE_NAME, SENTENCEPIECE_NAME
from ebft_mega.data.tokenizers.tokenizer_model_file import MOST_GROWTH, describe_other_kind, longest_replacement
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import read_contained
from ebft_mega.io.input_errors import lfs_pointer
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import words_of

CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (
    SENTENCEPIECE_NAME,
    HUGGING_FACE_NAME,
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
MEBIBYTE = 2**20
# Most bytes of a file, by its suffix.
LONGEST_BYTES = {".json": 128 * MEBIBYTE, ".model": 64 * MEBIBYTE, ".jinja": MEBIBYTE, ".txt": 16 * MEBIBYTE}

_OBJECT_NAMES = (CONFIG_NAME, "generation_config.json", "chat_template.json")
_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
# Of a `tokenizer.json`: what holds several steps that change a text one after another, and what a model adds to a word.
_STEPS = ("normalizers", "pretokenizers", "decoders")
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def check_named_text(name: str, content: bytes) -> Any:
    """Check that a text or JSON file is what its name says.

    Args:
        name: of the file, without a folder.
        content: all of it.
    Returns:
        The value of a JSON file; None for others.
    Raises:
        ValueError: it is something else, which is named where its first bytes tell it.
    """
    try:
        return _checked(name, content)
    except ValueError:
        kind = kind_of_bytes(content)
        if kind is None or kind is JSON_LINES or lfs_pointer(content) is not None:
            raise  # it says more
        raise ValueError(kind.words) from None


def _checked(name: str, content: bytes) -> Any:
    """The value of a JSON file, None for others; a `ValueError` where the file is not what its name says."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if (pointer := lfs_pointer(content)) is not None:
        raise ValueError(pointer)
    if not name.endswith(".json"):
        if control := _CONTROL_CHARACTER.search(text):
            raise ValueError(f"the control character U+{ord(control[0]):04X}")
        _TEXTS.get(name, lambda text: None)(text)
        return None
    try:
        value = parse_json(text)
    except Exception as error:
        raise ValueError(f"no JSON ({words_of(error)})") from None
    if name in _OBJECTS:
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
        _OBJECTS[name](value)
    elif not isinstance(value, dict | list):
        raise ValueError(f"a JSON {type(value).__name__}")
    return value


def is_named(name: str) -> bool:
    """Whether a file's name says more of its contents than that they are JSON."""
    return not name.endswith(".json") or name in _OBJECTS


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Read the files of a tokenizer that are there, and nothing else of its directory, without a tokenizer library.

    A `tokenizer.model` of another kind beside a `tokenizer.json` is not used, and left out.

    Returns:
        Contents by name, in the order of `TOKENIZER_FILES`; empty where there is none.
    Raises:
        InputError: a file is not what its name says, too long, or lies outside of the directory; all problems at once.
    """
    return read_tokenizer_values(directory)[0]


def read_tokenizer_values(directory: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Contents of the files of a tokenizer, and the values of those that are JSON; see `read_tokenizer_files`."""
    contents: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name in TOKENIZER_FILES:
        if not os.path.lexists(directory / name):
            continue
        try:
            contents[name] = read_tokenizer_file(directory, name)
            if name != SENTENCEPIECE_NAME:
                values[name] = check_named_text(name, contents[name])
            elif (found := describe_other_kind(contents[name])) is not None:
                del contents[name]
                if not os.path.lexists(directory / HUGGING_FACE_NAME):
                    expected = f"a sentencepiece model, or the model's {HUGGING_FACE_NAME} beside it"
                    problems.append(Problem(str(directory / name), "tokenizer", found, expected))
        except InputError as error:
            problems += error.problems
        except ValueError as error:
            expected = f"the {name} of a tokenizer, or no such file"
            problems.append(Problem(str(directory / name), name, str(error), expected))
    if problems:
        raise InputError(problems)
    return contents, values


def in_place_of_tokenizer(directory: Path) -> tuple[str, str]:
    """What is found where there is neither file that makes a tokenizer, and what is expected."""
    expected = f"{SENTENCEPIECE_NAME} (sentencepiece) or {HUGGING_FACE_NAME} (Hugging Face)"
    if directory.is_file() and directory.name in TOKENIZER_FILES:
        return f"the file {directory.name}", f"the directory that it lies in: {directory.parent}"
    if inner := kind_within(directory, (TEKKEN, TIKTOKEN)):
        return f"neither, but {inner[0]}, {inner[1].words}, which is not read", inner[1].advice
    if (kind := kind_of_file(directory)) is not None:
        return kind.words, f"a directory with {expected}"
    return "neither" if directory.is_dir() else "no such directory", expected


def read_tokenizer_file(directory: Path, name: str) -> bytes:
    """Read one file of a tokenizer, bounded by `LONGEST_BYTES`.

    Raises:
        InputError: it cannot be read, or lies outside of the directory.
    """
    return read_contained(directory, name, LONGEST_BYTES[Path(name).suffix], f"the {name} of a tokenizer")


def _check_merges(text: str) -> None:
    """Raise a `ValueError` unless each line, a first one with the version left aside, is two symbols."""
    lines = text.split("\n")  # a symbol may be another line end
    for number, line in enumerate(lines, 1):
        parts = line.removesuffix("\r").split(" ")
        is_version = number == 1 and line.startswith("#version")
        is_end = number == len(lines) and not line
        if not (is_version or is_end or (len(parts) == 2 and all(parts))):
            raise ValueError(f"line {number} is no pair of symbols")


def _check_vocabulary(text: str) -> None:
    """Raise a `ValueError` unless each line is one token."""
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or " " in line or "\t" in line:
            raise ValueError(f"line {number} is no token")


def _check_definition(value: dict[str, Any]) -> None:
    """Raise a `ValueError` unless there is a model, and no rule that makes much of a short text."""
    model = value.get("model")
    if not isinstance(model, dict):
        raise ValueError("a JSON object without a model")
    added = sum(_num_bytes(model.get(key)) for key in _AFFIXES)
    encoding = (1 + added) * _growth(value.get("normalizer"), value.get("pre_tokenizer"))
    if max(encoding, _growth(value.get("decoder"))) > MOST_GROWTH:
        raise ValueError(f"rules that can make a text more than {MOST_GROWTH} times longer")


def _growth(*steps: Any) -> int:
    """How many times longer steps can make a text one after another; of more than `MOST_GROWTH`, some part."""
    factor, waiting = 1, list(steps)
    while waiting and factor <= MOST_GROWTH:
        step = waiting.pop()
        if isinstance(step, dict):
            factor *= _growth_of_one(step)
            waiting += [inner for key in _STEPS if isinstance(step.get(key), list) for inner in step[key]]
    return factor


def _growth_of_one(step: dict[str, Any]) -> int:
    """How many times longer one step can make a text. It is told by its keys: the library does not need its type."""
    if "precompiled_charsmap" in step:
        try:
            longest = longest_replacement(base64.b64decode(step["precompiled_charsmap"] or b""))
        except (TypeError, ValueError):
            return 1  # the library refuses it
        return longest if longest > MOST_GROWTH else 1  # what Unicode's own tables do to single characters
    if "pattern" in step and "content" in step:
        pattern, put_in = step["pattern"], _num_bytes(step["content"])
        replaced = _num_bytes(pattern.get("String") if isinstance(pattern, dict) else pattern)
        # An expression may match between any two characters.
        return max(1, -(-put_in // replaced)) if replaced else 1 + put_in
    if "prepend" in step:
        return 1 + _num_bytes(step["prepend"])
    # Bytes as characters of up to two bytes; what stands for an empty text comes between all characters.
    return 2 if step.get("type") == "ByteLevel" or "add_prefix_space" in step or "" in step.values() else 1


def _num_bytes(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else 0


def _check_ids(value: dict[str, Any]) -> None:
    """Raise a `ValueError` unless the values are token ids."""
    for token, number in value.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{token[:40]!r}, whose value is no token id")


def _check_special_tokens(value: dict[str, Any]) -> None:
    """Raise a `ValueError` unless the values are tokens, or several of them."""
    for name, token in value.items():
        several = token if isinstance(token, list) else token.values() if isinstance(token, dict) else None
        if not (token is None or _is_token(token) or (several is not None and all(map(_is_token, several)))):
            raise ValueError(f"{name[:40]!r}, whose value is no token")


def _check_config(value: dict[str, Any]) -> None:
    """Raise a `ValueError` unless the tokens that a `tokenizer_config.json` names are tokens."""
    _check_special_tokens({key: value[key] for key in _SPECIAL_TOKENS if key in value})
    added = value.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or not all(map(_is_token, added.values())):
        raise ValueError("'added_tokens_decoder', whose values are no tokens")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


_TEXTS: dict[str, Callable[[str], None]] = {"merges.txt": _check_merges, "vocab.txt": _check_vocabulary}
NAMED_TEXTS = tuple(_TEXTS)
_OBJECTS: dict[str, Callable[[dict[str, Any]], None]] = {
    **dict.fromkeys(_OBJECT_NAMES, lambda value: None),
    CONFIG_NAME: _check_config,
    HUGGING_FACE_NAME: _check_definition,
    "vocab.json": _check_ids,
    "added_tokens.json": _check_ids,
    "special_tokens_map.json": _check_special_tokens,
}
