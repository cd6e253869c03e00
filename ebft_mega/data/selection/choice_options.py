"""Options of the tools that choose among files and texts, the same for tokenizers and datasets."""

import argparse

from ebft_mega.data.selection.file_choice import path_pattern
from ebft_mega.data.text.decoding import ENCODINGS
from ebft_mega.data.text.text_files import MAX_DOCUMENT_BYTES, MAX_LICENCE_CHARACTERS
from ebft_mega.io.arguments import real_number, whole_number


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add what chooses among the files of a directory."""
    parser.add_argument(
        "--pattern",
        default="*",
        help="file names to read, such as '*.py' (default: all); beside --include a file must match both",
    )
    parser.add_argument(
        "--include",
        type=_path_pattern,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="paths to read, as git's patterns: '*.py' anywhere, '/src' and 'src/**/*.py' from the input's root, a "
        "folder with all that it holds (default: all)",
    )
    parser.add_argument(
        "--exclude",
        type=_path_pattern,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="paths to leave out, as above; they win over --include",
    )
    parser.add_argument(
        "--gitignore",
        action="store_true",
        help="leave out what the .gitignore files in the input's folders name (those above it are not read)",
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add limits on texts, and the encoding of those that are not UTF-8."""
    parser.add_argument(
        "--max-document-bytes",
        type=whole_number(),
        default=MAX_DOCUMENT_BYTES,
        help="a whole number of bytes: leave out longer documents, counted but not read (default: %(default)s, 16 MiB "
        "of UTF-8; tokenizing takes up to 45 times as much memory in each process)",
    )
    parser.add_argument("--min-document-bytes", type=whole_number(), help="leave out shorter documents")
    parser.add_argument(
        "--max-line-length",
        type=whole_number(),
        metavar="CHARACTERS",
        help="leave out documents with a longer line",
    )
    parser.add_argument(
        "--max-mean-line-length",
        type=real_number(above=True),
        metavar="CHARACTERS",
        help="leave out documents whose lines are longer in the mean",
    )
    parser.add_argument(
        "--min-alphanumeric",
        type=real_number(0, 1, above=True),
        metavar="SHARE",
        help="leave out documents of which letters and digits are a smaller share, such as 0.25",
    )
    parser.add_argument(
        "--encoding-fallback",
        choices=ENCODINGS,
        metavar="ENCODING",
        help=f"read texts that are not UTF-8 and hold no zero byte as this: {', '.join(ENCODINGS)} (default: they are "
        "refused)",
    )


def check_text_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where no text can be within the limits."""
    if (arguments.min_document_bytes or 0) > arguments.max_document_bytes:
        expected = f"at most --max-document-bytes, {arguments.max_document_bytes}"
        parser.error(f"--min-document-bytes: found {arguments.min_document_bytes}; expected {expected}")


def add_licence_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of licences."""
    for option, words in (("keep", "leave out documents with any other licence"), ("drop", "leave out documents with")):
        parser.add_argument(
            f"--{option}-licence",
            dest=f"{option}_licences",
            type=_licence,
            nargs="+",
            action="extend",
            default=[],
            metavar="LICENCE",
            help=f"{words}: names or patterns such as 'BSD-*', in any case; 'unknown' is that of documents without one",
        )


def _path_pattern(text: str) -> str:
    try:
        return path_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {error}; expected a pattern such as '*.py' or 'src/**'") from None


def _licence(text: str) -> str:
    if not 0 < len(text.strip()) <= MAX_LICENCE_CHARACTERS:
        raise argparse.ArgumentTypeError(
            f"found {len(text)} characters; expected a name of at most {MAX_LICENCE_CHARACTERS}"
        )
    return text
