"""One tokenizer interface over sentencepiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) files.

Both treat text as plain text: a special token's spelling inside source code becomes ordinary tokens, never the
special id. No code from a tokenizer directory is run. The libraries are imported when a tokenizer is loaded.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ebft_mega.io.input_errors import bad_input, read_json_object

SENTENCEPIECE_NAME = "tokenizer.model"
HUGGING_FACE_NAME = "tokenizer.json"
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
REPLACEMENT = "\ufffd"  # shown for an id without a token
_META_SPACE = "\u2581"  # how sentencepiece writes a space


class Tokenizer(Protocol):
    """Text to token ids and back, without special tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""

    @property
    def sha256(self) -> str:
        """Same value as `tokenizer_sha256` of the directory that it came from."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that `copy_tokenizer` copies."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; an id that is none, and bytes that are no complete UTF-8 character, become U+FFFD."""


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A sentencepiece model."""

    vocab_size: int
    eos_id: int
    sha256: str
    files: tuple[Path, ...]
    processor: Any = field(repr=False)
    # Ids of the byte tokens that spell the meta space; () where the model has none.
    meta_space_ids: tuple[int, ...] = field(repr=False)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        if not self.meta_space_ids or _META_SPACE not in text:
            return self.processor.encode(text)
        # sentencepiece would turn this character into a space; encoded as byte tokens it is preserved.
        first, *rest = text.split(_META_SPACE)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.meta_space_ids
            ids += self.processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decoded(ids, range(self.vocab_size), self.processor.decode)


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json` in the format of the tokenizers library."""

    vocab_size: int
    eos_id: int
    sha256: str
    files: tuple[Path, ...]
    backend: Any = field(repr=False)
    known_ids: frozenset[int] = field(repr=False)  # a vocabulary may have holes

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decoded(ids, self.known_ids, lambda known: self.backend.decode(known, skip_special_tokens=False))


def _decoded(ids: Sequence[int], known_ids: Container[int], decode: Callable[[list[int]], str]) -> str:
    """Text of token ids; models have rows, and so ids, for which their tokenizer has no token."""
    tokens = [int(token) for token in ids]
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


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Load the tokenizer of a directory; `tokenizer.model` is preferred where both kinds are present.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or it names no end-of-document token.
    """
    directory = Path(directory)
    main_file = _main_file(directory)
    if main_file is None:
        expected = f"{SENTENCEPIECE_NAME} (sentencepiece) or {HUGGING_FACE_NAME} (Hugging Face)"
        found = "neither" if directory.is_dir() else "no such directory"
        raise bad_input(str(directory), "tokenizer", found, expected)
    if main_file.name == SENTENCEPIECE_NAME:
        return _load_sentencepiece(main_file)
    return _load_hugging_face(main_file)


def tokenizer_sha256(directory: Path | str) -> str | None:
    """Hash of the file that decides how text becomes token ids; None where there is no tokenizer.

    Files that may be rewritten without changing an id (`tokenizer_config.json` with its templates) are left
    out, so a copy of the directory, and a model exported with it, keep the hash.
    """
    main_file = _main_file(Path(directory))
    if main_file is None:
        return None
    return hashlib.sha256(main_file.name.encode() + b"\0" + main_file.read_bytes()).hexdigest()


def copy_tokenizer(source: Path | str, destination: Path | str) -> None:
    """Copy the tokenizer files of one directory into another, which is made if missing.

    Raises:
        InputError: the source holds no tokenizer.
    """
    source, destination = Path(source), Path(destination)
    if _main_file(source) is None:
        raise bad_input(str(source), "tokenizer", "no tokenizer", "a tokenizer directory")
    destination.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_files(source):
        shutil.copyfile(path, destination / path.name)


def _main_file(directory: Path) -> Path | None:
    for name in (SENTENCEPIECE_NAME, HUGGING_FACE_NAME):
        if (directory / name).is_file():
            return directory / name
    return None


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that are there, and nothing else of its directory."""
    return tuple(directory / name for name in TOKENIZER_FILES if (directory / name).is_file())


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise bad_input(str(path), "tokenizer", str(error), "a sentencepiece model") from error
    eos_id = processor.eos_id()
    if eos_id < 0:
        pieces = {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
        eos_id = _eos_from_config(path.parent, pieces.get)
    return SentencePieceTokenizer(
        vocab_size=processor.vocab_size(),
        eos_id=eos_id,
        sha256=str(tokenizer_sha256(path.parent)),
        files=tokenizer_files(path.parent),
        processor=processor,
        meta_space_ids=_meta_space_ids(processor),
    )


def _meta_space_ids(processor: Any) -> tuple[int, ...]:
    pieces = processor.encode("x", out_type=str)
    if pieces and pieces[0].startswith(_META_SPACE):
        return ()  # the model prefixes every text with a space, so a text cannot be encoded in parts
    ids = tuple(processor.piece_to_id(f"<0x{byte:02X}>") for byte in _META_SPACE.encode())
    return ids if all(processor.is_byte(token) for token in ids) else ()


def _load_hugging_face(path: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    definition = read_json_object(path, "a tokenizer of the tokenizers library")
    for token in definition.get("added_tokens") or []:
        # Markers such as <|fim_prefix|> are often flagged as ordinary added tokens. Flagged as special, their
        # spelling in a text does not become the marker's id.
        if re.fullmatch(r"<.*>", token["content"], re.DOTALL):
            token["special"] = True
    if not isinstance(definition.get("model"), dict):
        raise bad_input(str(path), "model", "missing", "a tokenizer of the tokenizers library")
    backend = Backend.from_str(json.dumps(definition))
    known_ids = frozenset(backend.get_vocab(with_added_tokens=True).values())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return HuggingFaceTokenizer(
        vocab_size=max(known_ids) + 1,
        eos_id=_eos_from_config(path.parent, backend.token_to_id),
        sha256=str(tokenizer_sha256(path.parent)),
        files=tokenizer_files(path.parent),
        backend=backend,
        known_ids=known_ids,
    )


def _eos_from_config(directory: Path, token_to_id: Callable[[str], int | None]) -> int:
    """End-of-document id from the `eos_token` of the tokenizer's configuration."""
    path = directory / CONFIG_NAME
    token = read_json_object(path, "a tokenizer configuration that names eos_token").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    eos_id = token_to_id(token) if isinstance(token, str) else None
    if eos_id is None:
        raise bad_input(str(path), "eos_token", repr(token), "a token of the vocabulary")
    return int(eos_id)
