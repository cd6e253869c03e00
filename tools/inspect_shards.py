"""Show what a dataset holds, print single documents, and verify every byte."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.builder.build_record import BuildRecord, read_build_record
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import Manifest
from ebft_mega.data.store.inspection import (
    Lengths,
    Rows,
    count_metadata,
    length_histogram,
    lengths_of,
    plot_lengths,
    read_metadata,
    rows_of,
)
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.data.store.verify import verify_dataset
from ebft_mega.data.text.listing import in_words
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import EXIT_DAMAGED_DATA, EXIT_DONE
from ebft_mega.extension.store import Transfer
from ebft_mega.io.arguments import ToolParser, output_file, path_argument, place_argument, whole_number
from ebft_mega.io.command import run_command
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.progress_bar import track
from ebft_mega.io.standard_streams import print_line

GIGABYTE = 10**9
SEQUENCE_LENGTH = 1024
CACHE_GIGABYTES = 100.0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(
        description=__doc__, epilog="Exit codes: 0; 2 the dataset cannot be opened; 4 something in it is damaged."
    )
    parser.add_argument("dataset", type=place_argument, help="dataset directory, or its address (with --cache)")
    parser.add_argument("--verify", action="store_true", help="read everything and compare every checksum")
    parser.add_argument("--show", type=whole_number(0), metavar="N", help="print document N with its metadata")
    parser.add_argument("--metadata", action="store_true", help="count licences and sources (reads every document's)")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw the lengths of documents")
    parser.add_argument(
        "--sequence-length", type=whole_number(), help=f"of the rows counted (default: {SEQUENCE_LENGTH})"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("--cache", type=path_argument, help="directory for what is downloaded from a URL")
    parser.add_argument(
        "--redirect-hosts",
        nargs="+",
        metavar="HOST",
        help="servers that the server of a URL may redirect to, as data.redirect_hosts has them",
    )
    parser.add_argument("--cache-gigabytes", type=float, help=f"what it may hold in all (default: {CACHE_GIGABYTES})")
    arguments = parser.parse_args()
    beside: list[tuple[str, str, object]] = []
    if arguments.show is not None:
        beside += [("--metadata", "--show", arguments.metadata or None), ("--plot", "--show", arguments.plot)]
        beside.append(("--sequence-length", "--show", arguments.sequence_length))
    if isinstance(arguments.dataset, Path):
        beside.append(("--cache", "a local directory", arguments.cache))
        beside.append(("--cache-gigabytes", "a local directory", arguments.cache_gigabytes))
        beside.append(("--redirect-hosts", "a local directory", arguments.redirect_hosts))
    for option, other, value in beside:
        if value is not None:
            parser.error(f"{option}: found beside {other}, where it has no effect; expected one of the two")
    if arguments.sequence_length is None:
        arguments.sequence_length = SEQUENCE_LENGTH
    if arguments.cache_gigabytes is None:
        arguments.cache_gigabytes = CACHE_GIGABYTES
    if not 0 <= arguments.cache_gigabytes < float("inf"):
        parser.error(f"--cache-gigabytes: found {arguments.cache_gigabytes}; expected a number >= 0")
    return arguments


def main() -> int:
    """Print what was asked for; the exit code says whether anything is damaged."""
    arguments = parse_arguments()
    # The copy on the server is verified, so no shard of a URL is read from the cache or stored in it.
    limit_bytes = 0 if arguments.verify else int(arguments.cache_gigabytes * GIGABYTE)
    cache = ShardCache(arguments.cache, limit_bytes) if arguments.cache else None
    transfer = Transfer(redirect_hosts=tuple(arguments.redirect_hosts or ()))
    dataset = open_dataset(arguments.dataset, cache, transfer=transfer)
    try:
        if arguments.show is not None:
            show_document(dataset, arguments.show, arguments.json)
        else:
            show_dataset(dataset, arguments)
        sys.stdout.flush()
        return verify(dataset) if arguments.verify else EXIT_DONE
    finally:
        dataset.close()


def show_document(dataset: Dataset, number: int, as_json: bool) -> None:
    """Print a document's metadata and text."""
    documents = dataset.manifest.documents
    if not 0 <= number < documents:
        raise bad_input("--show", "document", number, f"a number from 0 to {documents - 1}")
    tokens = dataset.tokens(number)
    metadata = read_metadata(dataset, number)
    text = load_tokenizer(dataset.tokenizer_directory, str(dataset.manifest.eos_id)).decode(tokens.tolist())
    if as_json:
        print(json.dumps({"document": number, "metadata": metadata, "tokens": tokens.tolist(), "text": text}))
        return
    print(f"document {number}: {len(tokens)} tokens and the end-of-document token")
    for key, value in metadata.items():
        print_line(f"{key}: {value if isinstance(value, str) else json.dumps(value)}", sys.stdout)
    print(f"\n{text}")


