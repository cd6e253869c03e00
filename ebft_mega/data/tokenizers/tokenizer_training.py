"""Train a sentencepiece tokenizer and check that it reproduces its input texts exactly."""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ebft_mega.data.selection.document_reader import Reader
from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.text_formats import FormatChoice
from ebft_mega.data.selection.text_limits import TextLimits
from ebft_mega.data.text.listing import (
    in_words,
)
from ebft_mega.data.text.text_files import (
    LONG_DOCUMENTS,
    BadText,
    ReadOptions,
)
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_files import CONFIG_NAME
from ebft_mega.data.tokenizers.tokenizer_kinds import SENTENCEPIECE_NAME
from ebft_mega.data.tokenizers.training_texts import TrainingTexts, documents_of_all, training_texts
from ebft_mega.errors import EbftError, InputError, Problem
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.output_directory import new_directory
from ebft_mega.io.progress_bar import track
from ebft_mega.io.standard_streams import print_line

CHUNK_CHARACTERS = 3500
MAX_VOCAB_SIZE = 1 << 20  # four times the largest in use; the trainer takes no number beyond 31 bits
MIN_VOCAB_SIZE = 300  # 256 bytes, the unknown and end-of-document tokens, and some characters
END_OF_DOCUMENT = "</s>"
EOS_ID = 1
# Of the trainer's message about a text that is too small.
_LARGEST_SIZE = re.compile(r"value <= ([0-9]+)")
EVERY_FILE, NO_LIMITS, DEFAULT_READ_OPTIONS = FileChoice(), TextLimits(), ReadOptions()
EACH_A_TEXT = FormatChoice()


class RoundTripError(EbftError):
    """A new tokenizer does not reproduce some texts exactly (exit code 1)."""


def train_tokenizer(
    source: Path,
    vocab_size: int,
    output: Path,
    *,
    files: FileChoice = EVERY_FILE,
    uses_gitignore: bool = False,
    limits: TextLimits = NO_LIMITS,
    read: ReadOptions = DEFAULT_READ_OPTIONS,
    formats: FormatChoice = EACH_A_TEXT,
    sample_characters: int = 14_000_000,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a byte-fallback BPE on the texts of a directory and check that each of them round-trips.

    The text is not normalised: spaces, tabs, line ends and every Unicode character stay as they are. Files that are too
    long to be documents of a dataset are left out. Every file is read three times, so that memory holds one file and
    the sample.

    Args:
        source: a directory of UTF-8 text files, or of files of a format.
        vocab_size: number of tokens, the 256 byte tokens included.
        output: the tokenizer directory to make.
        files: which of its files are read.
        uses_gitignore: whether what its `.gitignore` files name is left out.
        limits: which texts are trained on.
        read: encoding of what is not UTF-8, and the longest text; keys of the format's records.
        formats: the format of all files; by default each file is a text.
        sample_characters: characters to train on, spread evenly over the files; all files are checked.
        overwrite: replace an existing tokenizer.

    Raises:
        InputError: the input cannot be used or the vocabulary size does not fit the text.
        RoundTripError: with every file that does not round-trip; nothing is written then.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        expected = f"at least {MIN_VOCAB_SIZE} and at most {MAX_VOCAB_SIZE}"
        raise bad_input("--vocab-size", "vocab_size", str(vocab_size), expected)
    texts = training_texts(source, files, uses_gitignore, Reader((), read, limits, formats=formats))
    characters = _count_characters(texts)
    with new_directory(output, SENTENCEPIECE_NAME, overwrite) as directory:
        step = max(1, characters // sample_characters)
        all_chunks = (chunk for document in documents_of_all(texts) for chunk in split_into_chunks(document.text))
        chunks = list(itertools.islice(all_chunks, 0, None, step))
        (directory / SENTENCEPIECE_NAME).write_bytes(_train_model(chunks, vocab_size, source))
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "eos_token": END_OF_DOCUMENT,
            "eos_token_id": EOS_ID,
            "unk_token": "<unk>",
            # Transformers' own Llama class would put a space before every text.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _check_round_trips(load_tokenizer(directory), texts)
    return load_tokenizer(output)


def split_into_chunks(text: str) -> Iterator[str]:
    """Split a text after line ends into chunks of about 3,500 characters.

    The trainer takes its text in sentences and reads a file line by line; chunks of many lines let it learn
    pieces that hold line ends and indentation. Joined again, the chunks are the text.
    """
    lines = text.splitlines(keepends=True)
    chunk: list[str] = []
    length = 0
    for line in lines:
        for start in range(0, len(line), CHUNK_CHARACTERS):
            part = line[start : start + CHUNK_CHARACTERS]
            if chunk and length + len(part) > CHUNK_CHARACTERS:
                yield "".join(chunk)
                chunk, length = [], 0
            chunk.append(part)
            length += len(part)
    if chunk:
        yield "".join(chunk)


def _count_characters(texts: TrainingTexts) -> int:
    """Characters of all files.

    Raises:
        InputError: with every file that cannot be read, or there is no text.
    """
    problems: list[Problem] = []
    left_out = Counter[str]()
    encodings = Counter[str]()
    characters = 0
    for each in texts.ranges:
        for document in texts.documents(each, left_out):
            if isinstance(document, BadText):
                problems.append(document.problem)
            else:
                characters += len(document.text)
                encodings.update([document.encoding] if document.encoding else [])
    if left_out:
        limit = f" (over {texts.reader.options.max_document_bytes} bytes)" if LONG_DOCUMENTS in left_out else ""
        print_line(f"note: {texts.source}: left out: {in_words(left_out)}{limit}")
    if idle := [option for option, reason in texts.reader.limits.given().items() if reason not in left_out]:
        print_line(f"note: {', '.join(idle)}: nothing is left out")
    if encodings:
        print_line(f"note: {texts.source}: read as what --encoding-fallback says: {in_words(encodings)}")
    if not problems and not characters:
        counts = f" (left out: {in_words(left_out)})" if left_out else ""
        options = [option for option, reason in texts.reader.limits.given().items() if reason in left_out]
        everything = f": {' and '.join(options)} left out everything" if options else ""
        found = f"no text in the files that are read{everything}{counts}"
        problems.append(Problem("--input", str(texts.source), found, "text files"))
    if problems:
        raise InputError(problems)
    return characters


def _train_model(chunks: list[str], vocab_size: int, source: Path) -> bytes:
    """The sentencepiece model as bytes; the same for the same chunks, whatever the machine."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(track(chunks, len(chunks), "reading text for the tokenizer")),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * CHUNK_CHARACTERS,  # bytes
            unk_id=0,
            eos_id=EOS_ID,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            num_threads=2,  # written into the model file, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        found, expected = str(vocab_size), "a vocabulary size that fits the text"
        if most := _LARGEST_SIZE.search(str(error)):
            possible = f"at most {most[1]}" if int(most[1]) >= MIN_VOCAB_SIZE else f"more text (for {MIN_VOCAB_SIZE})"
            expected = f"{possible}: this text gives {most[1]} different tokens"
        else:
            found += f" ({error})"
        raise bad_input(str(source), "--vocab-size", found, expected) from error
    return model.getvalue()


def _check_round_trips(tokenizer: Tokenizer, texts: TrainingTexts) -> None:
    failed = [
        document.path
        for document in documents_of_all(texts, track(texts.ranges, len(texts.ranges), "checking round trips"))
        if tokenizer.decode(tokenizer.encode(document.text)) != document.text
    ]
    if failed:
        raise RoundTripError("texts that do not round-trip exactly:\n" + "\n".join(failed))
