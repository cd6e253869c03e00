"""Build a small corpus of real code from the running interpreter's standard library, or from another folder."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.selection.near_duplicates import PLACES, near_duplicates, signature
from ebft_mega.data.text.corpus import (
    CORPUS_MANIFEST_NAME,
    LEFT_OUT_TESTS,
    STANDARD_LIBRARY,
    UNKNOWN_LICENCE,
    CorpusKind,
    build_corpus,
    installed_folder,
    installed_name,
    standard_library,
)
from ebft_mega.io.arguments import ToolParser, path_argument, real_number, whole_number
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=path_argument, required=True, help="corpus directory to make")
    parser.add_argument(
        "--source", type=path_argument, help="another Python standard library, or with --pattern any folder"
    )
    parser.add_argument(
        "--installed",
        metavar="PATH",
        help="in its place a folder of an installed package, below site-packages, such as torch/include/torch/csrc",
    )
    parser.add_argument("--pattern", metavar="PATTERN", help="which files of --source or --installed, such as '*.h'")
    parser.add_argument(
        "--exclude",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="names of files and folders to leave out, with --pattern",
    )
    parser.add_argument("--licence", help=f"of all files, with --pattern (default: {UNKNOWN_LICENCE})")
    parser.add_argument(
        "--package-folders",
        type=whole_number(1),
        metavar="N",
        help="with --pattern: a package, which is never divided, is what has the same first N folders (default: 1)",
    )
    parser.add_argument(
        "--near-deduplicate",
        type=real_number(above=True, most=1),
        metavar="SIMILARITY",
        help="leave out files that are nearly the same as an earlier one, as tools/build_shards.py does, such as 0.8",
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
    if arguments.installed and arguments.source:
        parser.error("--installed: found with --source; expected one of them")
    given = {
        "--installed": arguments.installed,
        "--exclude": arguments.exclude,
        "--licence": arguments.licence,
        "--package-folders": arguments.package_folders,
    }
    for option, value in given.items():
        if value and not arguments.pattern:
            parser.error(f"{option}: found without --pattern; expected both or neither")
    return arguments


def source_of(arguments: argparse.Namespace) -> Path:
    """The folder that files are taken from."""
    if arguments.installed:
        return installed_folder(arguments.installed)
    return arguments.source or standard_library()


def near_texts(texts: Sequence[bytes], similarity: float) -> list[bool]:
    """Whether each text is nearly the same as one before it that stays."""
    signatures = np.array([signature(text) for text in texts], np.uint16).reshape(-1, PLACES)
    candidates = np.asarray(signatures.any(axis=1))
    return [bool(near) for near in near_duplicates(signatures, candidates, similarity)]


def kind_of(arguments: argparse.Namespace) -> CorpusKind:
    """Which files are taken, and what a package is."""
    similarity = arguments.near_deduplicate
    near_copies = None if similarity is None else partial(near_texts, similarity=similarity)
    if not arguments.pattern:
        return replace(STANDARD_LIBRARY, near_copies=near_copies)
    return CorpusKind(
        pattern=arguments.pattern,
        left_out=(*LEFT_OUT_TESTS, *arguments.exclude),
        licence=arguments.licence or UNKNOWN_LICENCE,
        package_folders=arguments.package_folders or 1,
        families=False,
        source=installed_name(arguments.installed) if arguments.installed else source_of(arguments).name,
        near_copies=near_copies,
    )


def main() -> None:
    """Build the corpus and print what it holds."""
    arguments = parse_arguments()
    manifest = build_corpus(
        source_of(arguments),
        arguments.output,
        kind=kind_of(arguments),
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
