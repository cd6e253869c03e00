"""Evaluate several models in one process: most of a small evaluation's time is that of starting one. No torch."""

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.experiment.runs.command_lines import CommandLines
from ebft_mega.apps.experiment.runs.jobs import EVALUATION_NAME, Chain, Job, evaluation_job
from ebft_mega.apps.experiment.runs.stamps import Stamp, Start, write_stamp
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, Split, feature_model, model_of
from ebft_mega.apps.experiment.trials import Choice, Trial

MOST_MODELS = 8  # of a process: what is done of a batch that is interrupted is done again
_DIVIDED = ("wall_seconds", "cpu_seconds")


@dataclass(frozen=True)
class EvaluationBatch(Job):
    """Evaluations that one command makes; each has its own directory and stamp as if it had been made alone."""

    members: Mapping[str, Job]  # by the name that the command has for the model

    def has_result(self) -> bool:
        """Whether the command has made every evaluation."""
        return all((self.output / name / EVALUATION_NAME).is_file() for name in self.members)

    def is_done(self) -> bool:
        """Whether all evaluations are there."""
        return all(job.is_done() for job in self.members.values())

    def settle(self, stamp: Stamp) -> None:
        """Put every evaluation in its place, with a stamp that has its share of what the command took."""
        if not stamp.is_done:
            return
        starts = tuple(_share(start, len(self.members)) for start in stamp.starts)
        for name, job in self.members.items():
            if job.output.exists():
                shutil.rmtree(job.output)
            job.output.parent.mkdir(parents=True, exist_ok=True)
            (self.output / name).rename(job.output)
            write_stamp(job.output, Stamp(inputs=dict(job.inputs), is_done=True, starts=starts))
        shutil.rmtree(self.output)


def _share(start: Start, count: int) -> Start:
    values = {name: getattr(start, name) for name in _DIVIDED}
    return start.model_copy(update={name: value / count for name, value in values.items() if value is not None})


def evaluation_batches(
    setup: ExperimentSetup,
    trials: Sequence[Trial],
    split: Split,
    chosen: Mapping[str, Choice],
    commands: CommandLines,
    processes: int,
) -> list[Chain]:
    """The evaluations of a split that are not there yet, in batches of models that have their frozen network in common.

    Args:
        processes: that evaluate at a time; with fewer models than these have room for, batches are smaller.
    """
    groups: dict[Path | None, list[tuple[Trial, Job]]] = {}
    for trial in trials:
        job = evaluation_job(setup, trial, split, chosen, commands)
        if not job.is_done():
            groups.setdefault(feature_model(setup, trial, chosen), []).append((trial, job))
    chains = []
    for features, group in groups.items():
        count = min(MOST_MODELS, math.ceil(len(group) / processes))
        for first in range(0, len(group), count):
            part = group[first : first + count]
            job = _batch(setup, part, split, features, commands) if len(part) > 1 else part[0][1]
            chains.append(Chain(job.name, (job,)))
    return chains


def _batch(
    setup: ExperimentSetup,
    part: Sequence[tuple[Trial, Job]],
    split: Split,
    features: Path | None,
    commands: CommandLines,
) -> EvaluationBatch:
    members = {f"m{number}": job for number, (_, job) in enumerate(part)}
    models = {f"m{number}": model_of(setup, trial) for number, (trial, _) in enumerate(part)}
    names = ", ".join(job.name.removeprefix("evaluate ").removesuffix(f" on {split}") for job in members.values())
    mark = hashlib.sha256(names.encode()).hexdigest()[:12]
    output = setup.output / "evaluations" / split / f".batch-{mark}"

    def command() -> list[str]:
        return [*commands.evaluate(setup, split, models, features), "--output", str(output)]

    inputs = {name: dict(job.inputs) for name, job in members.items()}
    return EvaluationBatch(f"evaluate on {split}: {names}", "evaluate", output, command, inputs, members)
