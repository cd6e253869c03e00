"""Bytes of tokens, for tokenizers whose text is exactly the bytes of its tokens in a row."""

from collections.abc import Callable, Mapping
from typing import Any

# Decoders whose text is that: what `ByteLevel` names bytes by. A sequence of steps, or another one, is not looked into.
_BYTE_LEVEL = "ByteLevel"


class TokenBytes(dict[int, bytes]):
    """Bytes of each token id, found when it is first asked for."""

    def __init__(self, spelling: Callable[[int], str | None]):
        super().__init__()
        self._spelling = spelling

    def __missing__(self, token: int) -> bytes:
        spelling = self._spelling(token)
        if spelling is None:
            raise KeyError(token)
        named = [_BYTES.get(character) for character in spelling]
        # A spelling with any other character is a text as it is, an added token of spaces for instance.
        known = [byte for byte in named if byte is not None]
        self[token] = bytes(known) if len(known) == len(named) else spelling.encode()
        return self[token]


def token_bytes(definition: Mapping[str, Any], spelling: Callable[[int], str | None]) -> TokenBytes | None:
    """Bytes of the tokens of a `tokenizer.json`; None where its decoder does more than to put bytes in a row.

    Args:
        definition: the contents of a `tokenizer.json`.
        spelling: of a token id, None for an id without a token.
    """
    decoder = definition.get("decoder")
    is_plain = isinstance(decoder, dict) and decoder.get("type") == _BYTE_LEVEL
    return TokenBytes(spelling) if is_plain else None


def _byte_names() -> dict[str, int]:
    """The characters by which GPT-2 and its successors name bytes: visible ones themselves, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_names()
