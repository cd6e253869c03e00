"""Decide what a start does in its run directory, by what lies there: begin, resume, complete, nothing, or refuse.

`docs/running.md` has the table. No torch: the dry run prints what is decided here, and the real start acts on it.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ebft_mega.checkpoint.commit import CHECKPOINTS, newest, step_of
from ebft_mega.checkpoint.manifest import MANIFEST_NAME
from ebft_mega.checkpoint.resume_candidates import Candidates, candidates, named_origin
from ebft_mega.checkpoint.resume_rules import other_critic
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_record import critic_record
from ebft_mega.errors import EXIT_DONE, ConfigError, InputProblems, Problem
from ebft_mega.io.output_directory import discard_hidden_siblings
from ebft_mega.io.standard_streams import print_line
from ebft_mega.lifecycle.findings import PREVIOUS, Findings, is_settled, look, status_says_done, strange_entries
from ebft_mega.lifecycle.run_record import RunRecord, data_differences, noted_differences, refused_differences
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.run_files import MODEL_FOLDER, REPORT_NAME, write_status
from ebft_mega.runtime.run_lock import RunLock


class Action(Enum):
    """What a start does."""

    BEGIN = "begin"  # at the first step
    RESUME = "resume"  # from a checkpoint
    COMPLETE = "complete"  # all steps are done: only the final model is missing, and a checkpoint has it
    NOTHING = "nothing"  # everything is there


@dataclass(frozen=True)
class Standing:
    """What a start does, and what it finds."""

    action: Action
    words: str  # for people, before it is done
    logged_step: int = -1  # the last step that metrics and report show
    model_step: int | None = None  # optimizer steps of the final model that is there
    notes: tuple[str, ...] = ()

    def notes_on_going_back(self, step: int) -> tuple[str, ...]:
        """Say where a run takes steps again that its directory shows already.

        Args:
            step: optimizer steps done where it starts.
        """
        notes = []
        if step < self.logged_step:
            first, last = step + 1, self.logged_step
            again = f"step {last} is" if first == last else f"steps {first} to {last} are"
            notes.append(
                f"the metrics there show {last} steps and the run starts after step {step}: {again} taken again"
            )
        if self.model_step is not None and step < self.model_step:
            notes.append(
                f"{MODEL_FOLDER}/ is of step {self.model_step} and the run starts after step {step}: it stays until "
                "the new model replaces it"
            )
        return tuple(notes)


def early_standing(config: RunConfig, plan: RunPlan) -> Standing | None:
    """Decide before the ranks are connected, where they are sure to decide alike; None where they are not.

    Raises:
        ConfigError: the start is refused.
    """
    if not is_settled(config.output_dir, is_alone=plan.parallel.world_size == 1):
        return None
    return standing_of(config, plan)


def standing_of(config: RunConfig, plan: RunPlan) -> Standing:
    """Decide what a start does.

    Raises:
        ConfigError: it is refused: another run's results lie there, or what is asked for cannot follow from them.
    """
    if strange := list(strange_entries(config.output_dir)):
        raise ConfigError([problem.within(config.place("output_dir")) for problem in strange])
    found = look(config.output_dir)
    chosen = candidates(config)
    _require_a_manifest(config, chosen)
    if not found.has_results:
        _require_its_critic(config, plan, chosen)
        return _first_start(chosen)
    now = RunRecord.of(config, plan, named_origin(config, chosen))
    standing = decide(config, found, chosen, now)
    if standing.action is Action.RESUME:
        _require_its_critic(config, plan, chosen)
    return replace(standing, logged_step=found.logged_step, model_step=found.model_step)


def decide(config: RunConfig, found: Findings, chosen: Candidates, now: RunRecord) -> Standing:
    """Decide what a start does in a directory that holds results. Reads nothing.

    Args:
        found: what lies there.
        chosen: the checkpoints that the start may resume from.
        now: the run that is asked for.
    Raises:
        ConfigError: it is refused.
    """
    output, steps = found.output, now.steps
    assert steps is not None, "a plan knows them"
    own = [step_of(path.name) or 0 for path in chosen.paths if path.parent == output / CHECKPOINTS]
    resumed = next(iter(own), None)  # steps of the checkpoint to resume from, if it is the run's own
    refuse = _Refusal(config, found)
    refuse.another_run(chosen, now, may_change_data=config.data.allow_changed and resumed is not None)
    reached = max(resumed or 0, found.model_step or 0)
    if steps < reached:
        refuse.fewer_steps(steps, reached)
    if config.checkpoint.resume == "never" and found.is_finished:
        refuse.because("checkpoint.resume", "never", "auto: the run that is there is finished")
    if chosen.abandoned and chosen.is_explicit and found.is_finished:
        expected = f"the newest checkpoint of {output}, whose run is finished"
        refuse.because("checkpoint.resume", config.checkpoint.resume, expected)
    if found.has_model and found.model_step == steps:
        refuse.other_numbers(found.model or found.record, now)
        return Standing(Action.NOTHING, f"done at step {steps}, nothing to do")
    if resumed == steps:
        refuse.other_numbers(found.record, now)
        path = chosen.paths[0]
        return Standing(
            Action.COMPLETE,
            f"The {steps} steps of the run are done and its model is missing: it is written from {path}.",
        )
    if resumed is not None:
        return Standing(Action.RESUME, _resuming_words(chosen))
    if found.has_model:
        refuse.because(
            "train.max_steps" if config.train.max_tokens is None else "train.max_tokens",
            f"{steps} optimizer steps",
            f"those of {output / MODEL_FOLDER}, or a checkpoint to resume from, and there is none",
        )
    return replace(_first_start(chosen), notes=_begun_again(found))


def conclude(config: RunConfig, standing: Standing, write_report: Callable[[Path], Path]) -> int:
    """End a start that has nothing to do: write the report and the outcome if they are missing. No other file changes.

    Called by one process of the job; the others see nothing but the exit code.
    """
    output = config.output_dir
    steps = standing.model_step or 0
    discard_hidden_siblings(output / MODEL_FOLDER)
    if not (output / REPORT_NAME).exists():
        write_report(output)
        print_line(f"note: {output / REPORT_NAME} was missing and has been written", sys.stdout)
    if not status_says_done(output):
        write_status(output, "done", EXIT_DONE, steps, newest(output / CHECKPOINTS))
    for line in (standing.words, f"report: {output / REPORT_NAME}", f"model:  {output / MODEL_FOLDER}"):
        print_line(line, sys.stdout)
    return EXIT_DONE


def conclude_early(config: RunConfig, plan: RunPlan, write_report: Callable[[Path], Path]) -> int:
    """`conclude` of a process that is not connected to others; it takes the lock if there is something to write.

    Raises:
        InputError: another run has taken the directory.
    """
    output = config.output_dir
    standing = standing_of(config, plan)
    if (output / REPORT_NAME).exists() and status_says_done(output):
        return conclude(config, standing, write_report)
    with RunLock(output):
        return conclude(config, standing, write_report)


class _Refusal:
    """Refuse a start with what is there and the two ways out."""

    def __init__(self, config: RunConfig, found: Findings):
        self._config, self._found = config, found

    def because(self, key: str, found: str, expected: str) -> None:
        """Refuse for one key.

        Raises:
            ConfigError: always.
        """
        self._with([Problem(self._config.place(key), key, found, expected)])

    def another_run(self, chosen: Candidates, now: RunRecord, may_change_data: bool) -> None:
        """Refuse if another run's results are there."""
        config, found, then = self._config, self._found, self._found.record
        if then is None:
            if not found.checkpoints:
                self._with([])  # results of a run of which nothing is known
            return  # a start looks into the checkpoints
        problems = refused_differences(then, now, config, found.output)
        if not may_change_data and not any(problem.key == "seed" for problem in problems):  # it decides their order
            problems += data_differences(then, now, config, found.output)
        if not problems and not _begins_where_it_began(then, now, chosen, found, config):
            key, began = "checkpoint.resume", then.started_from
            origin = began.path if began is not None else "its first step"
            expected = f"auto, or what the run began from, {origin}, as in {found.output}"
            problems = [Problem(config.place(key), key, config.checkpoint.resume, expected)]
        if problems:
            self._with(problems)

    def other_numbers(self, then: RunRecord | None, now: RunRecord) -> None:
        """Refuse if all steps are done, but with other settings than are asked for."""
        config, found = self._config, self._found
        if then is not None:
            problems = noted_differences(then, now, config, found.output)
            problems += data_differences(then, now, config, found.output)
            if problems:
                self._with(problems)

    def fewer_steps(self, steps: int, reached: int) -> None:
        """Refuse because more steps are done than are asked for."""
        key = "train.max_steps" if self._config.train.max_tokens is None else "train.max_tokens"
        expected = f"at least the {reached} steps that are done, in {self._found.output}; {reached} for that very run"
        self.because(key, f"{steps} optimizer steps", expected)

    def _with(self, problems: list[Problem]) -> None:
        output = self._found.output
        found = f"{output} with {self._found.words}"
        expected = f"another output_dir, or --fresh, which sets everything there aside in {output / PREVIOUS}"
        ways = Problem(self._config.place("output_dir"), "output_dir", found, expected)
        raise ConfigError([*problems, ways])


