"""The commands that make an experiment's runs and evaluations, each with what its result is made from. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ebft_mega.apps.experiment.declared.spec_file import place_of
from ebft_mega.apps.experiment.runs.command_lines import CommandLines
from ebft_mega.apps.experiment.runs.job_inputs import evaluation_inputs, training_inputs
from ebft_mega.apps.experiment.runs.stamps import Stamp, differences, read_stamp
from ebft_mega.apps.experiment.runs.trial_runs import (
    ExperimentSetup,
    Split,
    evaluation_directory,
    feature_model,
    model_of,
    run_directory,
    trial_overrides,
    trial_text,
)
from ebft_mega.apps.experiment.trials import Choice, Trial
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.runtime.run_files import LOGS, MODEL_FOLDER, STATUS_NAME

EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Job:
    """A command, where its result lies and what that is made from."""

    name: str
    kind: Literal["train", "evaluate"]
    output: Path
    command: Callable[[], list[str]]  # asked for when it is started: ports must be free then
    inputs: Mapping[str, Any]

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.output / LOGS / "experiment.log" if self.kind == "train" else self.output / "evaluate.log"

    def is_done(self) -> bool:
        """Whether its result is there, whole, and made from these inputs by a command that has ended well.

        Raises:
            InputProblems: its stamp cannot be read.
        """
        stamp = read_stamp(self.output)
        if stamp is None or not stamp.is_done or not self.has_result():
            return False
        return not any(differences(self.name, stamp.inputs, self.inputs))

    def has_result(self) -> bool:
        """Whether what the command makes is there.

        Raises:
            InputError: the outcome of a run cannot be read.
        """
        if self.kind == "evaluate":
            return (self.output / EVALUATION_NAME).is_file()
        if not (self.output / STATUS_NAME).is_file() or not (self.output / MODEL_FOLDER).is_dir():
            return False
        return bool(read_contained_json(self.output, STATUS_NAME, "the outcome of a run").get("state") == "done")

    def settle(self, stamp: Stamp) -> None:
        """Do what remains when the command has ended, as the stamp says."""


@dataclass(frozen=True)
class Chain:
    """Jobs of one trial, one after the other."""

    name: str
    jobs: tuple[Job, ...]


def training_job(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice], commands: CommandLines) -> Job:
    """The job that trains a trial.

    Raises:
        ConfigError: its configuration is refused.
    """
    config = place_of(setup.plans[trial.arm].config)
    return Job(
        name=f"train {trial_text(trial)}",
        kind="train",
        output=run_directory(setup, trial),
        command=lambda: commands.train(setup, config, trial_overrides(setup, trial, chosen)),
        inputs=training_inputs(setup, trial, chosen),
    )


def evaluation_job(
    setup: ExperimentSetup, trial: Trial, split: Split, chosen: Mapping[str, Choice], commands: CommandLines
) -> Job:
    """The job that evaluates a trial on a split.

    Raises:
        ConfigError: the configuration of the evaluations is refused.
    """
    output = evaluation_directory(setup, trial, split)
    inputs = evaluation_inputs(setup, trial, split, chosen)

    def command() -> list[str]:
        features = feature_model(setup, trial, chosen)
        return [*commands.evaluate(setup, split, {"": model_of(setup, trial)}, features), "--output", str(output)]

    return Job(f"evaluate {trial_text(trial)} on {split}", "evaluate", output, command, inputs)
