"""The command lines of an experiment's runs and evaluations. No torch."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ebft_mega.apps.experiment.declared.spec_file import place_of
from ebft_mega.apps.experiment.running.commands import find_program, free_port, tool_command
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, Split, split_place
from ebft_mega.config.yaml_source import write_value


class CommandLines(Protocol):
    """Makes the commands."""

    def train(self, setup: ExperimentSetup, config: Path, overrides: list[str]) -> list[str]:
        """The command of a training run."""

    def evaluate(
        self, setup: ExperimentSetup, split: Split, models: Mapping[str, Path], features: Path | None
    ) -> list[str]:
        """The command of an evaluation, all but its `--output`.

        Args:
            models: directories by name; one alone has none.
            features: directory of the frozen network; None: as the configuration says.
        """


class ToolCommands:
    """The launcher and `tools/evaluate.py`, by this interpreter."""

    def train(self, setup: ExperimentSetup, config: Path, overrides: list[str]) -> list[str]:
        """A run of one process needs no launcher."""
        command = [sys.executable]
        if setup.num_ranks > 1:
            command = [str(find_program("deepspeed")), "--num_gpus", str(setup.num_ranks)]
            command += ["--master_port", str(free_port())]
        command += ["launcher/train.py", "--config", str(config)]
        return [*command, "--set", *overrides] if overrides else command

    def evaluate(
        self, setup: ExperimentSetup, split: Split, models: Mapping[str, Path], features: Path | None
    ) -> list[str]:
        """Everything is measured in one sampling; lengths and maps of the report split alone."""
        spec = setup.spec
        rows = spec.evaluation.rows if split == "report" else spec.tuning.rows
        arguments = [
            word for name, model in models.items() for word in ("--model", f"{name}={model}" if name else str(model))
        ]
        arguments += ["--data", str(split_place(setup, split)), "--rows", str(rows)]
        arguments += ["--config", str(place_of(spec.config))]
        arguments += ["--feature-model", str(features)] if features is not None else []
        measured = spec.evaluation
        arguments += ["--samples", str(measured.samples)] if measured.samples is not None else []
        arguments += ["--temperatures", *(f"{each:g}" for each in measured.temperatures)]
        if split == "report":
            lengths = list(map(str, measured.completion_lengths))
            arguments += ["--completion-lengths", *lengths] if lengths else []
            for name, choice in measured.feature_maps.items():
                keys = choice.model_dump(mode="json", exclude_none=True)
                arguments += ["--feature-map", name, *(f"{key}={write_value(value)}" for key, value in keys.items())]
        # One process evaluates, whatever the layout of the runs.
        overrides = [each for each in setup.overrides if not each.startswith("parallel.")]
        arguments += ["--set", *overrides] if overrides else []
        return tool_command("evaluate.py", arguments)
