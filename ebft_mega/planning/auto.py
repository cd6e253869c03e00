"""Resolve `auto` in `learn.reuse_rollout` and `zero.feature_network` from the memory of the accelerators. No torch.

Saving more of the rollout phase spares arithmetic in every step; a resident feature network spares one gather of its
parameters. So `learn.reuse_rollout` is resolved first, and the network is resident if the rest of the memory allows.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from ebft_mega.architecture.partition import valid_tensor_parallel_sizes
from ebft_mega.config.rules import activations_can_be_saved, broken_rules
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.errors import ConfigError
from ebft_mega.planning.memory import Choices, peak_bytes, plan_memory
from ebft_mega.planning.run_plan import RunPlan, plan_of_sizes

GIGABYTE = 1e9
# Of the memory of an accelerator; the rest is for what the formulas leave out: allocator slack, communication buffers,
# libraries.
USABLE_SHARE = 0.9
# What the gradient pass may take over, from the least arithmetic to the least memory.
REUSES: tuple[Reuse, ...] = ("activations", "checkpoints", "off")


MAX_KEYS = 3  # that are set at a time where a run does not fit
MACHINE_PROCESSES = 8  # tensor slices stay within a machine of so many accelerators
# What may be set where a run does not fit, from what costs the least; sizes follow from the run.
_SMALLER: dict[str, tuple[Any, ...]] = {
    "train.micro_batch_size": (),
    "zero.hold_parameters": ("none",),
    "learn.reuse_rollout": ("auto",),
    "zero.feature_network": ("auto",),
    "train.activation_checkpointing": ("full",),
    "zero.stage": (3,),
    "parallel.tensor_parallel_size": (),
    "parallel.sequence_parallel": (True,),
}


@dataclass(frozen=True)
class WayOut:
    """Other values of some keys, and what a run needs with them."""

    changes: dict[str, Any]
    peak_bytes: int  # of the ranks of the worst stage
    fits: bool


@dataclass(frozen=True)
class Fit:
    """What a run resolves both keys to on accelerators of one memory, and what it then needs."""

    choices: Choices
    peak_bytes: int  # of the ranks of the worst stage
    memory_bytes: int  # of an accelerator

    @property
    def usable_bytes(self) -> int:
        """What the peak may be."""
        return int(USABLE_SHARE * self.memory_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the rest of the memory free."""
        return needed_bytes(self.peak_bytes) <= self.memory_bytes


def fit(config: RunConfig, plan: RunPlan, memory_bytes: int) -> Fit:
    """Resolve both keys for accelerators of this memory, and say whether the run fits then."""
    chosen = choices(config, plan, memory_bytes)
    return Fit(chosen, peak_bytes(config, plan, chosen), memory_bytes)


def choices(config: RunConfig, plan: RunPlan, memory_bytes: int | None) -> Choices:
    """Resolve both keys; arguments as in `chosen_reuse`."""
    return Choices(
        chosen_reuse(config, plan, memory_bytes),
        feature_network_is_sharded(config, plan, memory_bytes),
    )


def default_choices(config: RunConfig) -> Choices:
    """Resolve both keys where the memory is not known."""
    if not config.uses_rollouts:
        return Choices("off", feature_network_is_sharded=False)
    wanted = config.learn.reuse_rollout
    return Choices("checkpoints" if wanted == "auto" else wanted, config.zero.feature_network == "sharded")


def chosen_reuse(config: RunConfig, plan: RunPlan, memory_bytes: int | None) -> Reuse:
    """Resolve `learn.reuse_rollout`: what the gradient pass takes over from the rollout phase.

    `auto` takes the first of activations, checkpoints and off that fits on the worst stage, with the feature network
    as small as `zero.feature_network` allows; where none fits, the one that needs the least. It never takes
    activations where parameters are released before the gradient pass, or with `train.activation_checkpointing: full`.

    Args:
        memory_bytes: of the accelerator with the least memory; None: not known, and checkpoints are taken.
    """
    if memory_bytes is None or not config.uses_rollouts or config.learn.reuse_rollout != "auto":
        return default_choices(config).reuse_rollout
    peaks = {reuse: smallest_peak(config, plan, reuse) for reuse in possible_reuses(config)}
    fitting = (reuse for reuse, peak in peaks.items() if needed_bytes(peak) <= memory_bytes)
    return next(fitting, min(peaks, key=peaks.__getitem__))


