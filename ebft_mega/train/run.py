"""One run, from its configuration to its final model: everything is built here and nowhere else."""

import datetime
import hashlib
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ebft_mega.apps.report.run_report import write_run_report
from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute, make_route
from ebft_mega.checkpoint.commit import CHECKPOINTS, newest
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.checkpoint.run_state import STATE_NAME, Layout
from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.checkpoint.tensors import CheckpointTensors, CheckpointWeights, restore_engine
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader, fixed_rows
from ebft_mega.data.text.tokenizer import load_tokenizer
from ebft_mega.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_STOPPED,
    ConfigError,
    EbftError,
    InputError,
    LockLostError,
    PeerFailedError,
    Problem,
)
from ebft_mega.evaluation.held_out import EvaluationSettings
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.io.output_directory import refuse_other_contents
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.metrics.sinks import MetricsWriter, cut_after
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.huggingface import (
    CONFIG_NAME,
    InitialWeights,
    RandomWeights,
    WeightSource,
    hf_tensors,
    load_weights,
    write_model,
)
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine
from ebft_mega.planning.auto import choices, default_choices
from ebft_mega.planning.datasets import open_place, open_training_rows
from ebft_mega.planning.memory import Choices
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.runtime.agreement import from_first_rank, require_agreement
from ebft_mega.runtime.run_files import (
    RESOLVED_CONFIG_NAME,
    STATUS_NAME,
    RunState,
    failure_on_record,
    record_failure,
    setup_rank_log,
    write_environment,
    write_status,
)
from ebft_mega.runtime.run_lock import RunLock
from ebft_mega.runtime.stop_requests import Signals, StopReason, StopRequests
from ebft_mega.runtime.watchdog import COLLECTIVE_MARGIN, Watchdog, leave_soon
from ebft_mega.train.describing_files import describing_files, generation_config
from ebft_mega.train.loop import HeldOut, Observer, rows_of_step, train
from ebft_mega.train.progress import Progress, RunIdentity
from ebft_mega.train.skipped_rows import ERRORS_NAME
from ebft_mega.train.start import Start, find_start, require_same_initial_model, require_whole_models, tidy
from ebft_mega.train.step import Trainer
from ebft_mega.train.step_boundary import Boundary
from ebft_mega.train.step_trace import trace_step
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)

MODEL_FOLDER = "hf"  # of a run directory: the final model


def run_training(
    config: RunConfig, plan: RunPlan, trace_directory: Path | None, signals: Signals, started_monotonic: float
) -> int:
    """Train, or trace one step.

    Args:
        plan: what `check_run` made of the configuration for this world size.
        trace_directory: write the trace of step 0 there and do nothing else.
        signals: those that this process gets.
        started_monotonic: `time.monotonic()` when the process started.
    Returns:
        Exit code of every rank: 0, or 75 if the run stopped on request.
    Communication: every rank of the job calls it.
    """
    step_timeout = timeout_of_steps(config)
    collective_timeout = step_timeout + COLLECTIVE_MARGIN
    parallel = config.parallel
    device = connect(collective_timeout)
    refuse_without_gpu(config, device)
    groups = make_process_groups(
        device,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        collective_timeout,
    )
    loader = make_loader(config, groups, is_trace=trace_directory is not None)
    held_out = plan.evaluation_rows
    require_agreement(
        {
            "configuration, sha256": hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
            config.data.mixture_key: loader.state.to_json(),
            "evaluation.shards": held_out.manifest.fingerprint if held_out else "none",
        }
    )
    require_whole_models(config)
    if trace_directory is not None:
        with Watchdog(step_timeout, log_path=None, record=lambda: EXIT_HANG), closing(iter(loader)) as batches:
            trainer = build_chosen_trainer(config, plan, groups)
            trace_step(trainer, rows_of_step(next(batches).rows, config, groups.device), trace_directory)
            dist.barrier()
        return EXIT_DONE

    output = config.output_dir
    make_run_directory(config)
    with ExitStack() as held_to_the_end:
        lock = RunLock(output)
        lock_notes = from_first_rank(lambda: held_to_the_end.enter_context(lock).notes)
        lock_lost = (lambda: lock.lost) if groups.is_world_first else (lambda: False)
        requests = StopRequests(signals, output, started_monotonic, config.train.max_run_minutes, groups.is_world_first)
        return _run(config, plan, groups, loader, requests, lock_lost, lock_notes)