def _begins_where_it_began(
    then: RunRecord, now: RunRecord, chosen: Candidates, found: Findings, config: RunConfig
) -> bool:
    """Whether a run that begins from a named checkpoint is the one that is there."""
    if not chosen.is_explicit or now.started_from is None:
        return True
    if any(path.parent == found.output / CHECKPOINTS for path in chosen.paths):
        return True  # recognised by its checkpoints
    began = then.started_from
    if began is None:
        # Without a record of its own nothing says where it began; then it must not have results.
        return then.initial_model is None and not found.is_finished
    if began.manifest_sha256 == now.started_from.manifest_sha256:
        return True
    # The path may be of a run that has continued since.
    return Path(began.path).is_relative_to(os.path.realpath(config.checkpoint.resume))


def _require_a_manifest(config: RunConfig, chosen: Candidates) -> None:
    """Refuse a start whose checkpoints all lack the file that is written last, as the start itself would later.

    Raises:
        ConfigError: there are checkpoints to resume from, by their names, and none has a manifest.
    """
    if chosen.paths and not any(os.path.lexists(path / MANIFEST_NAME) for path in chosen.paths):
        key = "checkpoint.resume"
        found = f"{', '.join(map(str, chosen.paths))}, without {MANIFEST_NAME}: written only in part"
        expected = "a whole checkpoint; `checkpoint.resume: never` begins anew"
        raise ConfigError([Problem(config.place(key), key, found, expected)])