def feature_network_is_sharded(config: RunConfig, plan: RunPlan, memory_bytes: int | None) -> bool:
    """Resolve `zero.feature_network`: whether the frozen network is partitioned over the data-parallel processes.

    `auto` leaves it whole where that fits beside what `chosen_reuse` saves, where partitioning would not lower the
    peak, and where the memory is not known; arguments as in `chosen_reuse`.
    """
    if memory_bytes is None or not config.uses_rollouts or config.zero.feature_network != "auto":
        return default_choices(config).feature_network_is_sharded
    reuse = chosen_reuse(config, plan, memory_bytes)
    whole, divided = (peak_bytes(config, plan, Choices(reuse, is_sharded)) for is_sharded in (False, True))
    return needed_bytes(whole) > memory_bytes and divided < whole


def possible_reuses(config: RunConfig) -> tuple[Reuse, ...]:
    """List what the configuration allows, in the order in which `auto` prefers it; the last needs no extra memory."""
    saves_activations = activations_can_be_saved(config) and config.train.activation_checkpointing == "none"
    return REUSES if saves_activations else REUSES[1:]


def smallest_peak(config: RunConfig, plan: RunPlan, reuse: Reuse) -> int:
    """Peak bytes on the worst stage, with the feature network as small as the configuration allows."""
    wanted = config.zero.feature_network
    options = (False, True) if wanted == "auto" else (wanted == "sharded",)
    return min(peak_bytes(config, plan, Choices(reuse, is_sharded)) for is_sharded in options)


def ways_out(config: RunConfig, plan: RunPlan, memory_bytes: int) -> list[WayOut]:
    """Find what else may be set where a run does not fit: the fewest keys of `_SMALLER` with which the formulas fit it.

    Returns:
        All choices of that many keys that fit, one for each set of keys: the value nearest to the present one. Where
        no choice fits, the one that needs the least, alone.
    """
    least: WayOut | None = None
    for count in range(1, MAX_KEYS + 1):
        found: dict[tuple[str, ...], WayOut] = {}
        for keys in itertools.combinations(_SMALLER, count):
            for values in itertools.product(*(_smaller_values(config, plan, key) for key in keys)):
                way = _way_out(config, plan, dict(zip(keys, values, strict=True)), memory_bytes)
                if way is not None and way.fits:
                    found.setdefault(keys, way)
                if way is not None and (least is None or way.peak_bytes < least.peak_bytes):
                    least = way
        if found:
            return list(found.values())
    return [] if least is None else [least]


def _smaller_values(config: RunConfig, plan: RunPlan, key: str) -> list[Any]:
    """Values of a key that may need less memory, those nearest to the present one first."""
    section, name = key.split(".")
    present = getattr(getattr(config, section), name)
    if key == "train.micro_batch_size":
        return [present >> halvings for halvings in range(1, present.bit_length())]
    if key == "parallel.tensor_parallel_size":
        sizes = valid_tensor_parallel_sizes(plan.architecture)
        return [size for size in sizes if present < size <= min(MACHINE_PROCESSES, plan.parallel.world_size)]
    return [value for value in _SMALLER[key] if value != present]


def _way_out(config: RunConfig, plan: RunPlan, changes: dict[str, Any], memory_bytes: int) -> WayOut | None:
    """Plan with other values of some keys; None where these do not go together or not with the processes."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    changed = config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )
    if broken_rules(changed):
        return None
    try:
        other = plan_of_sizes(changed, plan.parallel.world_size, plan.architecture, plan.feature_architecture)
    except ConfigError:
        return None
    found = fit(changed, other, memory_bytes)
    return WayOut(changes, found.peak_bytes, found.fits)


def needed_bytes(peak: int) -> int:
    """Memory that an accelerator must have for a peak computed by the formulas."""
    return round(peak / USABLE_SHARE)


def needs_of_phases(config: RunConfig, plan: RunPlan, stage: int, memory_bytes: int | None) -> dict[str, str]:
    """Say for each phase what a rank of a pipeline stage needs: its states and the phase's own tensors together.

    Args:
        memory_bytes: as in `chosen_reuse`, whose choice the figures are for.
    """
    memory = plan_memory(config, plan, choices(config, plan, memory_bytes), stage)
    texts = {}
    for phase in memory.phases:
        size = (memory.state_bytes + memory.phase_bytes(phase)) / GIGABYTE
        texts[phase] = f"the plan needs {size:.3g} GB for it (tensors of this rank; --dry-run lists them)"
    return texts
