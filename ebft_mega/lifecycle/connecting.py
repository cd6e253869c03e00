"""Connect the ranks of a job, and check that they were started with the same configuration and data."""

import hashlib

from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.lifecycle.tracing import timeout_of_steps
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.rendezvous import Patience
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.registry.plugin_records import plugins_in_words
from ebft_mega.runtime.agreement import require_agreement
from ebft_mega.runtime.watchdog import COLLECTIVE_MARGIN


def connect_ranks(config: RunConfig) -> ProcessGroups:
    """Connect the ranks of the job and make its process groups.

    Raises:
        ConfigError: sequence parallelism without GPUs: megatron-core's mappings allocate on the current CUDA device.
    Communication: collective over the world.
    """
    timeout = timeout_of_steps(config) + COLLECTIVE_MARGIN
    device = connect(timeout, configuration_sha256(config))
    parallel, key = config.parallel, "parallel.sequence_parallel"
    if parallel.sequence_parallel and device.type != "cuda":
        found, expected = f"true, on a {device.type}", "false: it needs GPUs"
        raise ConfigError([Problem(config.place(key), key, found, expected)])
    return make_process_groups(device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, timeout)


def connecting_words(config: RunConfig, plan: RunPlan) -> str:
    """Say what `connect_ranks` does and how long it may take."""
    processes = plan.parallel.world_size
    if processes == 1:
        return "setting up this process's device"
    return f"connecting {processes} processes: the last one to come is waited for, at most {Patience().peers:.0f} s"


def require_same_inputs(config: RunConfig, plan: RunPlan, loader: BatchLoader) -> None:
    """Check that all ranks have the same configuration, the same code of plugins and the same data.

    Raises:
        InputError: they have not.
    Communication: that of `require_agreement`.
    """
    held_out = plan.evaluation_rows
    require_agreement(
        {
            "configuration, sha256": configuration_sha256(config),
            "plugins": plugins_in_words(config.loaded_plugins),
            config.data.mixture_key: loader.state.to_json(),
            "evaluation.shards": held_out.manifest.fingerprint if held_out else "none",
        }
    )


def configuration_sha256(config: RunConfig) -> str:
    """Hash of the configuration with every key: the same on all ranks of a run."""
    return hashlib.sha256(resolved_yaml(config).encode()).hexdigest()
