"""Random access to the packed rows of a run, mixed from its sources, without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ebft_mega.data.rows.document_cache import DOCUMENT_CACHE_BYTES, DocumentCache
from ebft_mega.data.rows.mixing import Mixture, integer_weights
from ebft_mega.data.rows.packing import PackedLine, Span, Window
from ebft_mega.data.rows.stream_state import SourceState, StreamState
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.errors import InputError, Problem


@dataclass(frozen=True)
class Source:
    """A dataset that a run reads, and how much of it."""

    name: str
    dataset: Dataset
    weight: Fraction = Fraction(1)  # share of the rows, in proportion to the other sources' weights
    max_epochs: float | None = None  # passes over it in the whole run, whole rows only; None: endless


@dataclass(frozen=True)
class Row:
    """One packed row of raw text."""

    tokens: np.ndarray  # int64 [P]
    # int64 [P]: epoch * documents of the dataset + number of the document, so that neighbouring tokens have equal ids
    # exactly where they belong to one document, also where an epoch ends. An end-of-document token has its document's.
    document_ids: np.ndarray
    source: int  # position in the stream's sources


class RowStream:
    """The rows of a run in the order of a seed; any row can be read at any time, at the same cost.

    Each source is an endless line of documents, packed into rows (see `packing`); the sources take turns by their
    weights (see `mixing`).

    Args:
        sources: at least one; their names and their datasets differ.
        sequence_length: tokens in a row, P.
        seed: seed of the order; None keeps shards, documents and rows in dataset order, the same in every epoch.
        document_cache_bytes: limit of each source's cache of documents read last, see `DocumentCache`.

    Raises:
        InputError: with all problems: a source with fewer tokens than one row, a `max_epochs` that allows no row,
            two sources of one name or dataset, several tokenizers, or impossible weights.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        seed: int | None,
        document_cache_bytes: int = DOCUMENT_CACHE_BYTES,
    ):
        if sequence_length < 1:
            raise ValueError(f"sequence_length {sequence_length} is not positive")
        if not sources:
            raise ValueError("no sources")
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.seed = seed
        problems = _problems(self.sources, sequence_length)
        if problems:
            raise InputError(problems)
        shares = integer_weights([each.name for each in sources], [each.weight for each in sources])
        self._mixture = Mixture(shares, [_max_rows(each, sequence_length) for each in sources])
        self._lines = [_line(each.dataset, sequence_length, seed) for each in sources]
        self._documents = [DocumentCache(each.dataset, document_cache_bytes) for each in sources]
        self._entered: list[Window | None] = [None] * len(sources)

    @classmethod
    def of(cls, dataset: Dataset, sequence_length: int, seed: int | None) -> "RowStream":
        """The endless rows of a single dataset; the arguments are those of the constructor."""
        return cls([Source(dataset.directory.name, dataset)], sequence_length, seed)

    @property
    def total_rows(self) -> int | None:
        """Number of rows of the run; None: endless, because a source is."""
        return self._mixture.total_rows

    @property
    def tail_tokens(self) -> tuple[int, ...]:
        """Tokens of each source that its `max_epochs` allows and that fill no whole row; 0 for an endless one."""
        return tuple(0 if limit is None else limit % self.sequence_length for limit in map(_max_tokens, self.sources))

    def rows_by_source(self, num_rows: int) -> tuple[int, ...]:
        """How many of the first rows of the run come from each source.

        Raises:
            IndexError: there are fewer rows.
        """
        return self._mixture.rows_by_source(num_rows)

    def state(self, next_row: int, skipped_rows: int = 0) -> StreamState:
        """The state of a run that has used the rows before `next_row`.

        Args:
            next_row: at most `total_rows`.
            skipped_rows: of those rows, the ones that were damaged.
        """
        total_weight = sum(each.weight for each in self.sources)
        sources = tuple(
            SourceState(
                name=each.name,
                fingerprint=each.dataset.manifest.fingerprint,
                tokenizer_sha256=each.dataset.manifest.tokenizer_sha256,
                weight=str(each.weight / total_weight),
                max_epochs=each.max_epochs,
                rows=rows,
            )
            for each, rows in zip(self.sources, self.rows_by_source(next_row), strict=True)
        )
        return StreamState(
            seed=self.seed,
            next_row=next_row,
            sequence_length=self.sequence_length,
            sources=sources,
            skipped_rows=skipped_rows,
        )

    def locate(self, number: int) -> tuple[int, list[Span]]:
        """Where the tokens of a row are.

        Args:
            number: row number counted through the whole run from 0.

        Returns:
            The source of the row and the token ranges of its documents in order, P tokens together.

        Raises:
            IndexError: the run has fewer rows.
        """
        source, row = self._mixture.locate(number)
        line = self._lines[source]
        window = line.window_of_row(row)
        if window is not self._entered[source]:
            self._entered[source] = window
            self.sources[source].dataset.files.expect(line.shards_from(window))
        return source, line.spans_of_row(row)

    def row(self, number: int) -> Row:
        """Read one row.

        Args:
            number: row number counted through the whole run from 0.

        Returns:
            The row, tokens and document ids int64 [P].

        Raises:
            IndexError: the run has fewer rows.
            DamagedDataError: a document of the row fails its check.
        """
        source, spans = self.locate(number)
        manifest = self.sources[source].dataset.manifest
        documents = self._documents[source]
        tokens = np.empty(self.sequence_length, np.int64)
        document_ids = np.empty(self.sequence_length, np.int64)
        filled = 0
        for span in spans:
            stored = documents.tokens(span.document)
            stop = filled + span.stop - span.start
            if span.stop > len(stored):  # its last token is the end-of-document token, which is not stored
                tokens[filled : stop - 1] = stored[span.start :]
                tokens[stop - 1] = manifest.eos_id
            else:
                tokens[filled:stop] = stored[span.start : span.stop]
            document_ids[filled:stop] = span.epoch * manifest.documents + span.document
            filled = stop
        return Row(tokens, document_ids, source)

    def filler(self, number: int) -> Row:
        """A row in place of one that cannot be read: end-of-document tokens, one document id.

        Args:
            number: row number counted through the whole run from 0.
        """
        source, _ = self._mixture.locate(number)
        tokens = np.full(self.sequence_length, self.sources[source].dataset.manifest.eos_id, np.int64)
        return Row(tokens, np.zeros_like(tokens), source)