def _require_its_critic(config: RunConfig, plan: RunPlan, chosen: Candidates) -> None:
    """Refuse a start whose token critic cannot take over what that of the checkpoint has learned.

    Raises:
        ConfigError: they predict other features, or by other vectors of tokens.
    """
    critic = critic_record(config, plan.architecture, plan.feature_architecture)
    if critic is None:
        return
    for path in chosen.paths:
        try:
            saved = read_run(path)
        except InputProblems:
            continue  # the start passes over it, too, or says what is wrong
        if problems := other_critic(saved, config, critic):
            raise ConfigError(problems)
        return


def _first_start(chosen: Candidates) -> Standing:
    """A start in a directory in which there is nothing to resume from."""
    if chosen.paths:
        return Standing(Action.RESUME, _resuming_words(chosen))
    return Standing(Action.BEGIN, "The run begins at its first step.")


def _resuming_words(chosen: Candidates) -> str:
    paths = [path for path in chosen.paths if os.path.lexists(path / MANIFEST_NAME)] or list(chosen.paths)
    older = ", or from an older one if that is not whole" if len(paths) > 1 else ""
    return f"The run resumes from {paths[0]}{older}."


def _begun_again(found: Findings) -> tuple[str, ...]:
    """A note where what a killed start has left is begun anew."""
    if found.checkpoints or found.logged_step < 0:
        return ()
    return ("an earlier start of this run left no checkpoint: what it wrote is replaced",)
