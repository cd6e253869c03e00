"""What a tokenizer does, and the two kinds of it: sentencepiece models and files of the tokenizers library."""

import hashlib
import itertools
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ebft_mega.data.tokenizers.token_bytes import TokenBytes
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import is_of_parser

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
REPLACEMENT = "\ufffd"  # shown for an id without a token
META_SPACE = "\u2581"  # how sentencepiece writes a space
# Part of a tokenizer's identity: which token ids a text gets from the same files and library.
_ENCODING_VERSION = 2


class Tokenizer(Protocol):
    """Text to token ids and back, without special tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document; None: documents have none, whatever the tokenizer's files name."""

    @property
    def sha256(self) -> str:
        """Same value as `tokenizer_sha256` of the directory that it came from."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that `copy_tokenizer` copies."""

    @property
    def main_file(self) -> str:
        """Name of the file that decides how text becomes token ids."""

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text becomes: the end of a document, other special tokens, markers."""

    @property
    def identity(self) -> str:
        """Hash of everything that decides which ids a document gets: files, begin and end, library, this code."""

    @property
    def library(self) -> str:
        """Name and version of the library that encodes."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the directory is not used although it is there, one sentence each."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognised.

        Raises:
            InputError: the tokenizer has no token for a character, or no other one than a control token.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; an id that is none, and bytes that are no complete UTF-8 character, become U+FFFD."""

    def spelling(self, token: int) -> str:
        """How the tokenizer's files write a token."""

    def gives_back(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids decode to exactly this text, ids of its own `encode`."""


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A sentencepiece model."""

    vocab_size: int
    eos_id: int
    sha256: str
    files: tuple[Path, ...]
    processor: Any = field(repr=False)
    encoder: Any = field(repr=False)  # the same with control pieces for what no text may become
    # Ids of the byte tokens that spell the meta space; () where the model has none.
    meta_space_ids: tuple[int, ...] = field(repr=False)
    control_ids: frozenset[int] = field(default=frozenset(), repr=False)
    notes: tuple[str, ...] = ()
    bos_id: int | None = None

    @property
    def main_file(self) -> str:
        """See `Tokenizer.main_file`."""
        return SENTENCEPIECE_NAME

    @property
    def library(self) -> str:
        """See `Tokenizer.library`."""
        return f"sentencepiece {version('sentencepiece')}"

    @property
    def identity(self) -> str:
        """See `Tokenizer.identity`."""
        return _identity(self)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        if not self.meta_space_ids or META_SPACE not in text:
            return _without_control(self.encoder.encode(text), self)
        # sentencepiece would turn this character into a space; encoded as byte tokens it is preserved.
        first, *rest = text.split(META_SPACE)
        ids = self.encoder.encode(first)
        for part in rest:
            ids += self.meta_space_ids
            ids += self.encoder.encode(part)
        return _without_control(ids, self)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decoded(ids, range(self.vocab_size), self.processor.decode)

    def spelling(self, token: int) -> str:
        """See `Tokenizer.spelling`."""
        return str(self.processor.id_to_piece(token))

    def gives_back(self, ids: Sequence[int], text: str) -> bool:
        """See `Tokenizer.gives_back`."""
        return self.decode(ids) == text


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json` in the format of the tokenizers library."""

    vocab_size: int
    eos_id: int
    sha256: str
    files: tuple[Path, ...]
    backend: Any = field(repr=False)
    known_ids: frozenset[int] = field(repr=False)  # a vocabulary may have holes
    encoder: Any = field(default=None, repr=False)  # the same without the spellings that no text may become
    token_bytes: TokenBytes | None = field(default=None, repr=False)
    control_ids: frozenset[int] = field(default=frozenset(), repr=False)
    notes: tuple[str, ...] = ()
    bos_id: int | None = None

    @property
    def main_file(self) -> str:
        """See `Tokenizer.main_file`."""
        return HUGGING_FACE_NAME

    @property
    def library(self) -> str:
        """See `Tokenizer.library`."""
        return f"tokenizers {version('tokenizers')}"

    @property
    def identity(self) -> str:
        """See `Tokenizer.identity`."""
        return _identity(self)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            # Of one text: a fifth faster than `encode`, which also finds out where in the text each token lies.
            ids = self.encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:  # the library has no type of its own; for a character without a token, say
            if not is_of_parser(error):
                raise
            raise bad_input("text", "tokens", error, "a tokenizer with a token for every character") from error
        return _without_control(ids, self)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decoded(ids, self.known_ids, lambda known: self.backend.decode(known, skip_special_tokens=False))

    def spelling(self, token: int) -> str:
        """See `Tokenizer.spelling`."""
        return str(self.backend.id_to_token(token))

    def gives_back(self, ids: Sequence[int], text: str) -> bool:
        """See `Tokenizer.gives_back`."""
        # Bytes that are this text decode to it and nothing else; it takes a tenth of the time of decoding.
        if self.token_bytes is not None and b"".join(map(self.token_bytes.__getitem__, ids)) == text.encode():
            return True
        return self.decode(ids) == text


def _decoded(ids: Sequence[int], known_ids: Container[int], decode: Callable[[list[int]], str]) -> str:
    """Text of token ids; models have rows, and so ids, for which their tokenizer has no token."""
    tokens = list(map(int, ids))
    if all(map(known_ids.__contains__, set(tokens))):
        return decode(tokens)
    text = ""
    last: list[int] = []
    for is_known, group in itertools.groupby(tokens, key=known_ids.__contains__):
        run = list(group)
        if not is_known:
            text += REPLACEMENT * len(run)
            continue
        # Tokenizers treat the beginning of a text in their own way, and this run is not at one.
        before, both = decode(last), decode(last + run)
        text += both.removeprefix(before) if both.startswith(before) else decode(run)
        last = run[-1:]
    return text


def _without_control(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids of a text.

    Raises:
        InputError: there is a control token among them, the one for unknown characters being one, for instance.
    """
    if tokenizer.control_ids.isdisjoint(ids):
        return ids
    token = next(token for token in ids if token in tokenizer.control_ids)
    name = "the end of a document" if token == tokenizer.eos_id else "a control token"
    expected = "a tokenizer that writes every text with ordinary tokens"
    raise bad_input("text", "tokens", f"token {token}, {name} ({tokenizer.decode([token])!r})", expected)


def _identity(tokenizer: Tokenizer) -> str:
    deciding = [tokenizer.sha256, tokenizer.eos_id, tokenizer.vocab_size, sorted(tokenizer.control_ids)]
    begin = [] if tokenizer.bos_id is None else [{"bos_id": tokenizer.bos_id}]
    return hashlib.sha256(json.dumps([*deciding, tokenizer.library, _ENCODING_VERSION, *begin]).encode()).hexdigest()
