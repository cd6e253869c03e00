"""The initial model of a run: undamaged at every start, and the same one for as long as the run lasts.

And the software that a checkpoint was written with, against what is here.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.manifest import Manifest, file_problems, read_listed, read_manifest, share_of_files
from ebft_mega.checkpoint.model_folder import WEIGHTS_FOLDER, is_checkpoint
from ebft_mega.checkpoint.plugin_changes import plugin_changes
from ebft_mega.checkpoint.resume_rules import sizes
from ebft_mega.checkpoint.run_state import Layout, RunState, StartedFrom
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import BrokenCheckpointError, InputError, Problem
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.progress_bar import BYTES
from ebft_mega.lifecycle.build import feature_weights, initial_weights
from ebft_mega.metrics.announcer import Announcer, counted
from ebft_mega.model.weights.weight_sources import InitialWeights, RandomWeights, identity
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.exchange import all_gather_values
from ebft_mega.runtime.run_files import ENVIRONMENT_NAME, describe_environment
from ebft_mega.train.progress import Progress


@dataclass(frozen=True)
class RunIdentity:
    """What a run keeps from its first step to its last, and the layout of this start of it."""

    seed: int
    feature_network: str | None  # sha256 of the initial model; None: no rollouts
    feature_source: str  # where it came from, in words
    feature_architecture: dict[str, Any] | None  # its sizes and rotary settings by name; None: no rollouts
    layout: Layout
    started_from: StartedFrom | None  # the checkpoint that `checkpoint.resume` named

    def state(self, progress: Progress, loader: BatchLoader, optimizer_updates: int) -> RunState:
        """What a checkpoint says of the run.

        Args:
            optimizer_updates: steps that changed the weights.
        """
        data = loader.state
        return RunState(
            step=progress.step,
            optimizer_updates=optimizer_updates,
            skipped_steps=progress.skipped.total,
            skipped_in_a_row=progress.skipped.in_a_row,
            tokens=data.next_row * data.sequence_length,
            seed=self.seed,
            data=data,
            feature_network=self.feature_network,
            feature_source=self.feature_source,
            feature_architecture=self.feature_architecture,
            layout=self.layout,
            evaluations=tuple(progress.evaluations),
            pending_metrics=progress.pending,
            started_from=self.started_from,
        )


def run_identity(
    config: RunConfig,
    plan: RunPlan,
    saved: SavedRun | None,
    started_from: StartedFrom | None,
    announcer: Announcer,
) -> RunIdentity:
    """What stays the same from the first step of a run to its last.

    Args:
        saved: the run to resume; None: a new one.
        started_from: the checkpoint that `checkpoint.resume` named, now or when the run began.
        announcer: says how far the hashing of the initial model has come.
    Raises:
        InputError: the initial model is not the one that the resumed run began with.
    Communication: that of `require_same_initial_model`.
    """
    source = feature_weights(config, plan.feature_architecture, initial_weights(config, plan.architecture))
    place = config.ebft.feature_model or config.model.init_from
    described = require_same_feature_architecture(config, plan.feature_architecture, saved.state if saved else None)
    parallel = plan.parallel
    return RunIdentity(
        seed=config.seed,
        feature_network=(
            require_same_initial_model(config, source, saved, announcer) if config.uses_rollouts else None
        ),
        feature_source=f"random weights of seed {config.seed}" if place is None else str(place),
        feature_architecture=described if config.uses_rollouts else None,
        layout=Layout(
            data_parallel=parallel.data_parallel,
            tensor_parallel=parallel.tensor_parallel,
            pipeline_parallel=parallel.pipeline_parallel,
            sequence_parallel=config.parallel.sequence_parallel,
            zero_stage=config.zero.stage,
            world_size=dist.get_world_size(),
        ),
        started_from=started_from,
    )


def require_whole_models(config: RunConfig, announcer: Announcer) -> None:
    """Check the weights of the models that a run starts from and that are checkpoints of other runs.

    Args:
        announcer: says how far it has come.
    Raises:
        BrokenCheckpointError: their files are not those that were written.
    Communication: collective over the world; each file is hashed by one rank.
    """
    for directory in (config.model.init_from, config.ebft.feature_model):
        if directory is not None and from_first_rank(partial(is_checkpoint, directory)):
            manifest = from_first_rank(partial(read_manifest, directory), Manifest)
            problems = damaged_files(directory, manifest, WEIGHTS_FOLDER, announcer)
            if problems:
                raise BrokenCheckpointError(problems)


def require_same_initial_model(
    config: RunConfig, source: InitialWeights, saved: SavedRun | None, announcer: Announcer
) -> str:
    """The identity of the model that the feature network is made of, which is the same for as long as the run lasts.

    Args:
        source: the feature network's weights.
        saved: the run to resume; None: a new one.
        announcer: says how far it has come.
    Returns:
        sha256 of its weights, wherever they lie.
    Raises:
        InputError: the resumed run began with other weights.
    Communication: one gathering over the world; each rank hashes a part of the model.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    names = source.digest_names()
    own, unit = names[rank::size], "tensors" if isinstance(source, RandomWeights) else "files"
    words = f"hashing the initial model, {len(names)} {unit}" + f", {len(own)} of them here" * (size > 1)
    with announcer.phase(words, len(own), unit) as count:
        parts = all_gather_values({name: source.digest(name) for name in counted(own, count)})
    found = identity({name: digest for part in parts for name, digest in part.items()})
    expected = None if saved is None else saved.state.feature_network
    if saved is not None and expected != found:
        key = "ebft.feature_model" if config.ebft.feature_model is not None else "model"
        source_then = saved.state.feature_source
        words = f"the initial model of this run, {source_then}, with sha256 {expected}"
        raise InputError([Problem(config.place(key), key, f"weights with sha256 {found}", words)])
    return found


