"""Which tokens begin and end a document: what a tokenizer's files say, and what a person chooses instead."""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_mega.data.tokenizers.tokenizer_files import CONFIG_NAME, read_tokenizer_values
from ebft_mega.data.tokenizers.tokenizer_kinds import HUGGING_FACE_NAME
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.input_errors import bad_input

END_OPTION, BEGIN_OPTION = "--end-of-document", "--add-bos"
_LISTED = 8  # special tokens, in a message
# Classes of transformers that put the token before every text unless their configuration says otherwise.
_BEGINNING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_USUAL_BEGIN = {"LlamaTokenizer": "<s>", "CodeLlamaTokenizer": "<s>", "GemmaTokenizer": "<bos>"}


def chosen_end(
    text: str,
    ids: Collection[int],
    token_of: Callable[[str], int | None],
    encode: Callable[[str], Sequence[int]],
    special: Mapping[str, int],
) -> int:
    """The token that a person names as the end of a document.

    Args:
        text: its id, or a text that is exactly one token.
        ids: of the tokens that can be chosen.
        token_of: the id of a token by its spelling.
        encode: ids of a text.
        special: ids of the special tokens, for the message.

    Raises:
        InputError: it is none; the nearest special tokens, or some of them, are named.
    """
    if text.isascii() and text.isdigit():
        known = set(ids)
        if len(text) <= len(str(max(known))) and int(text) in known:
            return int(text)
        raise _no_end(f"the id {text:.40}", f"the id of a token, at most {max(known)}", text, special)
    token = token_of(text)
    if token is None:
        found = encode(text) if text else ()
        if len(found) != 1:
            raise _no_end(f"{text!r:.100}, which is {len(found)} tokens", "one token, or an id", text, special)
        token = found[0]
    if token not in set(ids):
        raise _no_end(f"{text!r:.100}, a byte or the token for unknown characters", "another token", text, special)
    return int(token)


def _no_end(found: str, expected: str, text: str, special: Mapping[str, int]) -> InputError:
    near = difflib.get_close_matches(text, special, n=3, cutoff=0.5)
    names = near or sorted(special, key=special.__getitem__)[:_LISTED]
    more = ", ..." if not near and len(special) > _LISTED else ""
    words = ", ".join(f"{name!r} ({special[name]})" for name in names)
    listed = f"; {'nearest' if near else 'special tokens'}: {words}{more}" if names else ""
    return bad_input("command line", END_OPTION, found, expected + listed)


def begin_spelling(values: Mapping[str, Any]) -> str | None:
    """The token that a tokenizer has for the begin of a document, by its files; None where they name none.

    Args:
        values: JSON files of the tokenizer by name, see `read_tokenizer_values`.
    """
    config = values.get(CONFIG_NAME, {})
    named = _spelling(config.get("bos_token"))
    if named is None:
        named = _template_begin(values.get(HUGGING_FACE_NAME, {})) or _USUAL_BEGIN.get(_class_of(config))
    return named


def added_begin(values: Mapping[str, Any]) -> str | None:
    """The token that a tokenizer, as its model was trained with it, puts before every text; None if it puts none.

    Args:
        values: as `begin_spelling`.
    """
    config = values.get(CONFIG_NAME, {})
    says = config.get("add_bos_token")
    if isinstance(says, bool):
        return begin_spelling(values) if says else None
    if HUGGING_FACE_NAME in values:
        return _template_begin(values[HUGGING_FACE_NAME])
    return begin_spelling(values) if _class_of(config) in _BEGINNING else None


def added_begin_of(directory: Path) -> str | None:
    """`added_begin` of a directory, without a tokenizer library; None where there is no tokenizer that can be read."""
    try:
        return added_begin(read_tokenizer_values(directory)[1])
    except InputError:
        return None  # a file that is none of these has a refusal of its own


def no_begin(directory: Path) -> InputError:
    """The refusal of `--add-bos` for a tokenizer that has no such token."""
    expected = f"a tokenizer whose {CONFIG_NAME} names bos_token, or no {BEGIN_OPTION}"
    return InputError([Problem(str(directory), BEGIN_OPTION, "no token for the begin of a document", expected)])


def _template_begin(definition: Mapping[str, Any]) -> str | None:
    """The special token with which the template of a `tokenizer.json` begins."""
    for step in _steps(definition.get("post_processor")):
        template = step.get("single")
        first = template[0] if isinstance(template, list) and template else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict) and isinstance(special.get("id"), str):
            return str(special["id"])
    return None


def _steps(processor: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(processor, dict):
        yield processor
        inner = processor.get("processors")
        yield from (step for step in (inner if isinstance(inner, list) else ()) if isinstance(step, dict))


def _class_of(config: Mapping[str, Any]) -> str:
    name = config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _spelling(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None