def _run(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    loader: BatchLoader,
    requests: StopRequests,
    lock_lost: Callable[[], bool],
    notes: tuple[str, ...],
) -> int:
    """The run, in a directory that is its own; returns the exit code."""
    output = config.output_dir
    log_path = setup_rank_log(output, dist.get_rank())
    notes += tuple(f"the file {name} of an earlier run was deleted" for name in requests.clear())
    if groups.is_world_first:
        (output / STATUS_NAME).unlink(missing_ok=True)  # the outcome of an earlier run there
    dist.barrier()  # from here on a status is one of this run
    progress = Progress()

    def newest_checkpoint() -> str | None:
        try:
            return newest(output / CHECKPOINTS)
        except OSError:  # must not hide what it is asked for
            return None

    def fail(exit_code: int) -> int:
        try:
            return record_failure(output, exit_code, progress.step, newest_checkpoint())
        except OSError:  # the disk may be what has failed
            logger.exception("the outcome could not be recorded")
            return exit_code

    try:
        with Watchdog(timeout_of_steps(config), log_path, lambda: fail(EXIT_HANG)) as watchdog:
            start = find_start(config, plan, loader)
            watchdog.beat("checking of the checkpoint")
            progress, start = start.progress, replace(start, notes=(*notes, *start.notes))
            stopped = _train_and_export(config, plan, groups, loader, start, requests, lock_lost, watchdog)
            dist.barrier()
    except BaseException as error:
        leave_soon()
        logger.info("this rank failed", exc_info=True)  # below a warning, because it is on its way to standard error
        if isinstance(error, LockLostError):
            raise  # the directory and the outcome in it are another run's
        # A rank whose peer failed loses its connection; the peer's own word is the one that counts.
        peer_code = failure_on_record(output)
        if peer_code is not None and not isinstance(error, EbftError):
            raise PeerFailedError(peer_code) from error
        fail(error.exit_code if isinstance(error, EbftError) else EXIT_FAILED)
        raise
    state: RunState = "stopped" if stopped else "done"
    exit_code = EXIT_STOPPED if stopped else EXIT_DONE
    if groups.is_world_first:
        write_status(output, state, exit_code, progress.step, newest_checkpoint())
    dist.barrier()
    return exit_code


def timeout_of_steps(config: RunConfig) -> datetime.timedelta:
    """How long a run may take from one thing that ends to the next."""
    return datetime.timedelta(minutes=config.train.step_timeout_minutes)


def make_loader(config: RunConfig, groups: ProcessGroups, is_trace: bool) -> BatchLoader:
    """This replica's batches, from the first row of the run on.

    Args:
        is_trace: only one batch will be read, by this process, and all of it has to be whole.
    Raises:
        InputError: a dataset cannot be opened or does not fit the others.
    """
    return BatchLoader(
        open_training_rows(config),
        config.train.global_batch_size,
        groups.data_parallel_rank,
        groups.data_parallel_size,
        workers=0 if is_trace else config.data.workers,
        pin_memory=groups.device.type == "cuda",
        on_error="raise" if is_trace else config.data.on_error,
    )


def refuse_without_gpu(config: RunConfig, device: torch.device) -> None:
    """Refuse what only GPUs can do.

    Raises:
        ConfigError: megatron-core's sequence-parallel mappings allocate on the current CUDA device.
    """
    if config.parallel.sequence_parallel and device.type != "cuda":
        key = "parallel.sequence_parallel"
        raise ConfigError([Problem(config.place(key), key, f"true, on a {device.type}", "false: it needs GPUs")])


