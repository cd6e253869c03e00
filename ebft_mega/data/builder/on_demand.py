"""Tokenize text webdatasets when a run first uses them: build once into a cache, then read like any dataset."""

import hashlib
import json
from pathlib import Path

from filelock import FileLock

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.builder.input_files import list_inputs
from ebft_mega.data.builder.work_plan import BUILD_VERSION
from ebft_mega.data.store.format import MANIFEST_NAME, file_sha256
from ebft_mega.data.text.corpus import corpus_licence
from ebft_mega.data.text.listing import OUTSIDE_LINKS
from ebft_mega.data.text.source_archives import WEBDATASET
from ebft_mega.data.text.text_files import ARCHIVE_SUFFIX
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import reading


def tokenized_dataset(place: Path, tokenizer_directory: Path, cache: Path, processes: int) -> Path:
    """Dataset directory for a directory of text webdataset shards, tokenized on the first call.

    The result is an ordinary dataset, so order, resumption and checksums are those of any other. Its name is a hash
    of the contents of the shards, the tokenizer (files, end-of-document token, library), the licence, the options and
    the builder's version, so it is found again wherever these lie and whatever the number of processes. Every call
    reads the shards once to hash them. Equal documents are not left out: a run sees what the shards hold.

    Several processes may call this at once with one cache: one builds, the others wait for it. A build that was
    stopped is resumed by the next call.

    Args:
        place: a directory of `.tar` shards whose samples have a `.txt` member, or one such shard.
        tokenizer_directory: sentencepiece or Hugging Face.
        cache: where the datasets are kept; made if missing.
        processes: at most so many work at a time.

    Raises:
        InputError: with all shards that are damaged or hold something else; there are links to shards elsewhere; or the
            tokenizer cannot be used.
        WorkerDiedError: a worker process died; the same call resumes the build.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    is_folder = place.is_dir()
    options = BuildOptions(
        pattern=f"*{ARCHIVE_SUFFIX}" if is_folder else BuildOptions.pattern, deduplicate=False, archives=WEBDATASET
    )
    base = place if is_folder else place.parent
    # Where the shards lie and under which names of folders is no part of it: neither changes a token.
    deciding = [BUILD_VERSION, tokenizer.identity, options.given(), corpus_licence(place)]
    identity = hashlib.sha256(f"{json.dumps(deciding, sort_keys=True)}\n".encode())
    shards = list_inputs(place, options)
    if count := shards.listing.left_out.get(OUTSIDE_LINKS):
        expected = "shards in the directory itself, or the name of the directory in which they are"
        raise bad_input(place, "shards", f"{OUTSIDE_LINKS}: {count}", expected)
    for file in shards.files:
        name = file.relative_to(base).as_posix()
        with reading(file, name, "a file that can be read"):
            identity.update(f"{file_sha256(file)} {file.stat().st_size} {name!r}\n".encode())
    output = cache / f"text-{identity.hexdigest()}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{output}.lock"):
        if not (output / MANIFEST_NAME).is_file():
            build_dataset(place, tokenizer, output, options, processes=processes)
    return output
