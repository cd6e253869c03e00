"""Run directories as runs leave them, put together without a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ebft_mega.checkpoint.commit import CHECKPOINTS, publish, temporary_folder
from ebft_mega.checkpoint.manifest import Manifest, write_file, write_manifest
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_record import critic_record
from ebft_mega.lifecycle.run_record import RunRecord
from ebft_mega.lifecycle.standing import Standing, standing_of
from ebft_mega.planning.run_plan import RunPlan, check_run
from ebft_mega.runtime.run_files import write_status
from tests.unit.checkpoint.folder_stand_ins import run_state


@dataclass(frozen=True)
class Site:
    """Inputs, and a run directory."""

    inputs: object

    @property
    def output(self) -> Path:
        return self.inputs.root / "run"

    def planned(self, *overrides: str) -> tuple[RunConfig, RunPlan]:
        config = load_config(self.inputs.write(), overrides)
        return config, check_run(config, 1)

    def standing(self, *overrides: str) -> Standing:
        """What a start would do."""
        return standing_of(*self.planned(*overrides))

    def begin(self, *overrides: str, logged: int = -1, is_recorded: bool = True) -> None:
        """What a start writes before its first step, and its metrics up to a step.

        Args:
            is_recorded: False: as versions without `run.json` did.
        """
        config, plan = self.planned(*overrides)
        self.output.mkdir(exist_ok=True)
        (self.output / "config.resolved.yaml").write_text(resolved_yaml(config))
        if is_recorded:
            (self.output / "run.json").write_text(RunRecord.of(config, plan).to_json())
        lines = [json.dumps({"step": step, "train/lr": 1.0}) + "\n" for step in range(logged + 1)]
        (self.output / "metrics.jsonl").write_text("".join(lines))

    def save(self, step: int, *overrides: str) -> None:
        """A checkpoint."""
        config, plan = self.planned(*overrides)
        temporary = temporary_folder(self.output / CHECKPOINTS, step)
        critic = critic_record(config, plan.architecture, plan.feature_architecture, batches=step)
        state = run_state(step, seed=config.seed, data=plan.train_rows.state, critic=critic)
        contents = {
            "state.json": state.to_json().encode(),
            "config.resolved.yaml": resolved_yaml(config).encode(),
            "config.json": json.dumps(self.inputs.model_fields).encode(),
        }
        files = {name: write_file(temporary, name, content) for name, content in contents.items()}
        write_manifest(temporary, Manifest(version=1, step=step, files=files))
        publish(temporary, self.output / CHECKPOINTS)

    def export(self, *overrides: str, is_recorded: bool = True, folder: str = "hf") -> None:
        """The final model."""
        config, plan = self.planned(*overrides)
        directory = self.output / folder
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.inputs.model_fields))
        save_file({"w": np.full((3, 2), plan.total_steps, np.float32)}, directory / "model.safetensors")
        if is_recorded:
            record = RunRecord.of(config, plan).model_copy(update={"step": plan.total_steps})
            (directory / "run.json").write_text(record.to_json())

    def finish(self, *overrides: str, checkpoint: bool = True, model: bool = True, is_recorded: bool = True) -> None:
        """A run that came to its end."""
        steps = self.planned(*overrides)[1].total_steps
        self.begin(*overrides, logged=steps, is_recorded=is_recorded)
        if checkpoint:
            self.save(steps, *overrides)
        if model:
            self.export(*overrides, is_recorded=is_recorded)
        (self.output / "report.html").write_text("a page")
        write_status(self.output, "done", 0, steps, f"step-{steps:08d}" if checkpoint else None)

    def add_other_data(self) -> str:
        """Make another dataset of the same tokenizer; returns the override that names it."""
        self.inputs.add_dataset("other", "model", [90, 310, 199, 57])
        return f"data.shards={self.inputs.root / 'other'}"

    def change_model(self) -> None:
        """Replace the initial model's weights under the same path."""
        path = self.inputs.root / "model" / "model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)

    def contents(self) -> dict[str, tuple[bytes, int]]:
        """Every file of the run directory, with its contents and time."""
        files = sorted(path for path in self.output.rglob("*") if path.is_file())
        return {
            path.relative_to(self.output).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files
        }
