"""Check that the datasets provide enough rows for the run and match the model and each other. No torch."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.row_ranges import RowRanges
from ebft_mega.data.rows.stream_state import StreamState
from ebft_mega.data.store.format import Manifest
from ebft_mega.data.store.remote import whole_shard_bytes
from ebft_mega.errors import InputError, Problem
from ebft_mega.planning.data_fit import held_out_problems, vocabulary_problems
from ebft_mega.planning.datasets import BYTES_PER_GIGABYTE, open_place, open_training_rows, shard_cache


@dataclass(frozen=True)
class KnownSource:
    """A training dataset that is there."""

    name: str
    key: str  # dotted key that names the dataset
    manifest: Manifest
    tokenizer_directory: Path  # the copy of the tokenizer that made the tokens


@dataclass(frozen=True)
class SourceSupply(KnownSource):
    """The part of a run's rows that one source provides."""

    share: Fraction  # of the rows, as long as all sources last
    rows: int  # of the whole run
    epochs: float  # passes over the source that these rows amount to
    tail_tokens: int  # tokens within max_epochs that fill no row; 0 without max_epochs


@dataclass(frozen=True)
class TrainingSupply:
    """The packed rows that a run trains on."""

    sources: tuple[SourceSupply, ...]
    total_rows: int | None  # available before every source reaches max_epochs; None: endless
    state: StreamState  # before the first row


@dataclass(frozen=True)
class HeldOutSupply:
    """The packed rows that evaluations choose from."""

    manifest: Manifest
    rows_per_epoch: int
    tokenizer_directory: Path


def rows_of_run(config: RunConfig) -> int:
    """Count the rows that all optimizer steps together read."""
    return config.total_steps * config.train.global_batch_size


def allowed_skipped_rows(config: RunConfig) -> int:
    """Count the rows that a run may skip: the smaller of `data.max_skipped_rows` and `data.max_skipped_share`."""
    share = Fraction(str(config.data.max_skipped_share))
    return min(config.data.max_skipped_rows, int(share * rows_of_run(config)))


def skipped_rows(config: RunConfig) -> int:
    """Count the rows of the run that `data.skip_rows` leaves out."""
    return RowRanges(config.data.skip_rows).count(0, rows_of_run(config))


def skipped_rows_problems(config: RunConfig, rows: int) -> Iterator[Problem]:
    """Report ranges of `data.skip_rows` that reach beyond the last row of the run, or leave none of its rows.

    Args:
        rows: that the run reads in all.
    """
    key = "data.skip_rows"
    ranges = RowRanges(config.data.skip_rows)
    beyond = [pair for pair in ranges.pairs if pair[1] >= rows]
    for first, last in beyond:
        expected = f"row numbers below {rows}, which is how many rows the run reads"
        yield Problem(config.place(key), key, f"[{first}, {last}]", expected)
    if not beyond and ranges.count(0, rows) == rows:
        yield Problem(config.place(key), key, f"all {rows} rows of the run", "at least one row that is trained on")


def training_supply(config: RunConfig) -> TrainingSupply:
    """Open and check the training data.

    Raises:
        InputError: everything that is wrong with any of the sources, or the rows end before the run does.
    """
    stream = open_training_rows(config)
    try:
        needed, total = rows_of_run(config), stream.total_rows
        if total is not None and total < needed:
            key = config.data.mixture_key
            found = f"{total} rows of {config.data.sequence_length} tokens until every source's max_epochs is reached"
            expected = f"at least the {needed} rows of the run (optimizer steps x train.global_batch_size)"
            raise InputError([Problem(config.place(key), key, found, expected)])
        all_weights = sum(source.weight for source in stream.sources)
        length = config.data.sequence_length
        return TrainingSupply(
            tuple(
                SourceSupply(
                    name=source.name,
                    key=config.data.source_key(source.name),
                    manifest=source.dataset.manifest,
                    share=source.weight / all_weights,
                    rows=rows,
                    epochs=rows * length / source.dataset.manifest.tokens,
                    tail_tokens=tail,
                    tokenizer_directory=source.dataset.tokenizer_directory,
                )
                for source, rows, tail in zip(
                    stream.sources, stream.rows_by_source(needed), stream.tail_tokens, strict=True
                )
            ),
            total,
            stream.state(0),
        )
    finally:
        for source in stream.sources:
            source.dataset.close()


def known_sources(config: RunConfig, absent: Collection[str]) -> tuple[KnownSource, ...]:
    """Open and check the training data that is there, where some is still to be supplied.

    Args:
        absent: keys of the sources that are not there.
    Raises:
        InputError: everything that is wrong with any of the others, and with them together.
    """
    names = [name for name in config.data.named_sources if config.data.source_key(name) not in absent]
    if not names:
        return ()
    stream = open_training_rows(config, absent)
    for source in stream.sources:
        source.dataset.close()
    return tuple(
        KnownSource(
            name=source.name,
            key=config.data.source_key(source.name),
            manifest=source.dataset.manifest,
            tokenizer_directory=source.dataset.tokenizer_directory,
        )
        for source in stream.sources
    )


