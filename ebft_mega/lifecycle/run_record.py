"""What makes a run that run: recorded in its directory and in its model, and compared when it is started again."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from ebft_mega.checkpoint.manifest import read_manifest_bytes
from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.checkpoint.resume_rules import (
    BY_CONTENTS,
    BY_ENTRY,
    NOTED,
    REFUSED,
    Rule,
    changed_values,
    shown,
    sizes,
    total_steps,
    values_by_key,
)
from ebft_mega.checkpoint.run_state import StartedFrom
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.stream_state import StreamState, check_resumable
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.records import Count, Record, Sha256, parse_record
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.registry.plugin_records import PluginRecord, plugin_records

RECORD_NAME = "run.json"  # in the run directory and in its model's
# Keys whose contents a record names by their hash; a path may change while they stay the same.
_HELD_OUT_KEY = "evaluation.shards"
_RECORDED = tuple(key for key in (*REFUSED, *NOTED, *BY_ENTRY) if key != _HELD_OUT_KEY)
# Of a file of weights so much is hashed: all of a small one, else samples that lie evenly in it, and both ends.
WHOLE_BYTES = 8 * 2**20
SAMPLES, SAMPLE_BYTES = 256, 2048


class RunRecord(Record):
    """The identity of a run.

    What is None is not known: earlier versions of this program kept no record, and a plan may be made without data.
    """

    version: Literal[1] = 1
    step: Count | None = None  # in a model's directory: the optimizer steps that it has taken
    steps: Count | None  # optimizer steps of the whole run
    settings: dict[str, Any]  # values by dotted key of what makes another run, or other numbers
    architecture: dict[str, Any] | None  # sizes by name
    data: StreamState | None  # before the first row, or at a checkpoint
    held_out: Sha256 | Literal["none"] | None  # fingerprint of the held-out dataset
    initial_model: str | None  # fingerprints of weights
    feature_model: str | None
    started_from: StartedFrom | None = None  # the checkpoint that `checkpoint.resume` named when the run began
    plugins: tuple[PluginRecord, ...] | None = None
    model_step: Count | None = None  # in a run directory: steps of the model that was there when the run was extended

    @classmethod
    def of(cls, config: RunConfig, plan: RunPlan, started_from: StartedFrom | None = None) -> "RunRecord":
        """Describe the run that a configuration asks for.

        Reads parts of the weights.

        Args:
            started_from: the checkpoint that it begins from, unless it begins at step 0.
        """
        values = values_by_key(config.model_dump(mode="json"))
        return cls(
            steps=plan.total_steps,
            settings={key: values[key] for key in _RECORDED},
            architecture=_plain(sizes(plan.architecture)),
            data=plan.train_rows.state if plan.train_rows else None,
            held_out=_held_out(plan),
            initial_model=_initial_model(config, plan),
            feature_model=_feature_model(config, plan),
            started_from=started_from,
            plugins=plugin_records(config.loaded_plugins),
        )

    @classmethod
    def of_configuration(cls, tree: dict[str, Any]) -> "RunRecord":
        """Describe a run of which only `config.resolved.yaml` is left: what its keys name cannot be compared."""
        values = values_by_key(tree)
        recorded = {key: values[key] for key in (*_RECORDED, _HELD_OUT_KEY, *BY_CONTENTS) if key in values}
        return cls(
            steps=total_steps(tree),
            settings=recorded,
            architecture=None,
            data=None,
            held_out=None,
            initial_model=None,
            feature_model=None,
        )

    @classmethod
    def of_checkpoint(cls, saved: SavedRun) -> "RunRecord":
        """Describe a run by one of its checkpoints."""
        record = cls.of_configuration(saved.config)
        changes = {"architecture": _plain(sizes(saved.architecture)), "data": saved.state.data}
        return record.model_copy(update={**changes, "started_from": saved.state.started_from})

    def to_json(self) -> str:
        """The record as one JSON object, indented for people."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "RunRecord | None":
        """Read what `to_json` wrote; None if there is no such file.

        Raises:
            BrokenCheckpointError: it is no such record.
            InputError: a newer version of this program has written it.
        """
        try:
            return parse_record(cls, path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None


def _held_out(plan: RunPlan) -> str | None:
    if plan.evaluation_rows is not None:
        return plan.evaluation_rows.manifest.fingerprint
    return None if plan.lacks("evaluation.shards") else "none"


def _initial_model(config: RunConfig, plan: RunPlan) -> str | None:
    if plan.lacks("model.init_from"):
        return None
    directory = config.model.init_from
    return (
        weights_fingerprint(directory) if directory else f"random {_hash_of(to_jsonable_python(config.model.config))}"
    )


def _feature_model(config: RunConfig, plan: RunPlan) -> str | None:
    if plan.lacks("ebft.feature_model"):
        return None
    if config.ebft.feature_model is None:
        return "the initial model"
    # Other sizes or rotary settings make another network of the same weights.
    settings = _hash_of(_plain(sizes(plan.feature_architecture)))
    return f"{weights_fingerprint(config.ebft.feature_model)}, settings {settings}"


def refused_differences(then: RunRecord, now: RunRecord, config: RunConfig, where: Path) -> list[Problem]:
    """List what makes the run that is asked for another one than that of a record.

    Args:
        now: what `config` asks for.
        where: directory that the record describes, for messages.
    """
    as_there = f"as in {where}"
    problems = [
        Problem(config.place(key), key, shown(new), f"{shown(old)}, {as_there}")
        for key, rule, old, new in _changed_settings(then, config)
        if rule is not Rule.NOTED
    ]
    model_key = "model.init_from" if config.model.config is None else "model.config"
    old_sizes, new_sizes = then.architecture or {}, now.architecture or {}
    for name in sorted(old_sizes.keys() & new_sizes.keys()):
        if old_sizes[name] != new_sizes[name]:
            expected = f"{shown(old_sizes[name])}, {as_there}"
            problems.append(Problem(config.place(model_key), f"{model_key}: {name}", shown(new_sizes[name]), expected))
    for key, old_weights, new_weights in (
        (model_key, then.initial_model, now.initial_model),
        ("ebft.feature_model", then.feature_model, now.feature_model),
    ):
        if None not in (old_weights, new_weights) and old_weights != new_weights and not problems:
            found, expected = f"a model of fingerprint {new_weights}", f"the model of {old_weights}, {as_there}"
            problems.append(Problem(config.place(key), key, found, expected))
    return problems


def data_differences(then: RunRecord, now: RunRecord, config: RunConfig, where: Path) -> list[Problem]:
    """List what differs in the training data, as `refused_differences` does in the rest."""
    if then.data is None or now.data is None:
        return []
    at_the_same_row = now.data.model_copy(update={"next_row": then.data.next_row})
    try:
        check_resumable(then.data, at_the_same_row)
    except InputError as error:
        key = config.data.mixture_key
        return [
            Problem(config.place(key), each.key, each.found, f"{each.expected}, as in {where}")
            for each in error.problems
        ]
    return []


def noted_differences(then: RunRecord, now: RunRecord, config: RunConfig, where: Path) -> list[Problem]:
    """List what a resumed run may change, and what makes results other ones."""
    problems = [
        Problem(config.place(key), key, shown(new), f"{shown(old)}, as in {where}")
        for key, rule, old, new in _changed_settings(then, config)
        if rule is Rule.NOTED
    ]
    if None not in (then.held_out, now.held_out) and then.held_out != now.held_out:
        found, expected = f"a dataset of fingerprint {now.held_out}", f"{then.held_out}, as in {where}"
        problems.append(Problem(config.place(_HELD_OUT_KEY), _HELD_OUT_KEY, found, expected))
    return problems


def _changed_settings(then: RunRecord, config: RunConfig) -> Iterator[tuple[str, Rule, Any, Any]]:
    """Keys that differ, of those that a record knows by their values."""
    for key, rule, old, new in changed_values(then.settings, config):
        if rule in (Rule.REFUSED, Rule.NOTED) and (key != _HELD_OUT_KEY or then.held_out is None):
            yield key, rule, old, new
        if rule is Rule.BY_CONTENTS and key in then.settings:
            is_known = then.data is not None if key.startswith("data.") else False
            if not is_known and not _is_same_place(old, new):
                yield key, rule, old, new


def _is_same_place(old: Any, new: Any) -> bool:
    return isinstance(old, str) and isinstance(new, str) and os.path.realpath(old) == os.path.realpath(new)


def weights_fingerprint(directory: Path) -> str:
    """Name a model by its weights, without reading all of them.

    Of a checkpoint the hash of its manifest, which names all others.
    """
    if is_checkpoint(directory):
        return f"checkpoint {hashlib.sha256(read_manifest_bytes(directory)).hexdigest()}"
    digest = hashlib.sha256()
    for path in sorted({stored.file for stored in stored_tensors(directory)[0].values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start, length in _samples(size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Where a file is read, and how much there."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    return [(number * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for number in range(SAMPLES)]


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back."""
    return dict(json.loads(json.dumps(to_jsonable_python(content))))


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