def make_run_directory(config: RunConfig) -> None:
    """Make `output_dir`, before anything expensive.

    Raises:
        ConfigError: it cannot be made or written to, or something stands where the final model will be.
    """
    output = config.output_dir
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        found = f"{output}, which cannot be written ({error.strerror})"
        problem = Problem(config.place("output_dir"), "output_dir", found, "a writable directory, or one to be made")
        raise ConfigError([problem]) from None
    try:
        refuse_other_contents(output / MODEL_FOLDER, CONFIG_NAME, overwrite=True)
    except InputError as error:
        raise ConfigError([problem.within(config.place("output_dir")) for problem in error.problems]) from None


def _train_and_export(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    loader: BatchLoader,
    start: Start,
    requests: StopRequests,
    lock_lost: Callable[[], bool],
    watchdog: Watchdog,
) -> StopReason:
    """The run itself, with what it writes; returns why it stopped before its end."""
    output = config.output_dir
    tokenizer_directory = loader.stream.sources[0].dataset.tokenizer_directory  # all sources have the same one
    identity = _identity(config, plan, start)
    watchdog.beat("hashing of the initial model")
    trainer = build_chosen_trainer(config, plan, groups, start.saved_state)
    watchdog.beat("building of the model")
    held_out = _held_out(config, trainer, groups)
    described = describing_files(config, plan.architecture, tokenizer_directory) if groups.is_world_first else {}

    def small_files(progress: Progress) -> dict[str, bytes]:
        state = identity.state(progress, loader, trainer.engine.applied_updates)
        return {**described, STATE_NAME: state.to_json().encode()}

    # Nothing refuses the start from here on; until now everything in the run directory was left as it was.
    start = replace(start, notes=(*start.notes, *tidy(output / CHECKPOINTS, start)))
    observer = _observer(config, plan, tokenizer_directory, start) if groups.is_world_first else None
    try:
        checkpoint = config.checkpoint
        boundary = Boundary(
            trainer,
            CheckpointSaver(output / CHECKPOINTS, groups, checkpoint.keep_last, checkpoint.keep_every),
            requests,
            lock_lost,
            small_files,
            announce=observer.writer.note if observer is not None else None,
            beat=watchdog.beat,
            saved=start.progress if start.is_in(output) else None,
        )
        stopped = train(trainer, loader, held_out, plan.total_steps, start.progress, boundary, observer, watchdog)
        if stopped:
            if observer is not None:
                observer.writer.note(f"stopped after step {start.progress.step}: {stopped.words}")
            return stopped
        tensors = hf_tensors(trainer.engine.local_parameters(), trainer.stage)
        if groups.is_world_first:
            dtype = DTYPES[config.train.dtype]
            write_model(
                output / MODEL_FOLDER, plan.architecture, tensors, dtype, tokenizer_directory, generation_config(config)
            )
        else:
            for _ in tensors:  # gathering a parameter is collective
                pass
        watchdog.beat("writing of the model")
    finally:
        if observer is not None:
            observer.writer.close()
    if groups.is_world_first:
        report = write_run_report(output)
        print(f"report: {report}\nmodel:  {output / MODEL_FOLDER}", flush=True)
    return StopReason.NONE


