"""Where a run starts: at step 0, or at the newest checkpoint that is complete and undamaged for every rank."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ebft_mega.checkpoint.commit import (
    CHECKPOINTS,
    point_latest,
    pointed_at,
    remove_leftovers,
    restore_replaced,
    set_aside,
    step_of,
)
from ebft_mega.checkpoint.manifest import unlisted_files
from ebft_mega.checkpoint.resume_candidates import Candidates, candidates, origin
from ebft_mega.checkpoint.resume_rules import noted_changes, refused_changes
from ebft_mega.checkpoint.run_state import StartedFrom
from ebft_mega.checkpoint.saved_run import SavedRun, read_run
from ebft_mega.checkpoint.tensor_index import TensorIndex
from ebft_mega.checkpoint.tensors import CheckpointTensors, SavedState, open_index
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_record import critic_record
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import BrokenCheckpointError, ConfigError, Problem
from ebft_mega.lifecycle.model_identity import damaged_files, other_software
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.planning.data_budget import rows_of_run, skipped_rows_problems
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.train.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where this start of a run begins: a checkpoint, or step 0."""

    progress: Progress
    saved: SavedRun | None  # None: a new run
    index: TensorIndex | None  # where its tensors lie
    started_from: StartedFrom | None  # the checkpoint that `checkpoint.resume` named, now or when the run began
    notes: tuple[str, ...]
    abandoned: tuple[int, ...]  # steps of checkpoints that the run does not descend from
    broken: tuple[Path, ...]  # checkpoints that were passed over
    keeps_critic: bool = False  # a token critic is taken over from the checkpoint

    @property
    def saved_state(self) -> SavedState | None:
        """What of the checkpoint's tensors is taken over."""
        if self.saved is None or self.index is None:
            return None
        state, tensors = self.saved.state, CheckpointTensors(self.saved.directory, self.index)
        return SavedState(tensors, state.optimizer_updates, state.critic if self.keeps_critic else None)

    def is_in(self, output_dir: Path) -> bool:
        """Whether the checkpoint to resume from lies in the run's own directory."""
        return self.saved is not None and self.saved.directory.resolve().parent == (output_dir / CHECKPOINTS).resolve()


def find_start(config: RunConfig, plan: RunPlan, loader: BatchLoader, announcer: Announcer) -> Start:
    """Choose the checkpoint, check it, and move the loader to where it was taken.

    Nothing on the disk changes but the name of a checkpoint that had stepped aside: a start that is refused must leave
    everything as it is. `tidy` does the rest.

    Args:
        announcer: says what is read and how far it has come.
    Raises:
        BrokenCheckpointError: the checkpoint that was named is not whole, or none of those that are there is.
        ConfigError, InputError: something has changed that may not.
    Communication: collective over the world; every file of the checkpoint is read and hashed by one rank.
    """
    root = config.output_dir / CHECKPOINTS
    restored = from_first_rank(lambda: restore_replaced(root))
    notes = [f"{name} has its name again: the run was killed while it replaced it" for name in restored]
    with announcer.phase(f"looking for checkpoints to resume from in {root}"):
        found = from_first_rank(lambda: candidates(config), Candidates)
    notes += found.notes
    saved, broken = _newest_whole(found, notes, announcer)
    if saved is not None:
        critic = critic_record(config, plan.architecture, plan.feature_architecture)
        refused = from_first_rank(lambda: refused_changes(saved, config, plan.architecture, critic))
        if refused:
            raise ConfigError(refused)
        notes += noted_changes(saved, config, critic)
        notes += from_first_rank(lambda: other_software(saved, config))
        notes += loader.resume(saved.state.data, allow_changed=config.data.allow_changed)
        problems = list(_rest_does_not_fit(config, plan, saved, loader))
        if problems:
            raise ConfigError(problems)
        notes.append(f"going on after step {saved.state.step} from {saved.directory}")
        keeps_critic = critic is not None and saved.state.critic is not None
        index = from_first_rank(lambda: open_index(saved, config, plan.architecture, keeps_critic), TensorIndex)
        progress, started_from = Progress.of(saved.state), origin(saved, found)
        return Start(progress, saved, index, started_from, tuple(notes), found.abandoned, tuple(broken), keeps_critic)
    if beyond := list(skipped_rows_problems(config, rows_of_run(config))):
        raise ConfigError(beyond)
    set_aside_before = from_first_rank(lambda: sorted(path.name for path in root.glob("step-*.abandoned*")))
    if set_aside_before and config.checkpoint.resume == "auto":
        notes.append(f"beginning anew beside checkpoints that were set aside: {', '.join(set_aside_before)}")
    return Start(Progress(), None, None, None, tuple(notes), found.abandoned, tuple(broken))


