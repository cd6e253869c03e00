"""One tokenizer interface over sentencepiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) files.

Both treat text as plain text: a special token's spelling inside source code becomes ordinary tokens, never the
special id. No code from a tokenizer directory is run. The libraries are imported when a tokenizer is loaded.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ebft_mega.data.text.tokenizer_control import (
    added_control_tokens,
    is_ordinary_text,
    named_tokens,
    without_spellings,
)
from ebft_mega.data.text.tokenizer_kinds import (
    HUGGING_FACE_NAME,
    META_SPACE,
    SENTENCEPIECE_NAME,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from ebft_mega.data.text.tokenizer_model_file import describe_other_kind, user_defined_symbols, with_control_pieces
from ebft_mega.io.input_errors import bad_input, read_json_object

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
    symbols = user_defined_symbols(content)
    control |= {token for token, symbol in symbols.items() if not is_ordinary_text(symbol)}
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
    if pieces and pieces[0].startswith(META_SPACE):
        return ()  # the model prefixes every text with a space, so a text cannot be encoded in parts
    ids = tuple(processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode())
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


def parse_definition(text: str) -> Any:
    """Load a tokenizer of the tokenizers library from the text of a `tokenizer.json`.

    Raises:
        ValueError: the library does not take it.
    """
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(text)
    except MemoryError:
        raise
    except BaseException as error:  # the panic of the library is no Exception, and neither is a request to stop
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"no tokenizer that can be loaded ({error})") from None


def _backend(path: Path, definition: Mapping[str, Any]) -> Any:
    try:
        backend = parse_definition(json.dumps(definition))
    except ValueError as error:
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
