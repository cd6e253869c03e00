"""Build a small corpus of real code from the running interpreter's standard library."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.text.corpus import CORPUS_MANIFEST_NAME, build_corpus, standard_library
from ebft_mega.io.arguments import ToolParser, path_argument, whole_number
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=path_argument, required=True, help="corpus directory to make")
    parser.add_argument(
        "--source", type=path_argument, default=standard_library(), help="another Python standard library"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="chooses which packages are held out (default 0)"
    )
    parser.add_argument("--include-tests", action="store_true", help="keep the library's own tests")
    parser.add_argument("--max-bytes", type=whole_number(), help="stop at about this many bytes of text")
    add_permissions_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    arguments = parser.parse_args()
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        parser.error(f"--max-bytes: found {arguments.max_bytes}; expected at least 1")
    return arguments


def main() -> None:
    """Build the corpus and print what it holds."""
    arguments = parse_arguments()
    manifest = build_corpus(
        arguments.source,
        arguments.output,
        seed=arguments.seed,
        include_tests=arguments.include_tests,
        max_bytes=arguments.max_bytes,
        overwrite=arguments.overwrite,
    )
    for name, split in manifest["splits"].items():
        counts = f"{split['files']} files, {split['bytes']} bytes, {len(split['packages'])} packages"
        print_line(f"{name}: {counts}", sys.stdout)
    left_out = ", ".join(f"{count} {reason}" for reason, count in manifest["left_out_files"].items())
    manifest_path = arguments.output / CORPUS_MANIFEST_NAME
    print_line(f"left out: {left_out}; licence {manifest['licence']}; see {manifest_path}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
