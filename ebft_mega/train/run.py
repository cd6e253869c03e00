"""One run, from its configuration to its final model: everything is built here and nowhere else."""

import datetime
import hashlib
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ebft_mega.attention.routes import AttentionRoute, make_route
from ebft_mega.config.data_sources import open_place, open_training_rows
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.memory import Choices
from ebft_mega.config.reuse import choices, default_choices
from ebft_mega.config.schema import RunConfig
from ebft_mega.config.validate import RunPlan
from ebft_mega.data.loader import BatchLoader, fixed_rows
from ebft_mega.data.tokenizer import load_tokenizer
from ebft_mega.errors import EXIT_DONE, EXIT_FAILED, EXIT_HANG, ConfigError, EbftError, PeerFailedError, Problem
from ebft_mega.evaluation.heldout import evaluation_settings
from ebft_mega.features.build import FeatureSettings, build_feature_network
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.metrics.run_files import (
    STATUS_NAME,
    failure_on_record,
    record_failure,
    setup_rank_log,
    write_environment,
    write_status,
)
from ebft_mega.metrics.sinks import MetricsWriter
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.architecture import Architecture, tapped_layers
from ebft_mega.model.huggingface import (
    RandomWeights,
    SafetensorsWeights,
    WeightSource,
    hf_tensors,
    load_weights,
    write_model,
)
from ebft_mega.model.partition import StageShape
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine
from ebft_mega.report.run_report import write_run_report
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.train.agreement import require_agreement
from ebft_mega.train.loop import HeldOut, Observer, rows_of_step, train
from ebft_mega.train.skipped_rows import ERRORS_NAME
from ebft_mega.train.step import Trainer
from ebft_mega.train.trace import trace_step
from ebft_mega.train.watchdog import COLLECTIVE_MARGIN, Watchdog, leave_soon
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)


def run_training(config: RunConfig, plan: RunPlan, trace_directory: Path | None) -> int:
    """Train, or trace one step.

    Args:
        plan: what `check_run` made of the configuration for this world size.
        trace_directory: write the trace of step 0 there and do nothing else.
    Returns:
        Exit code of every rank.
    Communication: every rank of the job calls it.
    """
    step_timeout = datetime.timedelta(minutes=config.train.step_timeout_minutes)
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
    if trace_directory is not None:
        with Watchdog(step_timeout, log_path=None, record=lambda: EXIT_HANG), closing(iter(loader)) as batches:
            trainer = build_chosen_trainer(config, plan, groups)
            trace_step(trainer, rows_of_step(next(batches).rows, config, groups.device), trace_directory)
            dist.barrier()
        return EXIT_DONE

    output = config.output_dir
    make_run_directory(config)
    if groups.is_first:
        (output / STATUS_NAME).unlink(missing_ok=True)  # the outcome of an earlier run there
    dist.barrier()  # from here on a status is one of this run
    log_path = setup_rank_log(output, dist.get_rank())

    def steps_done() -> int:
        return loader.state.next_row // config.train.global_batch_size

    try:
        with Watchdog(step_timeout, log_path, lambda: record_failure(output, EXIT_HANG, steps_done())) as watchdog:
            _train_and_export(config, plan, groups, loader, watchdog)
            dist.barrier()
    except BaseException as error:
        leave_soon()
        logger.info("this rank failed", exc_info=True)  # below a warning, because it is on its way to standard error
        # A rank whose peer failed loses its connection; the peer's own word is the one that counts.
        peer_code = failure_on_record(output)
        if peer_code is not None and not isinstance(error, EbftError):
            raise PeerFailedError(peer_code) from error
        record_failure(output, error.exit_code if isinstance(error, EbftError) else EXIT_FAILED, steps_done())
        raise
    if groups.is_first:
        write_status(output, "done", EXIT_DONE, steps_done(), checkpoint=None)
    dist.barrier()
    return EXIT_DONE


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
        ConfigError: it cannot be made or written to.
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


def _train_and_export(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    loader: BatchLoader,
    watchdog: Watchdog,
) -> None:
    """The run itself, with what it writes."""
    output = config.output_dir
    tokenizer_directory = loader.stream.sources[0].dataset.tokenizer_directory  # all sources have the same one
    observer = _observer(config, plan, tokenizer_directory) if groups.is_first else None
    try:
        trainer = build_chosen_trainer(config, plan, groups)
        watchdog.beat("building of the model")
        held_out = _held_out(config, trainer, groups)
        train(trainer, loader, held_out, plan.total_steps, observer, watchdog)
        tensors = hf_tensors(trainer.engine.local_parameters(), trainer.stage)
        if groups.is_first:
            dtype = DTYPES[config.train.dtype]
            write_model(output / "hf", plan.architecture, tensors, dtype, tokenizer_directory)
        else:
            for _ in tensors:  # gathering a parameter is collective
                pass
        watchdog.beat("writing of the model")
    finally:
        if observer is not None:
            observer.writer.close()
    if groups.is_first:
        report = write_run_report(output)
        print(f"report: {report}\nmodel:  {output / 'hf'}", flush=True)


def build_chosen_trainer(config: RunConfig, plan: RunPlan, groups: ProcessGroups) -> Trainer:
    """The trainer of a run, with what the configuration leaves to the memory of the accelerators.

    Communication: collective over the world.
    """
    chosen = choices(config, plan, least_memory_bytes(groups.device))
    logger.info("chosen for this memory: %s", chosen)
    return build_trainer(config, plan.architecture, plan.feature_architecture, groups, chosen)


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
) -> Trainer:
    """Policy, engine and feature network.

    Args:
        architecture, feature_architecture: of the policy and of the frozen network (often the same).
        chosen: what is left to the memory; None: as where it is not known.
    Raises:
        ConfigError: `train.attention` names a route that this device does not have.
    Communication: collective over the world (weights are read by the first rank of each data-parallel group).
    """
    dtype = DTYPES[config.train.dtype]
    chosen = chosen or default_choices(config)
    attention = attention_route(config, architecture, groups.device)
    source = _policy_weights(config, architecture)
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
        feature_source = _feature_weights(config, feature_architecture, source)
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


def _policy_weights(config: RunConfig, architecture: Architecture) -> WeightSource:
    if config.model.init_from is not None:
        return SafetensorsWeights(config.model.init_from, architecture)
    return RandomWeights(architecture, config.seed)


def _feature_weights(config: RunConfig, architecture: Architecture, initial_policy: WeightSource) -> WeightSource:
    """The initial policy's, or those of the model that `ebft.feature_model` names."""
    ebft = config.ebft
    if ebft.feature_model is None:
        return initial_policy
    deepest = tapped_layers(ebft.feature_layers, architecture.num_hidden_layers)[-1]
    return SafetensorsWeights(ebft.feature_model, architecture, deepest)


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
    return HeldOut(rows, evaluation_settings(config), config.evaluation.interval)


def _observer(config: RunConfig, plan: RunPlan, tokenizer_directory: Path) -> Observer:
    """Open the run directory for writing: the files of an earlier run there are replaced."""
    output = config.output_dir
    (output / "config.resolved.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    write_environment(output, {"world_size": dist.get_world_size(), "threads": torch.get_num_threads()})
    samples = output / "samples.jsonl"
    samples.unlink(missing_ok=True)
    (output / ERRORS_NAME).unlink(missing_ok=True)
    writer = MetricsWriter(output, plan.total_steps, console=True)
    for note in plan.notes:
        writer.note(f"note: {note}")
    return Observer(writer, samples, load_tokenizer(tokenizer_directory))