def _line(dataset: Dataset, sequence_length: int, seed: int | None) -> PackedLine:
    manifest = dataset.manifest
    return PackedLine(
        [shard.documents for shard in manifest.shards],
        [shard.tokens for shard in manifest.shards],
        dataset.index["tokens"],
        manifest.fingerprint,
        sequence_length,
        seed,
    )


def _max_tokens(source: Source) -> int | None:
    if source.max_epochs is None:
        return None
    return math.floor(Fraction(str(source.max_epochs)) * source.dataset.manifest.tokens)


def _max_rows(source: Source, sequence_length: int) -> int | None:
    tokens = _max_tokens(source)
    return None if tokens is None else tokens // sequence_length


def _problems(sources: Sequence[Source], sequence_length: int) -> list[Problem]:
    """Reasons why these sources cannot be read together, or one of them at all."""
    problems = []
    first = sources[0]
    for number, source in enumerate(sources):
        where, manifest = str(source.dataset.directory), source.dataset.manifest
        one_row = f"at least one row of data.sequence_length = {sequence_length} tokens"
        if manifest.tokens < sequence_length:
            problems.append(Problem(where, "tokens", f"{manifest.tokens} tokens", one_row))
        elif _max_rows(source, sequence_length) == 0:
            found = f"{source.max_epochs}, which is {_max_tokens(source)} tokens of source {source.name}"
            problems.append(Problem(where, "max_epochs", found, one_row))
        if manifest.tokenizer_sha256 != first.dataset.manifest.tokenizer_sha256:
            found = f"tokens of a tokenizer with sha256 {manifest.tokenizer_sha256}"
            expected = f"the tokenizer of source {first.name}, sha256 {first.dataset.manifest.tokenizer_sha256}"
            problems.append(Problem(where, "tokenizer", found, expected))
        elif manifest.eos_id != first.dataset.manifest.eos_id:
            found = f"documents that end with token {manifest.eos_id}"
            expected = f"token {first.dataset.manifest.eos_id}, which ends the documents of source {first.name}"
            problems.append(Problem(where, "eos_id", found, expected))
        elif manifest.vocab_size != first.dataset.manifest.vocab_size:
            found = f"a vocabulary of {manifest.vocab_size} tokens"
            expected = f"{first.dataset.manifest.vocab_size} tokens, as source {first.name} has"
            problems.append(Problem(where, "vocab_size", found, expected))
        for other in sources[:number]:
            if source.name == other.name:
                problems.append(
                    Problem(where, "name", source.name, f"another name than that of {other.dataset.directory}")
                )
            if manifest.fingerprint == other.dataset.manifest.fingerprint:
                found = f"the dataset of source {other.name} once more"
                problems.append(Problem(where, "fingerprint", found, "each dataset once, with a weight"))
    return problems
