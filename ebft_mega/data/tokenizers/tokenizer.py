"""One tokenizer interface over sentencepiece (`tokenizer.model`) and Hugging Face (`tokenizer.json`) files.

Both treat text as plain text: a special token's spelling inside source code becomes ordinary tokens, never the
special id. No code from a tokenizer directory is run. The libraries are imported when a tokenizer is loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ebft_mega.data.tokenizers.document_marks import BEGIN_OPTION, added_begin, begin_spelling, chosen_end, no_begin
from ebft_mega.data.tokenizers.token_bytes import token_bytes
from ebft_mega.data.tokenizers.tokenizer_control import (
    added_control_tokens,
    is_ordinary_text,
    named_tokens,
    without_spellings,
)
from ebft_mega.data.tokenizers.tokenizer_files import (
    CONFIG_NAME,
    in_place_of_tokenizer,
    read_tokenizer_file,
    read_tokenizer_files,
    read_tokenizer_values,
)
from ebft_mega.data.tokenizers.tokenizer_kinds import (
    HUGGING_FACE_NAME,
    META_SPACE,
    SENTENCEPIECE_NAME,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from ebft_mega.data.tokenizers.tokenizer_model_file import (
    describe_other_kind,
    user_defined_symbols,
    with_control_pieces,
)
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import is_of_parser, reading


def load_tokenizer(directory: Path | str, end_of_document: str | None = None, add_bos: bool = False) -> Tokenizer:
    """Load the tokenizer of a directory.

    `tokenizer.model` is preferred where both kinds are present and it is a sentencepiece model.

    Args:
        directory: sentencepiece or Hugging Face.
        end_of_document: the token that ends documents, an id or a text that is one token; None: what the files name.
        add_bos: documents begin with the token that the files name for that.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or it has no such token.
    """
    directory = Path(directory)
    contents, values = read_tokenizer_values(directory)
    if SENTENCEPIECE_NAME not in contents and HUGGING_FACE_NAME not in contents:
        raise bad_input(str(directory), "tokenizer", *in_place_of_tokenizer(directory))
    is_sentencepiece = SENTENCEPIECE_NAME in contents
    name = SENTENCEPIECE_NAME if is_sentencepiece else HUGGING_FACE_NAME
    with reading(directory / name, "tokenizer", "a tokenizer that can be loaded"):
        load = _load_sentencepiece if is_sentencepiece else _load_hugging_face
        return load(directory, contents, values, end_of_document, add_bos)


def tokenizer_sha256(directory: Path | str) -> str | None:
    """Hash of the file that decides how text becomes token ids; None where there is no tokenizer.

    Files that may be rewritten without changing an id (`tokenizer_config.json` with its templates) are left
    out, so a copy of the directory, and a model exported with it, keep the hash.
    """
    found = main_tokenizer_file(Path(directory))
    return None if found is None else _sha256(*found)


def copy_tokenizer(source: Path | str, destination: Path | str) -> None:
    """Copy the tokenizer files of one directory into another, which is made if missing.

    What is written is what was checked to be what it is named (see `read_tokenizer_files`).

    Raises:
        InputError: the source holds no tokenizer, or a file that is not what its name says, or leads elsewhere.
    """
    source, destination = Path(source), Path(destination)
    contents = read_tokenizer_files(source)
    if main_tokenizer_file(source) is None:
        raise bad_input(str(source), "tokenizer", "no tokenizer", "a tokenizer directory")
    destination.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (destination / name).write_bytes(content)


def main_tokenizer_file(directory: Path) -> tuple[str, bytes] | None:
    """Name and contents of the file that decides how text becomes token ids; None where there is none.

    Raises:
        InputError: it cannot be read, or lies outside of the directory.
    """
    model = _content_of(directory, SENTENCEPIECE_NAME)
    has_other = os.path.lexists(directory / HUGGING_FACE_NAME)
    if model is not None and not (has_other and describe_other_kind(model)):
        return SENTENCEPIECE_NAME, model
    definition = _content_of(directory, HUGGING_FACE_NAME)
    return None if definition is None else (HUGGING_FACE_NAME, definition)


def _content_of(directory: Path, name: str) -> bytes | None:
    """A file of a tokenizer; None where there is none."""
    return read_tokenizer_file(directory, name) if os.path.lexists(directory / name) else None


def _sha256(name: str, content: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()


def _preference(directory: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Say which other file would also say how text becomes token ids, and why it is not used."""
    if SENTENCEPIECE_NAME in contents:
        words = f"{HUGGING_FACE_NAME} is not used: {SENTENCEPIECE_NAME} beside it is preferred"
        return [words] * (HUGGING_FACE_NAME in contents)
    other = _content_of(directory, SENTENCEPIECE_NAME)
    if other is None:
        return []
    return [f"{SENTENCEPIECE_NAME} is not used: it is {describe_other_kind(other)}; {HUGGING_FACE_NAME} is used"]


def _unwritten_begin(values: Mapping[str, Any], add_bos: bool) -> list[str]:
    """Say which token a tokenizer puts before every text that is not written."""
    begin = None if add_bos else added_begin(values)
    words = f"{begin!r}, which the tokenizer puts before a text, begins no document here ({BEGIN_OPTION} writes it)"
    return [] if begin is None else [words]


