"""The contents of a checkpoint's `state.json`: what a resumed run needs beside weights and optimizer state."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

from ebft_mega.critic.critic_record import CriticRecord
from ebft_mega.data.rows.stream_state import StreamState
from ebft_mega.io.records import Count, Record, Sha256, parse_record

STATE_NAME = "state.json"
# JSON has no numbers for these; they are written as words, so that a metric is read back as it was.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


Metric = Annotated[float, BeforeValidator(_number), PlainSerializer(_plain, when_used="json")]


class Layout(Record):
    """How the run was spread over processes; another start may have another layout."""

    data_parallel: Count
    tensor_parallel: Count
    pipeline_parallel: Count
    sequence_parallel: bool
    zero_stage: Count
    world_size: Count


class EvaluationRecord(Record):
    """The held-out figures of one evaluation."""

    step: Count
    metrics: dict[str, Metric]


class StartedFrom(Record):
    """The checkpoint that `checkpoint.resume` named when the run began."""

    path: str
    manifest_sha256: Sha256


class RunState(Record):
    """The contents of `state.json`."""

    version: Literal[1] = 1
    step: Count  # optimizer steps done
    optimizer_updates: Count  # steps that changed the weights
    skipped_steps: Count  # steps that did not, because something was not finite
    skipped_in_a_row: Count  # of these, the last ones without an update in between
    tokens: Count  # of raw text, read by the steps done
    seed: Count  # of the data order, of random weights and of the sampling noise, which has no other state
    data: StreamState
    feature_network: Sha256 | None  # identity of the initial model's weights; None: there are no rollouts
    feature_source: str  # where they came from, in words
    # Its sizes and rotary settings by name; None: a checkpoint of before they were recorded, or no rollouts.
    feature_architecture: dict[str, str | bool | int | float | None] | None = None
    critic: CriticRecord | None = None  # None: the estimator reads none
    layout: Layout
    evaluations: tuple[EvaluationRecord, ...]
    # Metrics of the last step that are not logged yet, because its evaluation was still to come; None: all is logged.
    pending_metrics: dict[str, Metric] | None
    started_from: StartedFrom | None

    def to_json(self) -> str:
        """The state as one JSON object; numbers that are not finite are written as words."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes, where: str = STATE_NAME) -> "RunState":
        """Read what `to_json` wrote.

        Args:
            where: the file that it comes from, for messages.
        Raises:
            BrokenCheckpointError: it is no such state, with the problems found.
            InputError: a newer version of this program has written it.
        """
        return parse_record(cls, text, where)