def _identity(config: RunConfig, plan: RunPlan, start: Start) -> RunIdentity:
    """What the run keeps to its end.

    Communication: that of `require_same_initial_model`.
    """
    source = _feature_weights(config, plan.feature_architecture, _initial_weights(config, plan.architecture))
    place = config.ebft.feature_model or config.model.init_from
    parallel = plan.parallel
    return RunIdentity(
        seed=config.seed,
        feature_network=require_same_initial_model(config, source, start) if config.uses_rollouts else None,
        feature_source=f"random weights of seed {config.seed}" if place is None else str(place),
        layout=Layout(
            data_parallel=parallel.data_parallel,
            tensor_parallel=parallel.tensor_parallel,
            pipeline_parallel=parallel.pipeline_parallel,
            sequence_parallel=config.parallel.sequence_parallel,
            zero_stage=config.zero.stage,
            world_size=dist.get_world_size(),
        ),
        started_from=start.started_from,
    )


def build_chosen_trainer(
    config: RunConfig, plan: RunPlan, groups: ProcessGroups, saved: tuple[CheckpointTensors, int] | None = None
) -> Trainer:
    """The trainer of a run, with what the configuration leaves to the memory of the accelerators.

    Args:
        saved: weights and optimizer state to go on from, and the number of updates that have been applied; None: the
            initial model.
    Communication: collective over the world.
    """
    chosen = choices(config, plan, least_memory_bytes(groups.device))
    logger.info("chosen for this memory: %s", chosen)
    if saved is None:
        return build_trainer(config, plan.architecture, plan.feature_architecture, groups, chosen)
    tensors, updates = saved
    weights = CheckpointWeights(tensors)
    trainer = build_trainer(config, plan.architecture, plan.feature_architecture, groups, chosen, weights)
    restore_engine(trainer.engine, trainer.stage, tensors, updates)
    return trainer


def least_memory_bytes(device: torch.device) -> int | None:
    """Memory of the accelerator that has the least of all ranks'; None on CPUs, whose memory processes share.

    Communication: on accelerators one all-reduce of 8 bytes over the world.
    """
    if device.type != "cuda":
        return None
    least = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def build_trainer(
    config: RunConfig,
    architecture: Architecture,
    feature_architecture: Architecture,
    groups: ProcessGroups,
    chosen: Choices | None = None,
    policy_weights: WeightSource | None = None,
) -> Trainer:
    """Policy, engine and feature network.

    Args:
        architecture, feature_architecture: of the policy and of the frozen network (often the same).
        chosen: what is left to the memory; None: as where it is not known.
        policy_weights: where the policy has come to; None: the initial model. The feature network is always made of
            the initial model.
    Raises:
        ConfigError: `train.attention` names a route that this device does not have.
    Communication: collective over the world (weights are read by the first rank of each data-parallel group).
    """
    dtype = DTYPES[config.train.dtype]
    chosen = chosen or default_choices(config)
    attention = attention_route(config, architecture, groups.device)
    initial = _initial_weights(config, architecture)
    source = policy_weights or initial
    shape = StageShape.of_policy(architecture, groups.pipeline_rank, groups.pipeline_size)

    def build_stage() -> Stage:
        return Stage(
            architecture,
            shape,
            groups,
            dtype,
            activation_checkpointing=config.train.activation_checkpointing == "full",
            sequence_parallel=config.parallel.sequence_parallel,
            attention=attention,
        )

    def load(
        stage: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager[Any]], is_reader: bool
    ) -> None:
        assert isinstance(stage, Stage)
        load_weights(stage, source, gathered, is_reader)

    def roles(stage: nn.Module) -> dict[str, ParameterRole]:
        assert isinstance(stage, Stage)
        return stage.parameter_roles()

    settings = OptimizerSettings(
        betas=config.train.betas,
        weight_decay=config.train.weight_decay,
        grad_clip=config.train.grad_clip,
        dtype=dtype,
        micro_batch_size=config.train.micro_batch_size,
        zero_stage=config.zero.stage,
        hold_parameters=config.zero.hold_parameters,
    )
    synchronize = torch.cuda.synchronize if groups.device.type == "cuda" else None
    feature_network = None
    if config.uses_rollouts:
        feature_settings = FeatureSettings(
            layer_fractions=config.ebft.feature_layers,
            embed_method=config.ebft.embed_method,
            feature_norm=config.ebft.feature_norm,
            dtype=dtype,
            is_sharded=chosen.feature_network_is_sharded,
            sequence_parallel=config.parallel.sequence_parallel,
            attention=attention_route(config, feature_architecture, groups.device),
        )
        feature_source = _feature_weights(config, feature_architecture, initial)
        feature_network = build_feature_network(feature_architecture, feature_source, feature_settings, groups)
    return Trainer(
        config=config,
        plan=config.block_plan,
        sampling=SamplingSettings.of(config),
        groups=groups,
        engine=ZeroEngine(build_stage, load, roles, settings, groups),
        feature_network=feature_network,
        timers=PhaseTimers(synchronize, memory=PhaseMemory.of_device(groups.device)),
        reuse=chosen.reuse_rollout,
    )


