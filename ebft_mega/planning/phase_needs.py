"""What the plan needs for each phase of a step, in words for a rank that runs out of memory. No torch."""

from ebft_mega.config.schema import RunConfig
from ebft_mega.planning.auto import choices
from ebft_mega.planning.memory import plan_memory
from ebft_mega.planning.run_plan import RunPlan

GIGABYTE = 1e9


def needs_of_phases(config: RunConfig, plan: RunPlan, stage: int) -> dict[str, str]:
    """Say for each phase what a rank of a pipeline stage needs: its states and the phase's own tensors together."""
    memory = plan_memory(config, plan, choices(config, plan, memory_bytes=None), stage)
    texts = {}
    for phase in memory.phases:
        size = (memory.state_bytes + memory.phase_bytes(phase)) / GIGABYTE
        texts[phase] = f"the plan needs {size:.3g} GB for it (tensors of this rank; --dry-run lists them)"
    return texts
