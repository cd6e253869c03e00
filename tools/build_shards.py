"""Turns text (a directory of files, or JSON lines) into a dataset directory of webdataset token shards."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.data.build import DEFAULT_SHARD_BYTES, build_dataset
from ebft_mega.data.command import run_command
from ebft_mega.data.tokenizer import load_tokenizer


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="directory of text or JSONL files, or a JSONL file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece or Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, help="dataset directory to make")
    parser.add_argument("--pattern", default="*", help="file names to read, such as '*.py' (default: all)")
    parser.add_argument("--text-key", default="text", help="key of the text in a JSON line (default: text)")
    parser.add_argument("--licence", help="recorded with every document (default: from corpus.json, else unknown)")
    parser.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="size at which a shard is closed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args()


def main() -> None:
    """Builds the dataset and prints what it holds."""
    arguments = parse_arguments()
    result = build_dataset(
        arguments.input,
        load_tokenizer(arguments.tokenizer),
        arguments.output,
        pattern=arguments.pattern,
        text_key=arguments.text_key,
        licence=arguments.licence,
        shard_bytes=arguments.shard_bytes,
        overwrite=arguments.overwrite,
    )
    manifest = result.manifest
    print(
        f"{arguments.output}: {manifest.documents} documents, {manifest.tokens} tokens ({manifest.dtype}), "
        f"{len(manifest.shards)} shards, {result.empty_documents} empty documents left out, "
        f"fingerprint {manifest.fingerprint}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
