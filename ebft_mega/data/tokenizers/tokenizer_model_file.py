"""Look into a `tokenizer.model` without sentencepiece: is it such a model, and which of its pieces texts may become.

The file is a protocol buffer, `sentencepiece_model.proto`: field 1 is repeated, one message for each piece, with the
piece's text (1), score (2) and type (3).
"""

import re
from collections.abc import Collection, Iterator

from ebft_mega.data.selection.text_formats import kind_of_bytes
from ebft_mega.data.text.file_kinds import JSON_LINES
from ebft_mega.io.input_errors import lfs_pointer

_PIECE_FIELD, _TRAINER_FIELD, _NORMALIZER_FIELD, _SELF_TEST_FIELD, _LAST_FIELD, _FIRST_EXTENSION = 1, 2, 3, 4, 5, 200
_TEXT_FIELD, _TYPE_FIELD = 1, 3
_VARINT, _EIGHT_BYTES, _MESSAGE, _FOUR_BYTES = 0, 1, 2, 5
_CHARSMAP_FIELD = 2  # of the two messages that say how texts are normalized, and how back
_CONTROL, _USER_DEFINED = 3, 4
_USER_DEFINED_BYTES = bytes([_TYPE_FIELD << 3 | _VARINT, _USER_DEFINED])

# How many times longer than a text a tokenizer's own rules may make it. Those of published tokenizers, which write a
# space as three bytes and one before each text, come to 12.
MOST_GROWTH = 64

# Files that people find under this name instead.
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")


class _DamagedError(ValueError):
    """Bytes that are no protocol buffer of a sentencepiece model."""


def describe_other_kind(content: bytes) -> str | None:
    """Say what a `tokenizer.model` is instead of a sentencepiece model that can be used; None where it is one.

    The messages are walked from the first byte to the last, so a truncated file is found, too.
    """
    if _RANK_LINE.match(content):
        return "a table of tokens and ranks (tiktoken)"
    if (pointer := lfs_pointer(content)) is not None:
        return pointer
    try:
        fields = {field for field, _, _, _ in _model_fields(content)}
        longest = max(map(longest_replacement, _charsmaps(content)), default=0)
    except _DamagedError:
        kind = kind_of_bytes(content)
        return kind.words if kind not in (None, JSON_LINES) else "no sentencepiece model, or a damaged one"
    if longest > MOST_GROWTH:
        return f"a sentencepiece model that replaces characters by {longest} bytes, where {MOST_GROWTH} are the most"
    # The trainer writes all three; a file that was cut between two pieces lacks the others.
    return None if fields >= {_PIECE_FIELD, _TRAINER_FIELD, _NORMALIZER_FIELD} else "no whole sentencepiece model"


def longest_replacement(charsmap: bytes) -> int:
    """Bytes of the longest text by which a compiled table of sentencepiece replaces characters.

    The table is the size of its index, the index, and the texts, each with a zero byte behind it.
    """
    index_bytes = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + index_bytes :].split(b"\0")))


def user_defined_symbols(content: bytes) -> dict[int, str]:
    """Pieces that stand for themselves wherever a text spells them, by id.

    Args:
        content: of a sentencepiece model.
    """
    found = {}
    number = 0
    for field, _, begin, end in _model_fields(content):
        if field != _PIECE_FIELD:
            continue
        message = content[begin:end]
        if _USER_DEFINED_BYTES in message:
            text, kind = b"", 1
            for inner, wire, first, last in _fields(message):
                if inner == _TEXT_FIELD and wire == _MESSAGE:
                    text = message[first:last]
                elif inner == _TYPE_FIELD and wire == _VARINT:
                    kind = _varint(message, first)[0]
            if kind == _USER_DEFINED:
                found[number] = text.decode("utf-8", "replace")
        number += 1
    return found


def with_control_pieces(content: bytes, ids: Collection[int]) -> bytes:
    """A model whose pieces of these ids are control pieces, which no text becomes; all ids stay what they are.

    Args:
        content: of a sentencepiece model.
        ids: of the pieces.
    """
    parts = []
    number = 0
    for field, start, begin, end in _model_fields(content):
        if field == _PIECE_FIELD:
            if number in ids:
                message = content[begin:end]
                kept = b"".join(
                    message[first:last] for inner, first, last in _whole_fields(message) if inner != _TYPE_FIELD
                )
                kept += bytes([_TYPE_FIELD << 3 | _VARINT, _CONTROL])
                parts.append(bytes([_PIECE_FIELD << 3 | _MESSAGE]) + _as_varint(len(kept)) + kept)
            else:
                parts.append(content[start:end])
            number += 1
        elif field != _SELF_TEST_FIELD:  # samples that the changed model may encode otherwise
            parts.append(content[start:end])
    return b"".join(parts)


def _charsmaps(content: bytes) -> Iterator[bytes]:
    for field, _, begin, end in _model_fields(content):
        if field in (_NORMALIZER_FIELD, _LAST_FIELD):
            message = content[begin:end]
            for inner, wire, first, last in _fields(message):
                if inner == _CHARSMAP_FIELD and wire == _MESSAGE:
                    yield message[first:last]


def _model_fields(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Field number, first byte of the field, first byte and end of its message."""
    at = 0
    while at < len(content):
        start = at
        tag, at = _varint(content, at)
        field = tag >> 3
        if tag & 7 != _MESSAGE or not (_PIECE_FIELD <= field <= _LAST_FIELD or field >= _FIRST_EXTENSION):
            raise _DamagedError
        size, at = _varint(content, at)
        if at + size > len(content):
            raise _DamagedError
        yield field, start, at, at + size
        at += size


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Field number, wire type, first byte and end of the value."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == _VARINT:
            end = _varint(message, at)[1]
        elif wire == _MESSAGE:
            size, at = _varint(message, at)
            end = at + size
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            end = at + (4 if wire == _FOUR_BYTES else 8)
        else:
            raise _DamagedError
        if end > len(message):
            raise _DamagedError
        yield tag >> 3, wire, at, end
        at = end


def _whole_fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Field number, first byte of the field, end of its value."""
    start = 0
    for field, _, _, end in _fields(message):
        yield field, start, end
        start = end


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise _DamagedError
        byte = content[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
