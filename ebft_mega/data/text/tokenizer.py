"""One tokenizer interface over sentencepiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) files.

Both treat text as plain text: a special token's spelling inside source code becomes ordinary tokens, never the
special id. No code from a tokenizer directory is run. The libraries are imported when a tokenizer is loaded.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ebft_mega.data.text.control_tokens import (
    added_control_tokens,
    is_ordinary_text,
    named_tokens,
    without_spellings,
)
from ebft_mega.data.text.sentencepiece_file import describe_other_kind, user_defined_symbols, with_control_pieces
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
        """Hash of everything that decides which ids a text gets: files, end-of-document token, library, this code."""

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
        if not self.meta_space_ids or _META_SPACE not in text:
            return _without_control(self.encoder.encode(text), self)
        # sentencepiece would turn this character into a space; encoded as byte tokens it is preserved.
        first, *rest = text.split(_META_SPACE)
        ids = self.encoder.encode(first)
        for part in rest:
            ids += self.meta_space_ids
            ids += self.encoder.encode(part)
        return _without_control(ids, self)

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
    encoder: Any = field(default=None, repr=False)  # the same without the spellings that no text may become
    control_ids: frozenset[int] = field(default=frozenset(), repr=False)
    notes: tuple[str, ...] = ()

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
            ids = self.encoder.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library has no type of its own; for a character without a token, say
            raise bad_input("text", "tokens", error, "a tokenizer with a token for every character") from error
        return _without_control(ids, self)

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
    return hashlib.sha256(json.dumps([*deciding, tokenizer.library, _ENCODING_VERSION]).encode()).hexdigest()


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Load the tokenizer of a directory.

    `tokenizer.model` is preferred where both kinds are present and it is a sentencepiece model.

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


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that are there, and nothing else of its directory."""
    return tuple(directory / name for name in TOKENIZER_FILES if (directory / name).is_file())


def _main_file(directory: Path) -> Path | None:
    """The file that decides how text becomes token ids; None where there is none."""
    sentencepiece, hugging_face = directory / SENTENCEPIECE_NAME, directory / HUGGING_FACE_NAME
    if not sentencepiece.is_file():
        return hugging_face if hugging_face.is_file() else None
    if hugging_face.is_file() and describe_other_kind(sentencepiece.read_bytes()):
        return hugging_face
    return sentencepiece


def _preference(main_file: Path) -> list[str]:
    """Say which other file would also say how text becomes token ids, and why it is not used."""
    other = main_file.with_name(HUGGING_FACE_NAME if main_file.name == SENTENCEPIECE_NAME else SENTENCEPIECE_NAME)
    if not other.is_file():
        return []
    if other.name == HUGGING_FACE_NAME:
        return [f"{other.name} is not used: {main_file.name} beside it is preferred"]
    return [f"{other.name} is not used: it is {describe_other_kind(other.read_bytes())}; {main_file.name} is used"]


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    content = path.read_bytes()
    expected = f"a sentencepiece model, or the model's {HUGGING_FACE_NAME} beside it"
    if other_kind := describe_other_kind(content):
        raise bad_input(str(path), "tokenizer", other_kind, expected)
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise bad_input(str(path), "tokenizer", str(error), expected) from error
    config = _read_config(path.parent)
    size = processor.vocab_size()
    ids = {processor.id_to_piece(token): token for token in range(size)}
    eos_id = processor.eos_id()
    notes = _preference(path)
    if eos_id < 0:
        eos_id = _eos_from_config(path.parent, config, ids.get)
    elif (named := _spelling(config, "eos_token")) and named != processor.id_to_piece(eos_id):
        own = processor.id_to_piece(eos_id)
        notes.append(f"eos_token {named!r} of {CONFIG_NAME} is not used: {path.name} ends documents with {own!r}")
    control = {token for token in range(size) if processor.is_control(token)}
    ordinary_symbols = set()
    for token, symbol in user_defined_symbols(content).items():
        (ordinary_symbols if is_ordinary_text(symbol) else control).add(token)
    for named in named_tokens(config):
        if not is_ordinary_text(named) and not _is_unknown_or_byte(processor, ids.get(named)):
            control.add(ids[named])
    control.add(eos_id)
    changed = {token for token in control if not processor.is_control(token)}
    changed -= {processor.unk_id()}
    encoder = SentencePieceProcessor(model_proto=with_control_pieces(content, changed)) if changed else processor
    return SentencePieceTokenizer(
        vocab_size=size,
        eos_id=eos_id,
        sha256=str(tokenizer_sha256(path.parent)),
        files=tokenizer_files(path.parent),
        processor=processor,
        encoder=encoder,
        meta_space_ids=_meta_space_ids(processor),
        control_ids=frozenset(control),
        notes=tuple(notes),
    )


