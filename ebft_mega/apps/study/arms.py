"""The three arms (training runs that are compared) of the quickstart: a warm start, then EBFT and CE-only from it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.study.commands import find_program, free_port, tool_command
from ebft_mega.apps.study.phases import PhaseRunner, remove_directory, source_fingerprint
from ebft_mega.config.load import load_config
from ebft_mega.config.objective_text import followed_objective
from ebft_mega.config.overrides import replace_overrides
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.metrics.console import format_duration

WARM_START = "warm start"
CROSS_ENTROPY = "CE-only"
EBFT = "EBFT"
CONFIGS = {
    WARM_START: Path("configs/quickstart_warmstart.yaml"),
    CROSS_ENTROPY: Path("configs/quickstart_ce.yaml"),
    EBFT: Path("configs/quickstart.yaml"),
}
DIRECTORIES = {WARM_START: "warmstart", CROSS_ENTROPY: "ce", EBFT: "ebft"}
WORKSPACE = Path("runs/quickstart")
VOCABULARY_SIZE = 512
SPLITS = ("train", "tuning", "validation")
# All that a dataset's contents depend on, below `ebft_mega/`.
DATA_CODE = ("config", "data", "extension", "io", "registry", "errors.py")


@dataclass(frozen=True)
class ArmResult:
    """A trained and evaluated arm."""

    evaluation: Path  # directory of evaluation.json
    facts: Mapping[str, str]  # how it was trained and what it cost, for a report
    run: Path  # run directory


@dataclass(frozen=True)
class Scale:
    """The share of the configured work to do."""

    factor: float = 1.0  # of the steps of every training run
    evaluation_rows: int = 256

    def steps(self, configured: int) -> int:
        """Optimizer steps of a run, at least 2 (a first and a last one)."""
        return max(2, round(configured * self.factor))


@dataclass(frozen=True)
class Experiment:
    """One training of all three arms: its directories, and the commands that it runs.

    Args:
        runner: runs and times the commands, in the repository root.
        workspace: directory of all run directories, relative to the root.
        data: directory of the corpus, tokenizer and datasets, relative to the root; may be shared.
        num_ranks: processes of a training run.
        scale: share of the configured work.
        seed: of the data order, random weights and sampling noise of every run; None keeps the configs' own.
        overrides: further `key=value` texts for every training run, such as a parallel layout.
        ebft_overrides: further `key=value` texts for the EBFT arm.
    """

    runner: PhaseRunner
    workspace: Path
    data: Path
    num_ranks: int
    scale: Scale = Scale()
    seed: int | None = None
    overrides: tuple[str, ...] = ()
    ebft_overrides: tuple[str, ...] = ()

    def prepare_data(self) -> str:
        """Build corpus, tokenizer and the dataset of each split, or reuse them.

        Returns:
            Fingerprint of everything that the datasets were made from.
        Raises:
            PhaseFailed: a tool failed.
        """
        root = self.runner.root
        code = source_fingerprint(root / "ebft_mega" / name for name in DATA_CODE)
        corpus, tokenizer = self.data / "corpus", self.data / "tokenizer"
        inputs: dict[str, object] = {"python": sys.version, "code": code}
        fingerprint = self._tool_once("corpus", "build_corpus.py", [], corpus, inputs)
        arguments = ["--input", str(corpus / "train"), "--vocab-size", str(VOCABULARY_SIZE)]
        inputs = {"corpus": fingerprint, "arguments": arguments, "code": code}
        fingerprint = self._tool_once("tokenizer", "train_tokenizer.py", arguments, tokenizer, inputs)
        for split in SPLITS:
            arguments = ["--input", str(corpus / split), "--tokenizer", str(tokenizer)]
            inputs = {"tokenizer": fingerprint, "arguments": arguments, "code": code}
            self._tool_once(f"shards {split}", "build_shards.py", arguments, self.data / split, inputs)
        return fingerprint

    def warm_start(self, data_fingerprint: str) -> None:
        """Train the model that the other arms start from, or reuse it if nothing it depends on has changed.

        Args:
            data_fingerprint: from `prepare_data`.
        Raises:
            ConfigError: the configuration is wrong.
            PhaseFailed: the run failed.
        """
        root = self.runner.root
        directory = self.workspace / DIRECTORIES[WARM_START]
        command = self._train_command(WARM_START)
        inputs = {
            "data": data_fingerprint,
            "overrides": self._overrides(WARM_START),
            "num_ranks": self.num_ranks,
            "config": source_fingerprint([root / CONFIGS[WARM_START]]),
            "code": source_fingerprint([root / "ebft_mega", root / "launcher"]),
        }
        self.runner.run_once(self._name(WARM_START), command, root / directory, inputs, status_of=root / directory)

    def train(self, arm: str) -> float:
        """Train an arm from the warm start; an earlier run of it is set aside (`--fresh`).

        Args:
            arm: `EBFT` or `CROSS_ENTROPY`.
        Returns:
            Wall seconds, the launcher's start included.
        Raises:
            ConfigError: the configuration is wrong.
            PhaseFailed: the run failed.
        """
        directory = self.runner.root / self.workspace / DIRECTORIES[arm]
        if directory.exists():
            aside = directory / "previous"
            self.runner.say(f"\n{directory}: this arm is always trained anew; what is there is set aside in {aside}")
        return self.runner.run(self._name(arm), self._train_command(arm), status_of=directory)

    def evaluate(self, arm: str, split: str) -> Path:
        """Measure an arm on held-out rows; the feature network is the warm start for every arm.

        Args:
            arm: any of the three.
            split: `validation` for a result, `tuning` to choose settings.
        Returns:
            Directory of `evaluation.json`, relative to the root.
        Raises:
            PhaseFailed: the tool failed.
        """
        output = self.workspace / "evaluation" / DIRECTORIES[arm]
        remove_directory(self.runner.root / output)
        arguments = [
            "--model",
            str(self.workspace / DIRECTORIES[arm] / "hf"),
            "--data",
            str(self.data / split),
        ]
        arguments += ["--feature-model", str(self.workspace / DIRECTORIES[WARM_START] / "hf")]
        arguments += ["--config", str(CONFIGS[EBFT]), "--rows", str(self.scale.evaluation_rows)]
        self.runner.run(
            self._name(f"evaluate {arm}"), tool_command("evaluate.py", [*arguments, "--output", str(output)])
        )
        return output

    def run_arms(self, split: str) -> dict[str, ArmResult]:
        """Prepare data, train the warm start and both arms, and evaluate all three.

        Args:
            split: held-out rows to report on.
        Returns:
            Results by arm, the warm start first.
        Raises:
            ConfigError: a configuration is wrong, or the arms would not take the same number of steps.
            PhaseFailed: a command failed.
        """
        self.check_equal_steps()
        self.warm_start(self.prepare_data())
        seconds = {arm: self.train(arm) for arm in (EBFT, CROSS_ENTROPY)}
        return {
            arm: ArmResult(
                evaluation=self.evaluate(arm, split),
                facts=self._facts(arm, seconds.get(arm)),
                run=self.workspace / DIRECTORIES[arm],
            )
            for arm in DIRECTORIES
        }

    def check_equal_steps(self) -> None:
        """Check that both arms train on the same amount of text.

        Raises:
            ConfigError: EBFT and CE-only differ in steps or in tokens per step.
        """
        ebft, cross_entropy = self.config(EBFT), self.config(CROSS_ENTROPY)
        problems = [
            Problem(
                str(CONFIGS[CROSS_ENTROPY]),
                key,
                str(theirs),
                f"{ours}, as in {CONFIGS[EBFT]}: the arms are compared",
            )
            for key, ours, theirs in (
                ("train.max_steps", ebft.total_steps, cross_entropy.total_steps),
                ("tokens per step", ebft.tokens_per_step, cross_entropy.tokens_per_step),
            )
            if ours != theirs
        ]
        if problems:
            raise ConfigError(problems)

    def config(self, arm: str) -> RunConfig:
        """The configuration that an arm is trained with, overrides applied.

        Raises:
            ConfigError: it is wrong.
        """
        return load_config(self.runner.root / CONFIGS[arm], self._overrides(arm))

    def _overrides(self, arm: str) -> list[str]:
        """`key=value` texts for values that differ from the config file; none for the plain quickstart."""
        path = self.runner.root / CONFIGS[arm]
        extra = replace_overrides(self.overrides, self.ebft_overrides if arm == EBFT else ())
        configured = load_config(path, extra)
        steps = self.scale.steps(configured.total_steps)
        wanted: dict[str, tuple[object, object]] = {
            "output_dir": (configured.output_dir, self.workspace / DIRECTORIES[arm]),
            "data.shards": (configured.data.shards, self.data / "train"),
            "evaluation.shards": (configured.evaluation.shards, self.data / "tuning"),
            "train.max_steps": (configured.total_steps, steps),
            "train.warmup_steps": (
                configured.train.warmup_steps,
                min(configured.train.warmup_steps, steps - 1),
            ),
        }
        if arm != WARM_START:
            warm = self.workspace / DIRECTORIES[WARM_START] / "hf"
            wanted["model.init_from"] = (configured.model.init_from, warm)
        if self.seed is not None:
            wanted["seed"] = (configured.seed, self.seed)
        # The paths of a loaded configuration are absolute.
        other = [
            f"{key}={new}"
            for key, (old, new) in wanted.items()
            if (REPOSITORY / new if isinstance(new, Path) else new) != old
        ]
        return replace_overrides(extra, other)

    def _train_command(self, arm: str) -> list[str]:
        command = [str(find_program("deepspeed")), "--num_gpus", str(self.num_ranks)]
        command += ["--master_port", str(free_port()), "launcher/train.py", "--config", str(CONFIGS[arm]), "--fresh"]
        for override in self._overrides(arm):
            command += ["--set", override]
        return command

    def _tool_once(
        self, name: str, tool: str, arguments: Sequence[str], output: Path, inputs: Mapping[str, object]
    ) -> str:
        command = tool_command(tool, [*arguments, "--output", str(output)])
        return self.runner.run_once(name, command, self.runner.root / output, inputs)

    def _name(self, phase: str) -> str:
        return phase if self.seed is None else f"{phase} (seed {self.seed})"

    def _facts(self, arm: str, seconds: float | None) -> dict[str, str]:
        config = self.config(arm)
        facts = {
            "config": str(CONFIGS[arm]),
            "objective": followed_objective(config),
            "optimizer steps": str(config.total_steps),
            "tokens of text": f"{config.total_steps * config.tokens_per_step:,}",
            "learning rate": f"{config.train.lr:g} {config.train.lr_scheduler}",
        }
        if seconds is not None:
            facts["wall time"] = f"{format_duration(seconds)} ({self.num_ranks} processes)"
        return facts
