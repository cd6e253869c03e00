"""Tokens that must never stand for a text's own characters, and a `tokenizer.json` in which no text spells them.

Such a token ends a document, begins a turn of a chat or marks a place. A source file that holds its spelling, say
`<|im_start|>` in a template, is ordinary text.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_META_SPACE = "\u2581"  # how sentencepiece writes a space
# Names that versions of transformers give the others, in a list or by a name of their own.
_LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_SINGLE_TOKENS = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")
# Noncharacters, which are "never used for text" (Unicode, chapter 23.7). A text that has them all the same, in this
# very order and around the same number, is found afterwards by its ids.
_PLACEHOLDER = "\ufdd0{}\ufdd1"


def is_ordinary_text(spelling: str) -> bool:
    """Whether a token that is matched before all others is text all the same: white space, or one visible character.

    Tokenizers list runs of spaces and line ends this way so that they are never split, and single characters that
    their model cannot build otherwise. Every longer spelling could be a marker.
    """
    plain = spelling.replace(_META_SPACE, " ")
    return plain.isspace() or (len(plain) == 1 and plain.isprintable())


def named_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Spellings that a tokenizer's configuration calls special, the one for unknown characters left out.

    Args:
        config: the contents of `tokenizer_config.json`; entries of unexpected types are passed over.
    """
    added = config.get("added_tokens_decoder")
    candidates = [config.get(key) for key in _SINGLE_TOKENS]
    for key in _LISTED_TOKENS:
        listed = config.get(key)
        candidates += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    candidates += [
        token
        for token in (added.values() if isinstance(added, dict) else ())
        if isinstance(token, dict) and token.get("special")
    ]
    for candidate in candidates:
        spelling = candidate.get("content") if isinstance(candidate, dict) else candidate
        if isinstance(spelling, str) and spelling and spelling != _unknown_of_config(config):
            yield spelling


def _unknown_of_config(config: Mapping[str, Any]) -> str | None:
    token = config.get("unk_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def added_control_tokens(definition: Mapping[str, Any]) -> Iterator[str]:
    """Spellings of the added tokens of a `tokenizer.json` that are more than text, flagged as special or not."""
    unknown = _unknown_of_model(definition)
    for token in definition.get("added_tokens") or []:
        spelling = token["content"]
        if spelling != unknown and (token.get("special") or not is_ordinary_text(spelling)):
            yield spelling


def without_spellings(definition: dict[str, Any], spellings: Collection[str]) -> dict[str, Any]:
    """A `tokenizer.json` that gives the same ids, but which no text reaches by one of these spellings.

    The spellings are replaced by ones that texts do not have, among the added tokens and in the model's vocabulary:
    the library looks a token up there by its spelling, also when it is told not to recognise special tokens. Merges
    that make such a token go.

    Args:
        definition: the contents of a `tokenizer.json`; it is not changed.
        spellings: of control tokens.
    """
    renamed = {spelling: _PLACEHOLDER.format(number) for number, spelling in enumerate(sorted(spellings))}
    unknown = _unknown_of_model(definition)
    added = []
    for token in definition.get("added_tokens") or []:
        if token["content"] in renamed:
            token = token | {"content": renamed[token["content"]], "special": True, "normalized": False}
        elif token["content"] == unknown:
            token = token | {"special": True}
        added.append(token)
    model = dict(definition["model"])
    in_model = {spelling: other for spelling, other in renamed.items() if spelling != unknown}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {in_model.get(spelling, spelling): number for spelling, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        model["vocab"] = [[in_model.get(spelling, spelling), score] for spelling, score in vocabulary]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes_one_of(merge, in_model)]
    return definition | {"added_tokens": added, "model": model}


def _makes_one_of(merge: str | list[str], spellings: Collection[str]) -> bool:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first + second in spellings or first in spellings or second in spellings


def _unknown_of_model(definition: Mapping[str, Any]) -> str | None:
    """Spelling of the token that the model gives for unknown characters: it is looked up by it."""
    model = definition["model"]
    unknown = model.get("unk_token")
    if unknown is None and isinstance(model.get("unk_id"), int) and isinstance(model.get("vocab"), list):
        entry = model["vocab"][model["unk_id"] : model["unk_id"] + 1]
        unknown = entry[0][0] if entry else None
    return unknown if isinstance(unknown, str) else None
