"""Configuration keys of what a run reads: the model, the training text, the held-out text. No torch, no file access.

They are part of `schema.py`, where the other sections and the whole configuration stand.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ebft_mega.config.fields import (
    DATASET_PLACE,
    PATH,
    DatasetPlace,
    LocalPath,
    ModelPlace,
    RedirectHost,
    as_tuple,
)
from ebft_mega.extension.options import Section, key

STEPS = "optimizer steps"


class ModelConfig(Section):
    """The policy to train: exactly one of the two keys."""

    init_from: ModelPlace | None = key(
        None,
        "Model to start from: a Hugging Face directory (`config.json`, `*.safetensors`, a tokenizer), or a checkpoint "
        "of another run, of which only the weights are taken. From a store it is downloaded into `data.cache` before "
        "the start.",
        allowed=DATASET_PLACE,
    )
    config: dict[str, Any] | None = key(
        None,
        "Architecture of a model with random weights, as in a Hugging Face `config.json`.",
        allowed="a mapping of architecture fields in Hugging Face's names",
    )


class SourceConfig(Section):
    """Each source below `data.sources`, under a name that metrics use too."""

    shards: DatasetPlace = key(..., "As `data.shards`.", allowed=DATASET_PLACE)
    weight: float = key(1.0, "Share of the rows, relative to the other sources' weights.", gt=0)
    max_epochs: float | None = key(
        None, "Passes over the source; then training continues without it. Not set: indefinitely.", unit="epochs", gt=0
    )


RowRange = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(as_tuple)
]
SourceName = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_-]*$")]


class DataConfig(Section):
    """The text to train on: exactly one of `shards` and `sources`."""

    shards: DatasetPlace | None = key(
        None,
        "Dataset directory made by `tools/build_shards.py`, or a directory of text webdataset shards, which is "
        "tokenized once.",
        allowed=DATASET_PLACE,
    )
    sources: Annotated[dict[SourceName, SourceConfig], Field(min_length=1)] | None = key(
        None,
        "Several datasets, mixed row by row in exact proportion to their weights.",
        allowed="a mapping of names (letters, digits, _ and -) to sections with shards, weight and max_epochs",
    )
    sequence_length: int = key(..., "P: tokens in one packed row.", unit="tokens", ge=2)
    document_masking: bool = key(
        False,
        "Hide the other documents of a row from each token, restart positions at each document, and drop anchors whose "
        "context or target crosses a boundary.",
    )
    train_on_first_token: bool = key(
        True,
        "Learn by cross-entropy to predict the first token of a document from the end of the one before it; `false` "
        "leaves these positions out of the loss. Rollouts, rewards and held-out figures are as before.",
    )
    on_error: Literal["raise", "skip"] = key(
        "raise",
        "When damaged data is found in mid-run: `raise` ends the run with exit code 4, `skip` leaves the row out and "
        "records it in `data_errors.jsonl`.",
    )
    skip_rows: Annotated[tuple[RowRange, ...], BeforeValidator(as_tuple)] = key(
        (),
        "Rows of the run that are left out: the first and the last of each range, as `data_errors.jsonl` and "
        "`non_finite/` number them. They are not read and become filler; every other row keeps its place.",
        allowed="a list of pairs [first, last] of row numbers, each an integer >= 0",
    )
    allow_changed: bool = key(
        False,
        "(ours) Resume although the data has changed since the checkpoint; documents may be seen twice or missed.",
    )
    max_skipped_rows: int = key(
        100, "(ours) With `on_error: skip`: rows that may be left out; one more ends the run.", unit="rows", ge=0
    )
    max_skipped_share: float = key(
        0.001, "(ours) The same as a share of all rows of the run; the smaller of the two limits applies.", ge=0, le=1
    )
    workers: int = key(
        1, "(ours) Processes per rank that read rows ahead; 0: a thread. Same rows either way.", unit="processes", ge=0
    )
    tokenizer: LocalPath | None = key(
        None, "(ours) Tokenizer directory for text shards; not set: that of `model.init_from`.", allowed=PATH
    )
    cache: LocalPath = key(
        Path("runs/cache"), "(ours) Where downloaded and tokenized shards are stored; runs may share it.", allowed=PATH
    )
    cache_gigabytes: float = key(
        100.0,
        "(ours) Limit for what is downloaded into the cache; the least recently used is deleted first. If not even a "
        "few shards fit, single documents are fetched instead; index and tokenizer may take 0.1 in any case.",
        unit="1e9 bytes",
        ge=0,
    )
    redirect_hosts: Annotated[tuple[RedirectHost, ...], BeforeValidator(as_tuple)] = key(
        (),
        "(ours) Servers that a server of `https://` data may redirect to, besides itself. `host` stands for its port "
        "443, `*.domain` for every host below the domain; all other redirects are refused.",
        allowed="a list of host, host:port or *.domain",
    )

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; `shards` alone is one source."""
        if self.sources is not None:
            return self.sources
        return {"shards": SourceConfig(shards=self.shards)} if self.shards is not None else {}

    @property
    def mixture_key(self) -> str:
        """The dotted key of all sources together."""
        return "data.shards" if self.sources is None else "data.sources"

    def source_key(self, name: str) -> str:
        """Return the dotted key that names a source's place."""
        return "data.shards" if self.sources is None else f"data.sources.{name}.shards"


class EvaluationConfig(Section):
    """Evaluation on held-out rows at step 0, at every interval and at the end; none without `shards`."""

    shards: DatasetPlace | None = key(None, "Held-out dataset directory.", allowed=DATASET_PLACE)
    interval: int | None = key(
        None, "Optimizer steps between evaluations; not set: only at step 0 and at the end.", unit=STEPS, ge=1
    )
    rows: int = key(64, "Held-out rows that every evaluation reads.", ge=1)
