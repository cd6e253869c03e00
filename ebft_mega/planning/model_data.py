"""Check that models and data belong together: the same for policy and feature model, run and tools. No torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.data.store.format import Manifest
from ebft_mega.data.tokenizers.document_marks import added_begin_of
from ebft_mega.data.tokenizers.tokenizer import tokenizer_sha256
from ebft_mega.data.tokenizers.tokenizer_difference import tokenizer_difference
from ebft_mega.errors import Problem
from ebft_mega.planning.model_files import CheckedModel


@dataclass(frozen=True)
class NamedModel:
    """A model under the key or option that names it."""

    key: str
    place: str  # where the key stands, for messages; empty: it is an option
    model: CheckedModel


@dataclass(frozen=True)
class NamedData:
    """A dataset under the key or option that names it."""

    key: str
    place: str
    manifest: Manifest
    tokenizer_directory: Path  # the copy of the tokenizer that made the tokens


def data_problems(models: Iterable[NamedModel], data: Iterable[NamedData]) -> Iterator[Problem]:
    """Tokens of another tokenizer than a model's own.

    A model directory without a tokenizer is not compared (see `data_notes`).
    """
    models = tuple(models)
    for dataset in data:
        for named in models:
            directory = named.model.directory
            wanted = None if directory is None else tokenizer_sha256(directory)
            if directory is None or wanted is None or wanted == dataset.manifest.tokenizer_sha256:
                continue
            of_data = dataset.tokenizer_directory
            found = f"tokens of a tokenizer with sha256 {dataset.manifest.tokenizer_sha256} ({of_data})"
            expected = f"the tokenizer of {directory}, sha256 {wanted} ({named.key})"
            difference = tokenizer_difference(directory, of_data)
            words = f"; the model's has {difference}" if difference else ""
            yield Problem(dataset.place or dataset.key, dataset.key, found, expected + words)


def data_notes(models: Iterable[NamedModel], data: Iterable[NamedData]) -> Iterator[str]:
    """What a model and the data may have meant differently: no tokenizer to compare, another end or begin of texts."""
    data = tuple(data)
    for named in models:
        model = named.model
        if model.directory is not None and tokenizer_sha256(model.directory) is None:
            yield f"{named.key}: there is no tokenizer in {model.directory}, so the data's cannot be compared with it."
        ends = model.end_tokens
        for dataset in data:
            if ends and dataset.manifest.eos_id not in ends:
                yield (
                    f"{dataset.key}: documents end with token {dataset.manifest.eos_id}, but the eos_token_id of the "
                    f"model in {named.key} is {' or '.join(map(str, ends))}."
                )
        begin = None if model.directory is None else added_begin_of(model.directory)
        for dataset in data:
            if begin is not None and dataset.manifest.bos_id is None:
                yield (
                    f"{dataset.key}: documents begin with their text, but the tokenizer of the model in {named.key} "
                    f"puts {begin!r} before it (build_shards.py --add-bos)."
                )
    kinds = {dataset.manifest.bos_id: dataset.key for dataset in data}
    if len(kinds) > 1:
        words = [f"with {'their text' if token is None else f'token {token}'} ({key})" for token, key in kinds.items()]
        yield f"documents begin {' and '.join(words)}."


def window_problems(models: Iterable[NamedModel], key: str, place: str, sequence_length: int) -> Iterator[Problem]:
    """Rows longer than a model's sliding window: every token attends to its whole prefix here.

    Args:
        key, place: of the length of the rows.
    """
    for named in models:
        window = named.model.architecture.sliding_window
        if window is not None and sequence_length > window:
            expected = f"at most the {window} tokens of the model's sliding_window ({named.key})"
            yield Problem(place or key, key, f"{sequence_length} tokens", expected)