def show_dataset(dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Print counts and lengths."""
    lengths, rows = lengths_of(dataset), rows_of(dataset, arguments.sequence_length)
    record = read_build_record(dataset.directory)
    metadata = count_metadata(dataset) if arguments.metadata else None
    if arguments.plot:
        plot_lengths(lengths, arguments.plot)
    manifest = dataset.manifest
    if arguments.json:
        fields = manifest.model_dump(mode="json", exclude={"shards", "index"})
        fields["shards"] = len(manifest.shards)
        fields["bytes"] = sum(shard.bytes for shard in manifest.shards)
        parts = {"lengths": asdict(lengths), "rows": asdict(rows), "build": asdict(record) if record else None}
        print(json.dumps({"dataset": fields, **parts, "metadata": metadata}))
        return
    print_manifest(arguments.dataset, manifest)
    if record:
        print_build(record)
    print_lengths(lengths, rows)
    for key, counts in (metadata or {}).items():
        print(f"\nDocuments by {key}")
        for value, count in sorted(counts.items(), key=lambda item: -item[1]):
            print_line(f"  {count:>12,}  {value}", sys.stdout)


def print_manifest(place: str, manifest: Manifest) -> None:
    """Print what the manifest says."""
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    print_line(place, sys.stdout)
    print(f"  documents    {manifest.documents:,}")
    print(f"  tokens       {manifest.tokens:,} (with one end-of-document token each), {manifest.dtype}")
    print(f"  shards       {len(manifest.shards):,}, {num_bytes:,} bytes")
    print(f"  tokenizer    {manifest.vocab_size:,} tokens, end of document {manifest.eos_id}")
    print(f"               sha256 {manifest.tokenizer_sha256}")
    print(f"  fingerprint  {manifest.fingerprint}")


def print_build(record: BuildRecord) -> None:
    """Print what `build.json` says."""
    files = ", ".join(f"{count:,} files of {source}" for source, count in record.input_files.items())
    print_line(f"  made from    {files}; {record.text_bytes:,} bytes of text", sys.stdout)
    if record.split:
        side, share = record.split.get("side", ""), 100 * record.split.get("share", 0.0)
        print_line(f"  split        {side}; {share:.3g} % of the text held out by {record.split.get('by')}", sys.stdout)
    counts = {"duplicates": record.duplicates, "empty": record.empty, "unusable": record.skipped}
    if record.near_duplicates:
        counts = {"near-duplicates": record.near_duplicates, **counts}
    print_line(f"  left out     {', '.join(f'{count:,} {what}' for what, count in counts.items())}", sys.stdout)
    for meaning, reasons in (
        ("left out", record.left_out),
        ("skipped", record.skipped_by_reason),
        ("followed", record.followed),
        ("encodings", record.encodings),
        ("not exact", {"documents that do not come back from their tokens": record.not_round_trip}),
    ):
        if words := in_words(reasons):
            print_line(f"  {meaning:<12} {words}", sys.stdout)
    by_count = sorted(record.licences.items(), key=lambda item: -item[1])
    licences = [f"{licence} ({count:,})" for licence, count in by_count]
    licences += [f"others ({record.unlisted_licences:,})"] * (record.unlisted_licences > 0)
    print_line(f"  licences     {', '.join(licences)}", sys.stdout)


def print_lengths(lengths: Lengths, rows: Rows) -> None:
    """Print statistics of the lengths."""
    percentiles = ", ".join(f"{percent} %: {value:,}" for percent, value in lengths.percentiles.items())
    print("\nLengths of documents in tokens")
    print(f"  shortest {lengths.shortest:,}, longest {lengths.longest:,}, mean {lengths.mean:,.1f}")
    print(f"  {percentiles}")
    print("\n".join(length_histogram(lengths)))
    share = 100 * rows.rows_with_several_documents / max(1, rows.rows)
    print(
        f"\nRows of {rows.sequence_length:,} tokens, documents as stored: {rows.rows:,} and {rows.tail_tokens:,} tokens"
        f" over; {share:.1f} % of them hold more than one document"
    )


def verify(dataset: Dataset) -> int:
    """Read every shard; lists all damage on standard error."""
    manifest = dataset.manifest
    documents = tokens = num_bytes = num_problems = 0
    for report in track(verify_dataset(dataset), len(manifest.shards), "verifying shards"):
        documents += report.documents
        tokens += report.tokens
        num_bytes += report.bytes
        num_problems += len(report.problems)
        for problem in report.problems:
            print_line(f"error: {problem}")
    outcome = f"{num_problems} problems" if num_problems else "every checksum is right"
    counts = f"{documents:,} of {manifest.documents:,} documents, {tokens:,} tokens, {num_bytes:,} bytes"
    print(f"verified {counts}: {outcome}", file=sys.stderr)
    return EXIT_DAMAGED_DATA if num_problems else EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(main, prints_its_result=True))