def _is_unknown_or_byte(processor: Any, token: int | None) -> bool:
    return token is None or processor.is_unknown(token) or processor.is_byte(token)


def _meta_space_ids(processor: Any) -> tuple[int, ...]:
    pieces = processor.encode("x", out_type=str)
    if pieces and pieces[0].startswith(_META_SPACE):
        return ()  # the model prefixes every text with a space, so a text cannot be encoded in parts
    ids = tuple(processor.piece_to_id(f"<0x{byte:02X}>") for byte in _META_SPACE.encode())
    return ids if all(processor.is_byte(token) for token in ids) else ()


def _load_hugging_face(path: Path) -> HuggingFaceTokenizer:
    definition = read_json_object(path, "a tokenizer of the tokenizers library")
    if not isinstance(definition.get("model"), dict):
        raise bad_input(str(path), "model", "missing", "a tokenizer of the tokenizers library")
    backend = _backend(path, definition)
    config = _read_config(path.parent)
    eos_id = _eos_from_config(path.parent, config, backend.token_to_id)
    spellings = {named for named in named_tokens(config) if not is_ordinary_text(named)}
    spellings |= {*added_control_tokens(definition), backend.id_to_token(eos_id)}
    ids = {backend.token_to_id(spelling) for spelling in spellings} - {None}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    encoder = _backend(path, without_spellings(definition, spellings & set(vocabulary)))
    others = {spelling: number for spelling, number in vocabulary.items() if number not in ids}
    if others.items() - encoder.get_vocab(with_added_tokens=True).items():
        expected = "a tokenizer whose special tokens can be told from text"
        raise bad_input(str(path), "added_tokens", "other ids without the special tokens", expected)
    return HuggingFaceTokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=eos_id,
        sha256=str(tokenizer_sha256(path.parent)),
        files=tokenizer_files(path.parent),
        backend=backend,
        known_ids=frozenset(vocabulary.values()),
        encoder=encoder,
        control_ids=frozenset(ids),
        notes=tuple(_preference(path)),
    )


def _backend(path: Path, definition: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(json.dumps(definition))
    except Exception as error:  # the library has no type of its own
        raise bad_input(str(path), "tokenizer", error, "a tokenizer of the tokenizers library") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_config(directory: Path) -> dict[str, Any]:
    """The tokenizer's configuration; nothing where there is none."""
    path = directory / CONFIG_NAME
    return read_json_object(path, "a tokenizer configuration") if path.exists() else {}


def _spelling(config: Mapping[str, Any], key: str) -> str | None:
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _eos_from_config(directory: Path, config: Mapping[str, Any], token_to_id: Callable[[str], int | None]) -> int:
    """End-of-document id from the `eos_token` of the tokenizer's configuration."""
    path = directory / CONFIG_NAME
    if not path.exists():
        raise bad_input(str(path), CONFIG_NAME, "no such file", "a tokenizer configuration that names eos_token")
    token = _spelling(config, "eos_token")
    eos_id = None if token is None else token_to_id(token)
    if eos_id is None:
        raise bad_input(str(path), "eos_token", repr(config.get("eos_token")), "a token of the vocabulary")
    return int(eos_id)
