"""Say in words how two tokenizers differ, from their files alone: no tokenizer library is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebft_mega.data.tokenizers.tokenizer import main_tokenizer_file
from ebft_mega.data.tokenizers.tokenizer_kinds import SENTENCEPIECE_NAME
from ebft_mega.errors import InputError

_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def tokenizer_difference(first: Path, second: Path) -> str:
    """How the tokenizers of two directories differ: kind, number of tokens, tokens with other ids, other parts.

    Args:
        first, second: tokenizer directories.
    Returns:
        Words about the first beside the second; empty where the files say nothing of it.
    """
    try:
        file, other = main_tokenizer_file(first), main_tokenizer_file(second)
        if file is None or other is None:
            return ""
        if file[0] != other[0]:
            return f"{file[0]} beside {other[0]}"
        if file[0] == SENTENCEPIECE_NAME:
            return _of_tokens(_sentencepiece_tokens(file[1]), _sentencepiece_tokens(other[1]))
        return _of_definitions(json.loads(file[1]), json.loads(other[1]))
    except (InputError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return ""  # a file that is none of these has a refusal of its own


def _of_definitions(first: dict[str, Any], second: dict[str, Any]) -> str:
    models = [definition.get("model") or {} for definition in (first, second)]
    kinds = [str(model.get("type")) for model in models]
    words = [f"{kinds[0]} beside {kinds[1]}"] * (kinds[0] != kinds[1])
    words.append(_of_tokens(*(_vocabulary(model.get("vocab") or {}) for model in models)))
    if models[0].get("merges") != models[1].get("merges"):
        words.append("other merges")
    words += [f"another {part}" for part in _PARTS if first.get(part) != second.get(part)]
    return ", ".join(filter(None, words))


def _vocabulary(vocab: Any) -> dict[str, int]:
    """Ids by token; a unigram model lists tokens with scores in the order of their ids."""
    if isinstance(vocab, list):
        return {str(token[0]): number for number, token in enumerate(vocab)}
    return dict(vocab)


def _of_tokens(first: dict[str, int], second: dict[str, int]) -> str:
    if first == second:
        return ""
    sizes = f"{len(first)} tokens" + (f" beside {len(second)}" if len(first) != len(second) else " in both")
    others = sum(second.get(token) != number for token, number in first.items())
    return f"{sizes}, {others} of them with another id or none there"


def _sentencepiece_tokens(content: bytes) -> dict[str, int]:
    """Ids by token of a sentencepiece model: a protocol buffer whose field 1 repeats tokens, whose field 1 is text."""
    found: dict[str, int] = {}
    for number, token in enumerate(value for field, value in _fields(content) if field == 1):
        texts = [value for field, value in _fields(token) if field == 1]
        found[texts[0].decode()] = number
    return found


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protocol buffer that have a length; others are passed over.

    Raises:
        ValueError, IndexError: it is no protocol buffer.
    """
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(content, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(content, at)
            yield key >> 3, content[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
