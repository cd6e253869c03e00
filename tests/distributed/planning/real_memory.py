"""What ranks of a real job hold in main memory in each phase of a step, beside what the plan says; also by hand:

PYTHONPATH=. python tests/distributed/planning/real_memory.py --millions 50 --stages 0 3 --data 2
"""

import argparse
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ebft_mega.metrics.phase_memory import ResidentMemory
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.planning.memory import plan_memory
from ebft_mega.planning.run_plan import ParallelSizes
from ebft_mega.train.step import train_step
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import Layout
from tests.unit.planning.test_memory_measured import PHASES, chosen, measured, planned, rows_of, started

# Two llamas of 50 and 250 million parameters with tied embeddings.
MODELS = {
    50: "{model_type: llama, vocab_size: 32000, hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 10,"
    " num_attention_heads: 8, num_key_value_heads: 4, head_dim: 64, tie_word_embeddings: true}",
    250: "{model_type: llama, vocab_size: 32000, hidden_size: 1024, intermediate_size: 3072, num_hidden_layers: 17,"
    " num_attention_heads: 16, num_key_value_heads: 8, head_dim: 64, tie_word_embeddings: true}",
}


@dataclass(frozen=True)
class RealMemory:
    """Bytes of one rank, by phase."""

    planned: dict[str, int]  # states included
    resident: dict[str, int]  # as the kernel counts it, without what the process held before there was a model
    live: dict[str, int]  # of tensors; empty unless they were asked for
    seconds: dict[str, float]


def measure(layout: Layout, millions: int, overrides: tuple[str, ...], directory: str, profiled: bool = False):
    """Run two steps on this rank and return what the second one held."""
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    own = Path(directory) / f"rank-{dist.get_rank()}"
    own.mkdir(exist_ok=True)
    basic = (f"model.config={MODELS[millions]}", "train.dtype=bfloat16", f"train.global_batch_size={2 * layout.data}")
    config, plan = planned(own, (*basic, "train.micro_batch_size=1", *layout.overrides, *overrides))
    sizes = ParallelSizes(layout.tensor, layout.pipeline, layout.data)
    plan = dataclasses.replace(plan, parallel=sizes, num_micro_batches=plan.num_micro_batches // layout.data)
    reuse = config.learn.reuse_rollout
    memory = plan_memory(config, plan, chosen(reuse), groups.pipeline_rank)
    gauge = ResidentMemory()
    gauge.restart()
    before = gauge.peak()

    def two_steps():
        trainer = started(config, plan, groups, reuse)
        batch = rows_of(config).split(config.train.global_batch_size // layout.data)[groups.data_parallel_rank]
        trainer.timers.reset()
        train_step(trainer, batch, 1, 1e-3)
        return trainer.timers

    if profiled:
        timers, _, live = measured(two_steps)
    else:
        timers, live = two_steps(), {}
    resident = timers.memory.peaks()
    return RealMemory(
        {phase: memory.state_bytes + memory.phase_bytes(phase) for phase in PHASES},
        {phase: resident[phase] - before for phase in PHASES},
        live,
        timers.seconds(),
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, choices=sorted(MODELS), default=50)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--live", action="store_true", help="count live tensors, too")
    parser.add_argument("overrides", nargs="*", help="configuration keys, as after --set")
    options = parser.parse_args()
    overrides = ("learn.reuse_rollout=checkpoints", *options.overrides)
    for stage in options.stages:
        layout = Layout(options.data, options.tensor, 1, stage)
        with tempfile.TemporaryDirectory() as directory:
            found = run_ranks(layout.world_size, measure, layout, options.millions, overrides, directory, options.live)
        for rank, memory in enumerate(found):
            print(f"{options.millions} M, {layout}, rank {rank}: MB planned / live / resident, seconds")
            for phase in PHASES:
                sizes = (memory.planned, memory.live, memory.resident)
                numbers = " ".join(f"{size.get(phase, 0) / 1e6:8.1f}" for size in sizes)
                shares = " ".join(f"{memory.planned[phase] / s[phase]:6.3f}" for s in sizes[1:] if s)
                print(
                    f"  {phase:10}{numbers}   planned / measured {shares}   {memory.seconds[phase]:.2f} s", flush=True
                )


if __name__ == "__main__":
    _main()
