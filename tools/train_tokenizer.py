"""Train a sentencepiece BPE tokenizer with byte fallback on the text files of a directory."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.io.arguments import ToolParser, path_argument, whole_number
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", type=path_argument, required=True, help="directory of UTF-8 text files")
    parser.add_argument(
        "--vocab-size", type=whole_number(), required=True, help="number of tokens, the 256 byte tokens included"
    )
    parser.add_argument("--output", type=path_argument, required=True, help="tokenizer directory to make")
    parser.add_argument("--pattern", default="*", help="file names to read, such as '*.py' (default: all)")
    add_permissions_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and print its size and hash."""
    arguments = parse_arguments()
    tokenizer = train_tokenizer(
        arguments.input,
        arguments.vocab_size,
        arguments.output,
        pattern=arguments.pattern,
        overwrite=arguments.overwrite,
    )
    size, digest = tokenizer.vocab_size, tokenizer.sha256
    print_line(f"{arguments.output}: {size} tokens, every file round-trips, sha256 {digest}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