def _rest_does_not_fit(config: RunConfig, plan: RunPlan, saved: SavedRun, loader: BatchLoader) -> Iterator[Problem]:
    """What is left of a run, against what the configuration and the data give."""
    done, total, train = saved.state.step, plan.total_steps, config.train
    if done > total:
        key = "train.max_steps" if train.max_tokens is None else "train.max_tokens"
        expected = f"at least the {done} steps that are done, in {saved.directory}"
        yield Problem(config.place(key), key, f"{total} optimizer steps", expected)
        return
    next_row, rows = loader.state.next_row, train.global_batch_size
    if train.max_tokens is not None and next_row != done * rows:
        # Its number of steps would be that of a run that always had this batch size.
        key, found = "train.global_batch_size", f"{rows}, with train.max_tokens"
        expected = f"as before ({done} steps have read {next_row} rows), or train.max_steps instead of train.max_tokens"
        yield Problem(config.place(key), key, found, expected)
        return
    there_are = loader.stream.total_rows
    needed = next_row + (total - done) * rows
    yield from skipped_rows_problems(config, needed)
    if there_are is not None and needed > there_are:
        key = config.data.mixture_key
        found = f"{there_are} rows until every source's max_epochs is reached"
        expected = f"at least {needed}: {next_row} that are read and those of {total - done} more steps"
        yield Problem(config.place(key), key, found, expected)


def _newest_whole(found: Candidates, notes: list[str], announcer: Announcer) -> tuple[SavedRun | None, list[Path]]:
    """The first candidate without a problem, and those before it, which are noted."""
    all_problems: list[Problem] = []
    broken: list[Path] = []
    for directory in found.paths:
        saved, problems = from_first_rank(partial(_try, directory), SavedRun)
        if saved is not None:
            problems = damaged_files(saved.directory, saved.manifest, "", announcer)
            if not problems:
                notes += from_first_rank(partial(_foreign_files, saved))
                return saved, broken
        broken.append(directory)
        all_problems += problems
        notes.append(f"passed over {directory}: " + "; ".join(_within(directory, each) for each in problems))
    if all_problems:
        expected = "a whole checkpoint; `checkpoint.resume: never` begins anew"
        all_problems.append(Problem("checkpoint.resume", "all checkpoints", f"{len(found.paths)} broken", expected))
        raise BrokenCheckpointError(all_problems)
    return None, broken


def _within(directory: Path, problem: Problem) -> str:
    """A problem of a checkpoint that is named already; its file is named once."""
    place = problem.where.removeprefix(str(directory)).removeprefix("/")
    names = [name for name in dict.fromkeys((place, problem.key.removeprefix(f"{directory}/"))) if name]
    return f"{': '.join(names)}: found {problem.found}; expected {problem.expected}"


def _try(directory: Path) -> tuple[SavedRun | None, Sequence[Problem]]:
    try:
        return read_run(directory), ()
    except BrokenCheckpointError as error:
        return None, error.problems


def _foreign_files(saved: SavedRun) -> list[str]:
    names = unlisted_files(saved.directory, saved.manifest)
    return [f"{saved.directory}: not read, because its manifest does not name them: {', '.join(names)}"] * bool(names)


def tidy(root: Path, start: Start) -> tuple[str, ...]:
    """Clean up a run's checkpoint folder, once nothing can refuse the start any more.

    What a killed run left half written is removed; what the run does not descend from and what is broken is set aside;
    `latest` names the checkpoint that the run resumes from.

    Returns:
        Notes on all that.
    Communication: one broadcast over the world; the first rank does it.
    """
    return from_first_rank(partial(_tidy, root, start))


def _tidy(root: Path, start: Start) -> tuple[str, ...]:
    notes = []
    for name in remove_leftovers(root):
        notes.append(f"removed {name}: a checkpoint that was never completed")
        logger.warning("%s", notes[-1])
    notes += [f"set aside {name}: this run does not descend from it" for name in set_aside(root, start.abandoned)]
    # They would count as checkpoints to keep, and push whole ones out.
    steps = [step for path in start.broken if path.parent == root and (step := step_of(path.name)) is not None]
    notes += [f"set aside {name}: it is not whole" for name in set_aside(root, steps, "broken")]
    if start.saved is not None and start.is_in(root.parent) and pointed_at(root) != start.saved.directory.name:
        # The run was killed after a checkpoint was committed and before `latest` named it.
        point_latest(root, start.saved.directory.name)
    return tuple(notes)
