"""Turn text (files, JSON lines, Parquet, text webdatasets) into a dataset directory of webdataset token shards.

A build that was stopped is resumed when the same command is given again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.builder.build_options import DEFAULT_SHARD_BYTES, BuildOptions
from ebft_mega.data.builder.dataset_build import BuildResult, build_dataset
from ebft_mega.data.builder.worker_pool import available_cores
from ebft_mega.data.selection.choice_options import (
    add_file_options,
    add_licence_options,
    add_text_options,
    check_text_options,
)
from ebft_mega.data.selection.format_options import add_format_options, format_options, plugins_of
from ebft_mega.data.selection.held_out_split import TRAIN, SplitOptions, read_shares
from ebft_mega.data.selection.text_formats import archive_words, shown_reasons
from ebft_mega.data.store.format import Manifest
from ebft_mega.data.text.listing import in_words
from ebft_mega.data.text.text_files import LONG_DOCUMENTS
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.io.arguments import ToolParser, path_argument, real_number, whole_number
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line

# Reasons for which a build that went well leaves documents out are named in the summary, beside those of formats.
OF_DOCUMENTS = "documents "


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--input",
        type=path_argument,
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="directory of text files, of JSONL files (.jsonl, .jsonl.gz, .jsonl.zst, .json.gz), of Parquet "
        "files (.parquet), of text webdataset shards (.tar) or of archives of source (.tar, .tar.gz, .tgz, .tar.zst, "
        ".zip), or such a file; several are read in this order",
    )
    parser.add_argument(
        "--tokenizer", type=path_argument, required=True, help="sentencepiece or Hugging Face directory"
    )
    parser.add_argument("--output", type=path_argument, required=True, help="dataset directory to make")
    parser.add_argument(
        "--end-of-document",
        metavar="TEXT_OR_ID",
        help="the token that ends documents: its id, or a text that is one token, such as '<|endoftext|>' (default: "
        "eos_token of the tokenizer)",
    )
    parser.add_argument(
        "--add-bos",
        action="store_true",
        help="begin each document with bos_token, as Llama, Mistral and Gemma were trained (default: no, as the EBFT "
        "authors)",
    )
    add_file_options(parser)
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        help="key of the text in a JSON line, or its column in Parquet (default: text). With it files of any name that "
        "hold such lines are read as JSON lines, and other files beside them are left out",
    )
    add_format_options(parser, "the one that each is recognised as")
    parser.add_argument(
        "--archives",
        choices=archive_words(),
        help="what .tar files are: source (a text each member) or webdataset (samples with a text each); default: what "
        "they clearly are. .tar.gz, .tgz, .tar.zst and .zip are always source",
    )
    parser.add_argument("--text-member", metavar="SUFFIX", help="suffix of the text in a webdataset (default: txt)")
    add_text_options(parser)
    add_choices(parser)
    add_split(parser)
    return checked(parser, parser.parse_args())


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add what is said of documents, what is left out and how the work is done."""
    parser.add_argument("--licence", help="of documents that name none (default: from corpus.json, else unknown)")
    parser.add_argument("--licence-key", metavar="KEY", help="key of a document's licence in its JSON record")
    add_licence_options(parser)
    parser.add_argument(
        "--keep-key",
        dest="keep_keys",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="keys of a document's JSON record to keep in its metadata",
    )
    parser.add_argument(
        "--deduplicate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out documents whose text an earlier one has (default: yes)",
    )
    parser.add_argument(
        "--near-deduplicate",
        type=real_number(above=True, most=1),
        metavar="SIMILARITY",
        help="also leave out documents that are nearly the same as an earlier one: from this Jaccard index of their "
        "runs of 5 tokens, above 0 and at most 1, such as 0.8",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out documents, files and folders that cannot be used, and list them",
    )
    parser.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="size at which a shard is closed")
    parser.add_argument(
        "--part-bytes",
        dest="work_unit_bytes",
        metavar="PART_BYTES",
        type=int,
        help="input that a process takes at a time (default: by the inputs)",
    )
    parser.add_argument("--processes", type=int, default=available_cores(), help="default: all cores (%(default)s)")
    add_permissions_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add what is held out."""
    parser.add_argument(
        "--held-out",
        type=share,
        metavar="SHARE",
        help="a share of the bytes of text, such as 1%% or 0.01: write OUTPUT/train and OUTPUT/held-out; or several "
        "with names, such as tuning=5%%,report=10%%: write OUTPUT/train, OUTPUT/tuning and OUTPUT/report",
    )
    parser.add_argument(
        "--split-by",
        metavar="GROUP",
        help="what the split never divides: top-folder (below an input), repo (a folder with .git, or the key of a "
        "record that names a repository), document, or a key of the records (default: top-folder for folders of texts "
        "with several folders, else document)",
    )
    parser.add_argument(
        "--split-seed", type=whole_number(0), help="another one chooses other groups (default: 0)", metavar="N"
    )


def share(text: str) -> str:
    """The type of an option that is a share of the text, or several with names."""
    try:
        read_shares(text)
    except ValueError as error:
        expected = "a share between 0 and 100 %, such as 1% or 0.01"
        if "=" in text:
            expected = f"shares with names, such as tuning=5%,report=10% ({error})"
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {expected}") from None
    return text.strip()


def split_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> SplitOptions | None:
    """What is held out, if anything is."""
    for option, value in (("--split-by", arguments.split_by), ("--split-seed", arguments.split_seed)):
        if value is not None and arguments.held_out is None:
            parser.error(f"{option}: found without --held-out, so that nothing is split; expected both or neither")
    if arguments.held_out is None:
        return None
    return SplitOptions(arguments.held_out, arguments.split_by, arguments.split_seed or 0)


def checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, unless one of them lies outside its bounds."""
    names = ("text_key", "text_member", "split_by")
    for option, text in ((f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in names):
        if text == "":
            parser.error(f"{option}: found an empty text; expected a name")
    for option, value in (
        ("--shard-bytes", arguments.shard_bytes),
        ("--part-bytes", arguments.work_unit_bytes),
        ("--processes", arguments.processes),
    ):
        if value is not None and value < 1:
            parser.error(f"{option}: found {value}; expected at least 1")
    arguments.split = split_of(parser, arguments)
    check_text_options(parser, arguments)
    return arguments


def main() -> None:
    """Build the dataset and print what it holds."""
    arguments = parse_arguments()
    places = {"--input": arguments.input, "--tokenizer": [arguments.tokenizer], "--output": [arguments.output]}
    arguments.plugins = plugins_of(arguments.plugins, places)
    arguments.format_options = format_options(arguments.format_options)
    options = BuildOptions(**{field.name: getattr(arguments, field.name) for field in fields(BuildOptions)})
    options.formats.chosen()  # before the tokenizer is loaded
    result = build_dataset(
        arguments.input,
        load_tokenizer(arguments.tokenizer, arguments.end_of_document, arguments.add_bos),
        arguments.output,
        options,
        processes=arguments.processes,
        overwrite=arguments.overwrite,
    )
    print_result(arguments.output, result, options.split)


def print_result(output: Path, result: BuildResult, split: SplitOptions | None) -> None:
    """Print what was made, and what can be done next."""
    record = result.record
    skipped = f", {record.skipped} that cannot be used ({in_words(record.skipped_by_reason)})" if record.skipped else ""
    counted = (LONG_DOCUMENTS, *shown_reasons())
    others = {
        reason: count
        for reason, count in record.left_out.items()
        if reason in counted or reason.startswith(OF_DOCUMENTS)
    }
    skipped += f", {in_words(others)}" if others else ""
    near = f", {record.near_duplicates} near-duplicates" if record.near_duplicates else ""
    left_out = f"left out: {record.empty} empty documents, {record.duplicates} duplicates{near}{skipped}"
    if split is None:
        print_line(described(output, result.manifest, f"{left_out}; "), sys.stdout)
        datasets = f"--data {shlex.quote(str(output))}"
    else:
        names = (TRAIN, *split.shares)
        for name, manifest in zip(names, (result.manifest, *result.held_out), strict=True):
            print_line(described(output / name, manifest), sys.stdout)
        print_line(left_out, sys.stdout)
        train, held_out = (shlex.quote(str(output / name)) for name in names[:2])
        datasets = f"--data {train} --held-out {held_out}"
    print_line(f"next: python tools/new_config.py --model MODEL {datasets} --output CONFIG.yaml", sys.stdout)


def described(directory: Path, manifest: Manifest, more: str = "") -> str:
    """A dataset in one line."""
    return (
        f"{directory}: {manifest.documents} documents, {manifest.tokens} tokens ({manifest.dtype}), "
        f"{len(manifest.shards)} shards; {more}fingerprint {manifest.fingerprint}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