def held_out_supply(config: RunConfig) -> HeldOutSupply:
    """Open and check the held-out data; `evaluation.shards` is set.

    Raises:
        InputError: everything that is wrong with it.
    """
    place, key = config.evaluation.shards, "evaluation.shards"
    assert place is not None, "called only with a held-out dataset"
    dataset = open_place(config, key, place)
    dataset.close()
    rows = dataset.manifest.tokens // config.data.sequence_length
    return HeldOutSupply(dataset.manifest, rows, dataset.tokenizer_directory)


def supply_problems(
    config: RunConfig,
    sources: Sequence[KnownSource],
    held_out: HeldOutSupply | None,
    architecture: Architecture | None,
) -> Iterator[Problem]:
    """Check that data fits the model and the batch, and that held-out data fits the training data.

    Data that could not be opened, or is not there yet, is left out; its problems have been reported already.
    """
    manifests = {source.key: source.manifest for source in sources}
    if held_out:
        manifests["evaluation.shards"] = held_out.manifest
    for key, manifest in manifests.items():
        if architecture:
            yield from vocabulary_problems(config.place(key), key, manifest, architecture.vocab_size)
    yield from _cache_too_small_for_all(config, manifests)
    if sources and held_out:
        first = sources[0]
        key = "evaluation.shards"
        yield from held_out_problems(config.place(key), key, held_out.manifest, first.key, first.manifest)
    resume = config.checkpoint.resume
    if resume == "never" or (resume == "auto" and not (config.output_dir / CHECKPOINTS).exists()):
        # Else its steps may have had another size, and the start that reads the checkpoint looks.
        yield from skipped_rows_problems(config, rows_of_run(config))
    if len(sources) == len(config.data.named_sources):
        rows = sum(source.manifest.tokens // config.data.sequence_length for source in sources)
        yield from _too_few_rows(config, config.data.mixture_key, rows, "train.global_batch_size")
    if held_out:
        yield from _too_few_rows(config, "evaluation.shards", held_out.rows_per_epoch, "evaluation.rows")


def _cache_too_small_for_all(config: RunConfig, manifests: Mapping[str, Manifest]) -> Iterator[Problem]:
    """Remote datasets of which each would fit into the cache, but not all of them: they would push each other out."""
    sources = config.data.named_sources.items()
    places: dict[str, Path | str | None] = {config.data.source_key(name): source.shards for name, source in sources}
    places["evaluation.shards"] = config.evaluation.shards
    limit = shard_cache(config.data).bytes_for_shards()
    needs = [whole_shard_bytes(manifest) for key, manifest in manifests.items() if isinstance(places[key], str)]
    needed = sum(need for need in needs if need <= limit)
    if needed > limit:
        key = "data.cache_gigabytes"
        found = f"{config.data.cache_gigabytes}, for datasets that need {needed / BYTES_PER_GIGABYTE:.3g} together"
        yield Problem(config.place(key), key, found, "at least that, or so little that documents are fetched singly")


def _too_few_rows(config: RunConfig, key: str, rows: int, needs_key: str) -> Iterator[Problem]:
    """Fewer whole rows in one pass over the data than another key asks for."""
    section, name = needs_key.split(".")
    needed = getattr(getattr(config, section), name)
    if rows < needed:
        found = f"{rows} rows of {config.data.sequence_length} tokens"
        yield Problem(config.place(key), key, found, f"at least the {needed} rows of {needs_key}")


def supply_notes(config: RunConfig, training: TrainingSupply | None, held_out: HeldOutSupply | None) -> Iterator[str]:
    """List settings that work but may surprise, one sentence each.

    Args:
        training: None if some of it is still to be supplied.
    """
    if count := skipped_rows(config):
        yield f"data.skip_rows leaves out {count:,} of the run's {rows_of_run(config):,} rows: they are filler."
    for source in training.sources if training else ():
        if held_out and held_out.manifest.fingerprint == source.manifest.fingerprint:
            yield f"evaluation.shards is a training dataset itself ({source.key}): nothing is held out."
        if source.tail_tokens:
            yield f"{source.key}: the last {source.tail_tokens} tokens within max_epochs fill no row and are not read."
    if config.data.on_error == "skip" and not allowed_skipped_rows(config):
        yield (
            f"data.on_error skip allows no row of this run's {rows_of_run(config)}: data.max_skipped_rows is "
            f"{config.data.max_skipped_rows} and data.max_skipped_share {config.data.max_skipped_share}."
        )
