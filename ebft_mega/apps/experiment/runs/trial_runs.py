"""Where an experiment's runs and evaluations lie, and with which configuration each is made. No torch."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from ebft_mega.apps.experiment.declared.spec_file import SpecFile, place_of
from ebft_mega.apps.experiment.runs.arm_plans import ArmPlan, arm_plans, main_trials, start_seed
from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.apps.experiment.trials import Choice, Trial
from ebft_mega.config.load import load_config
from ebft_mega.config.overrides import key_of, replace_overrides
from ebft_mega.config.paths import written_path
from ebft_mega.config.schema import RunConfig
from ebft_mega.config.yaml_source import write_value
from ebft_mega.runtime.run_files import MODEL_FOLDER

Split = Literal["tuning", "report"]
MAX_SLUG = 80  # characters of a folder's name before the digits that tell long ones apart


@dataclass(frozen=True)
class ExperimentSetup:
    """An experiment and how it is run."""

    file: SpecFile
    overrides: tuple[str, ...] = ()  # `key=value` texts for every run and evaluation
    num_ranks: int = 1  # processes of a run
    steps_share: float = 1.0  # of the configured steps of every run
    _loaded: dict[tuple[str, ...], RunConfig] = field(default_factory=dict, compare=False, repr=False)

    @property
    def spec(self) -> ExperimentSpec:
        """What the file declares."""
        return self.file.spec

    @cached_property
    def plans(self) -> dict[str, ArmPlan]:
        """Every arm as it is run."""
        return arm_plans(self.spec)

    @cached_property
    def output(self) -> Path:
        """Directory of the experiment."""
        return place_of(self.spec.output_dir)

    def load(self, config: Path, overrides: Sequence[str]) -> RunConfig:
        """Read a run configuration, once for the same overrides.

        Raises:
            ConfigError: it is refused.
        """
        key = (str(config), *overrides)
        if key not in self._loaded:
            self._loaded[key] = load_config(config, overrides)
        return self._loaded[key]


def slug(text: str) -> str:
    """A folder's name for a text: other texts have other names, whatever characters they hold."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")[:MAX_SLUG]
    if plain == text:
        return plain
    return f"{plain or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def choice_text(choice: Choice) -> str:
    """The chosen values, such as `train.lr=0.001`; empty where nothing was chosen."""
    return " ".join(f"{key}={write_value(value)}" for key, value in choice)


def trial_text(trial: Trial) -> str:
    """A trial in words, such as `ce train.lr=0.001 seed 0`."""
    seed = "" if trial.seed is None else f"seed {trial.seed}"
    return " ".join(filter(None, (trial.arm, choice_text(trial.choice), seed)))


def _folder(trial: Trial) -> Path:
    parts = [slug(trial.arm)]
    if trial.choice:
        # A name for people where it is short; `=` is no character of all file systems' names.
        parts.append(slug("_".join(f"{key}-{write_value(value)}" for key, value in trial.choice)))
    return Path(*parts, "model" if trial.seed is None else f"seed-{trial.seed}")


def run_directory(setup: ExperimentSetup, trial: Trial) -> Path:
    """Run directory of a trial that is trained."""
    own = setup.spec.arms[trial.arm].directory
    if own is not None and trial.purpose == "main":
        return place_of(own)
    return setup.output / "runs" / _folder(trial)


def evaluation_directory(setup: ExperimentSetup, trial: Trial, split: Split) -> Path:
    """Directory of a trial's `evaluation.json`."""
    return setup.output / "evaluations" / split / _folder(trial)


def split_place(setup: ExperimentSetup, split: Literal["train", "tuning", "report"]) -> Path:
    """Directory of a split's dataset."""
    return place_of(getattr(setup.spec.splits, split))


def start_trial(setup: ExperimentSetup, arm: str | None, seed: int | None, chosen: Mapping[str, Choice]) -> Trial:
    """The run of an arm that a run of this seed starts from.

    Raises:
        KeyError: no arm has this name, or the choice of its values is not known yet.
    """
    plan = setup.plans[arm or ""]
    wanted = start_seed(plan, seed)
    return next(trial for trial in main_trials(plan, setup.spec, chosen) if trial.seed == wanted)


def model_of(setup: ExperimentSetup, trial: Trial) -> Path:
    """Model directory of a trial, once it is trained."""
    model = setup.plans[trial.arm].model
    return place_of(model) if model is not None else run_directory(setup, trial) / MODEL_FOLDER


def named_model(setup: ExperimentSetup, name: str, seed: int | None, chosen: Mapping[str, Choice]) -> Path:
    """The model that a name stands for: that of an arm's run, or a directory."""
    return model_of(setup, start_trial(setup, name, seed, chosen)) if name in setup.plans else place_of(name)


def trial_overrides(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice]) -> list[str]:
    """`key=value` texts that make the run configuration of an arm that of a trial.

    Args:
        chosen: choices of the arms that it starts from.
    Raises:
        ConfigError: the arm's configuration cannot be read.
    """
    plan = setup.plans[trial.arm]
    of_split = [f"data.shards={_path_value(split_place(setup, 'train'))}"]
    own = [f"{key}={write_value(value)}" for key, value in (*plan.settings.items(), *trial.choice)]
    # An arm may train on other data, and several sources take the place of the split.
    if any(key.startswith("data.sources") for key in (*plan.settings, *dict(trial.choice))):
        of_split = []
    decided = [f"output_dir={_path_value(run_directory(setup, trial))}", f"seed={trial.seed}"]
    if plan.start is not None:
        decided.append(f"model.init_from={_path_value(named_model(setup, plan.start, trial.seed, chosen))}")
        decided.append("model.config=null")
    given = replace_overrides(replace_overrides(of_split, own), setup.overrides)
    if "evaluation.shards" not in map(key_of, given):
        given = [f"evaluation.shards={_path_value(split_place(setup, 'tuning'))}", *given]
    return replace_overrides(given, [*decided, *_fewer_steps(setup, place_of(plan.config), given)])


def _fewer_steps(setup: ExperimentSetup, config: Path, given: list[str]) -> list[str]:
    """`key=value` texts for the share of the steps that is asked for, at least 2 (a first and a last one)."""
    if setup.steps_share == 1:
        return []
    configured = load_config(config, given)
    steps = max(2, round(configured.total_steps * setup.steps_share))
    warmup = min(configured.train.warmup_steps, steps - 1)
    return [f"train.max_steps={steps}", "train.max_tokens=null", f"train.warmup_steps={warmup}"]


def trial_config(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice]) -> RunConfig:
    """The configuration of a trial's run.

    Raises:
        ConfigError: it is refused.
    """
    return setup.load(place_of(setup.plans[trial.arm].config), trial_overrides(setup, trial, chosen))


def evaluation_config(setup: ExperimentSetup) -> RunConfig:
    """The configuration of all evaluations: that of the experiment, whatever an arm sets, so that figures compare.

    Raises:
        ConfigError: it is refused.
    """
    return setup.load(place_of(setup.spec.config), setup.overrides)


def feature_model(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice]) -> Path | None:
    """The frozen network that a trial is evaluated with; None: the run configuration names it.

    Raises:
        KeyError: it is that of an arm whose choice is not known yet.
    """
    name = setup.spec.evaluation.feature_model or setup.spec.start
    return None if name is None else named_model(setup, name, trial.seed, chosen)


@cache
def _path_value(path: Path) -> str:
    return write_value(written_path(path))