def _load_sentencepiece(
    directory: Path, contents: Mapping[str, bytes], values: Mapping[str, Any], end: str | None, add_bos: bool
) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    path, content = directory / SENTENCEPIECE_NAME, contents[SENTENCEPIECE_NAME]
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        expected = f"a sentencepiece model, or the model's {HUGGING_FACE_NAME} beside it"
        raise bad_input(str(path), "tokenizer", str(error), expected) from error
    config = values.get(CONFIG_NAME, {})
    size = processor.vocab_size()
    ids = {processor.id_to_piece(token): token for token in range(size)}
    eos_id = processor.eos_id()
    notes = [*_preference(directory, contents), *_unwritten_begin(values, add_bos)]
    if end is not None:
        special = {processor.id_to_piece(token): token for token in range(size) if processor.is_control(token)}
        texts = [token for token in range(size) if not _is_unknown_or_byte(processor, token)]
        eos_id = chosen_end(end, texts, ids.get, processor.encode, special)
    elif eos_id < 0:
        eos_id = _eos_from_config(directory, config, ids.get)
    elif (named := _spelling(config, "eos_token")) and named != processor.id_to_piece(eos_id):
        own = processor.id_to_piece(eos_id)
        notes.append(f"eos_token {named!r} of {CONFIG_NAME} is not used: {path.name} ends documents with {own!r}")
    control = {token for token in range(size) if processor.is_control(token)}
    symbols = user_defined_symbols(content)
    control |= {token for token, symbol in symbols.items() if not is_ordinary_text(symbol)}
    for named in named_tokens(config):
        if not is_ordinary_text(named) and not _is_unknown_or_byte(processor, ids.get(named)):
            control.add(ids[named])
    begin = ids.get(begin_spelling(values) or "", processor.bos_id()) if add_bos else None
    if begin is not None and begin < 0:
        raise no_begin(directory)
    control |= {token for token in (eos_id, begin) if token is not None}
    changed = {token for token in control if not processor.is_control(token)}
    changed -= {processor.unk_id()}
    encoder = SentencePieceProcessor(model_proto=with_control_pieces(content, changed)) if changed else processor
    return SentencePieceTokenizer(
        vocab_size=size,
        eos_id=eos_id,
        sha256=_sha256(SENTENCEPIECE_NAME, content),
        files=tuple(directory / name for name in contents),
        processor=processor,
        encoder=encoder,
        meta_space_ids=_meta_space_ids(processor),
        control_ids=frozenset(control),
        notes=tuple(notes),
        bos_id=begin,
    )


def _is_unknown_or_byte(processor: Any, token: int | None) -> bool:
    return token is None or processor.is_unknown(token) or processor.is_byte(token)


def _meta_space_ids(processor: Any) -> tuple[int, ...]:
    pieces = processor.encode("x", out_type=str)
    if pieces and pieces[0].startswith(META_SPACE):
        return ()  # the model prefixes every text with a space, so a text cannot be encoded in parts
    ids = tuple(processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode())
    return ids if all(processor.is_byte(token) for token in ids) else ()


def _load_hugging_face(
    directory: Path, contents: Mapping[str, bytes], values: Mapping[str, Any], end: str | None, add_bos: bool
) -> HuggingFaceTokenizer:
    path, content = directory / HUGGING_FACE_NAME, contents[HUGGING_FACE_NAME]
    definition = values[HUGGING_FACE_NAME]
    backend = _backend(path, content.decode("utf-8"))
    config = values.get(CONFIG_NAME, {})
    vocabulary = backend.get_vocab(with_added_tokens=True)
    spellings = {named for named in named_tokens(config) if not is_ordinary_text(named)}
    spellings |= {*added_control_tokens(definition)}
    if end is None:
        eos_id = _eos_from_config(directory, config, vocabulary.get)
    else:
        special = {spelling: vocabulary[spelling] for spelling in spellings & set(vocabulary)}
        encode = partial(backend.encode, add_special_tokens=False)
        eos_id = chosen_end(end, vocabulary.values(), vocabulary.get, lambda text: encode(text).ids, special)
    bos_id = vocabulary.get(begin_spelling(values) or "") if add_bos else None
    if add_bos and bos_id is None:
        raise no_begin(directory)
    spellings |= {backend.id_to_token(token) for token in (eos_id, bos_id) if token is not None}
    ids = {backend.token_to_id(spelling) for spelling in spellings} - {None}
    encoder = _backend(path, json.dumps(without_spellings(definition, spellings & set(vocabulary))))
    others = {spelling: number for spelling, number in vocabulary.items() if number not in ids}
    if others.items() - encoder.get_vocab(with_added_tokens=True).items():
        expected = "a tokenizer whose special tokens can be told from text"
        raise bad_input(str(path), "added_tokens", "other ids without the special tokens", expected)
    return HuggingFaceTokenizer(
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=eos_id,
        sha256=_sha256(HUGGING_FACE_NAME, content),
        files=tuple(directory / name for name in contents),
        backend=backend,
        known_ids=frozenset(vocabulary.values()),
        encoder=encoder,
        token_bytes=token_bytes(definition, backend.id_to_token),
        control_ids=frozenset(ids),
        notes=(*_preference(directory, contents), *_unwritten_begin(values, add_bos)),
        bos_id=bos_id,
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
        if not is_of_parser(error):
            raise
        raise ValueError(f"no tokenizer that can be loaded ({error})") from None


def _backend(path: Path, definition: str) -> Any:
    # One text at a time is encoded, and a thread of its own for that only costs; processes share the machine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        backend = parse_definition(definition)
    except ValueError as error:
        raise bad_input(str(path), "tokenizer", error, "a tokenizer of the tokenizers library") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


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
