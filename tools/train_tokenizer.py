"""Train a sentencepiece BPE tokenizer with byte fallback on the texts of a directory."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.selection.choice_options import add_file_options, add_text_options, check_text_options
from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.format_options import add_format_options, format_options, plugins_of, require_use
from ebft_mega.data.selection.text_formats import FormatChoice
from ebft_mega.data.selection.text_limits import TextLimits
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.io.arguments import ToolParser, path_argument, whole_number
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--input", type=path_argument, required=True, help="directory of UTF-8 text files, or of files of --format"
    )
    parser.add_argument(
        "--vocab-size", type=whole_number(), required=True, help="number of tokens, the 256 byte tokens included"
    )
    parser.add_argument("--output", type=path_argument, required=True, help="tokenizer directory to make")
    add_file_options(parser)
    add_format_options(parser, "each file is a text")
    parser.add_argument("--text-key", metavar="KEY", help="key of the text in a JSON line, or its column in Parquet")
    parser.add_argument("--text-member", metavar="SUFFIX", help="suffix of the text in a webdataset (default: txt)")
    add_text_options(parser)
    add_permissions_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    arguments = parser.parse_args()
    check_text_options(parser, arguments)
    return arguments


def main() -> None:
    """Train the tokenizer and print its size and hash."""
    arguments = parse_arguments()
    plugins_of(arguments.plugins, {"--input": [arguments.input], "--output": [arguments.output]})
    formats = FormatChoice(arguments.format, format_options(arguments.format_options))
    require_use(formats, {"text_key": arguments.text_key, "text_member": arguments.text_member})
    tokenizer = train_tokenizer(
        arguments.input,
        arguments.vocab_size,
        arguments.output,
        files=FileChoice(arguments.pattern, tuple(arguments.include), tuple(arguments.exclude)),
        uses_gitignore=arguments.gitignore,
        limits=TextLimits(*(getattr(arguments, field.name) for field in fields(TextLimits))),
        read=ReadOptions(
            arguments.text_key or ReadOptions.text_key,
            arguments.text_member or ReadOptions.text_member,
            max_document_bytes=arguments.max_document_bytes,
            encoding_fallback=arguments.encoding_fallback,
        ),
        formats=formats,
        overwrite=arguments.overwrite,
    )
    size, digest = tokenizer.vocab_size, tokenizer.sha256
    print_line(f"{arguments.output}: {size} tokens, every file round-trips, sha256 {digest}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