def require_same_feature_architecture(
    config: RunConfig, architecture: Architecture, saved: RunState | None
) -> dict[str, Any]:
    """What decides the feature network beside its weights, which is the same for as long as the run lasts.

    Args:
        architecture: of the feature network.
        saved: of the run to resume; None: a new one.
    Returns:
        Sizes and rotary settings by name.
    Raises:
        InputError: the resumed run began with others; each with both values.
    Communication: none.
    """
    found = sizes(architecture)
    then = (saved.feature_architecture if saved else None) or {}
    key = "ebft.feature_model" if config.ebft.feature_model is not None else "model"
    problems = [
        Problem(config.place(key), f"{key}: {name}", repr(found[name]), f"{then[name]!r}, as this run began with")
        for name in sorted(found.keys() & then.keys())
        if found[name] != then[name]
    ]
    if problems:
        raise InputError(problems)
    return found


def damaged_files(directory: Path, manifest: Manifest, beginning: str, announcer: Announcer) -> list[Problem]:
    """Compare the files of a checkpoint whose names begin with `beginning` with its manifest.

    Args:
        announcer: says how far it has come.
    Communication: one gathering; each file is hashed by one rank.
    """
    size = dist.get_world_size()
    own = [name for name in share_of_files(manifest, dist.get_rank(), size) if name.startswith(beginning)]
    own_bytes = sum(manifest.files[name].bytes for name in own)
    files = [record for name, record in manifest.files.items() if name.startswith(beginning)]
    words = f"reading and hashing {directory}: {len(files)} files, {sum(file.bytes for file in files) / 1e9:.3f} GB"
    problems: list[Problem] = []
    with announcer.phase(words + f", {own_bytes / 1e9:.3f} of them here" * (size > 1), own_bytes, BYTES) as count:
        for name in own:
            problems += file_problems(directory, manifest, [name])
            count(manifest.files[name].bytes)
    return [problem for part in all_gather_values(problems) for problem in part]


def other_software(saved: SavedRun, config: RunConfig) -> list[str]:
    """Releases and plugins that differ from those that a checkpoint was written with: other results may follow."""
    content = read_listed(saved.directory, saved.manifest, ENVIRONMENT_NAME)
    with reading(saved.directory / ENVIRONMENT_NAME, "packages", "releases by name", BrokenCheckpointError):
        then = dict(parse_json(content.decode())["packages"])
    now = describe_environment()["packages"]
    changed = [
        f"{name} {then.get(name)} -> {version}" for name, version in now.items() if then.get(name, version) != version
    ]
    notes = [f"other software than at the checkpoint: {', '.join(changed)}"] * bool(changed)
    return [*notes, *plugin_changes(saved, config.loaded_plugins)]