def attention_route(config: RunConfig, architecture: Architecture, device: torch.device) -> AttentionRoute:
    """The attention route that the configuration names."""
    name = config.train.attention
    try:
        return make_route(name, device, own_capacity=config.ebft.generate_max_len, head_dim=architecture.head_dim)
    except ValueError as error:
        key = "train.attention"
        raise ConfigError([Problem(config.place(key), key, f"{name}, on a {device.type}: {error}", "auto")]) from None


def _initial_weights(config: RunConfig, architecture: Architecture) -> InitialWeights:
    if config.model.init_from is not None:
        return open_weights(config.model.init_from, architecture, hash_files=False)
    return RandomWeights(architecture, config.seed)


def _feature_weights(config: RunConfig, architecture: Architecture, initial_policy: InitialWeights) -> InitialWeights:
    """The initial policy's, or those of the model that `ebft.feature_model` names."""
    ebft = config.ebft
    if ebft.feature_model is None:
        return initial_policy
    deepest = tapped_layers(ebft.feature_layers, architecture.num_hidden_layers)[-1]
    return open_weights(ebft.feature_model, architecture, deepest, hash_files=False)


def _held_out(config: RunConfig, trainer: Trainer, groups: ProcessGroups) -> HeldOut | None:
    if config.evaluation.shards is None:
        return None
    dataset = open_place(config, "evaluation.shards", config.evaluation.shards)
    rows = fixed_rows(
        dataset,
        config.data.sequence_length,
        config.evaluation.rows,
        groups.data_parallel_rank,
        groups.data_parallel_size,
    )
    dataset.close()
    rows = rows.filled_up(-(-config.evaluation.rows // groups.data_parallel_size))
    rows = rows_of_step(rows, config, groups.device)
    return HeldOut(rows, EvaluationSettings.of(config), config.evaluation.interval)


def _observer(config: RunConfig, plan: RunPlan, tokenizer_directory: Path, start: Start) -> Observer:
    """Open the run directory for writing.

    What an earlier start of this run wrote after its checkpoint is cut off; what another run wrote is cut off whole.
    """
    output, progress = config.output_dir, start.progress
    (output / RESOLVED_CONFIG_NAME).write_text(resolved_yaml(config), encoding="utf-8")
    write_environment(output, {"world_size": dist.get_world_size(), "threads": torch.get_num_threads()})
    goes_on_here = start.is_in(output)
    logged_step, done_step = (progress.logged_step, progress.step) if goes_on_here else (-1, -1)
    samples = output / "samples.jsonl"
    cut_after(samples, logged_step)
    cut_after(output / ERRORS_NAME, done_step)
    resumed_step = logged_step if logged_step >= 0 else None
    writer = MetricsWriter(output, plan.total_steps, console=True, resumed_step=resumed_step)
    for note in (*plan.notes, *start.notes):
        writer.note(f"note: {note}")
    if not goes_on_here:
        for evaluation in progress.evaluations:
            writer.log(evaluation.step, evaluation.metrics)
    return Observer(writer, samples, load_tokenizer(tokenizer_directory))
