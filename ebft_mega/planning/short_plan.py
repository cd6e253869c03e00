"""Say in a few lines what a start is about to do, before anything heavy is loaded. No torch."""

from dataclasses import dataclass
from pathlib import Path

from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.checkpoint.tensor_index import STATE_BYTES
from ebft_mega.config.entries import learning_rates, optimizer
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_record import critic_record
from ebft_mega.planning.data_budget import rows_of_run
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.shown_text import LONGEST_NOTE, shown


@dataclass(frozen=True)
class TraceRequest:
    """The trace of one optimizer step that `--trace-step` and the options beside it ask for."""

    directory: Path  # takes the trace
    warmup: int = 0  # global batches from the first on that estimators learn from; the one after them is traced
    noise: int = 0  # added to the seed of the traced step's sampling noise


def short_plan(config: RunConfig, plan: RunPlan, trace: TraceRequest | None = None) -> list[str]:
    """Describe a run as lines: model, layout, data, tokens, steps, place, checkpoints.

    Args:
        plan: of a run whose inputs are all there.
        trace: asked for instead of a run; None: a run.
    """
    facts = plan_facts(config, plan)
    rows: list[tuple[str, str]] = [(name, facts[name]) for name in ("model", "layout", "data")]
    if trace is not None:
        before = f", after {trace.warmup:,} that estimators learn from and the weights do not" if trace.warmup else ""
        steps = f"one, of {config.tokens_per_step:,} tokens{before}; it is traced, and nothing else is written"
        rows += [("steps", steps), ("place", str(trace.directory))]
    else:
        rows.append(("tokens", facts["tokens"]))
        rows.append(("steps", f"{plan.total_steps:,}, of {config.tokens_per_step:,} tokens each"))
        rows.append(("place", str(config.output_dir.absolute())))
        rows.append(("checkpoints", checkpoint_words(config, plan)))
    width = max(len(name) for name, _ in rows)
    return ["The run in short:", *(f"  {name:<{width}}  {shown(words, LONGEST_NOTE)}" for name, words in rows)]


def plan_facts(config: RunConfig, plan: RunPlan) -> dict[str, str]:
    """What a run is made of, in words: model, layout, data and tokens."""
    return {
        "model": _model_words(config, plan),
        "layout": _layout_words(config, plan),
        "data": _data_words(config, plan),
        "tokens": _token_words(config, plan),
    }


def _model_words(config: RunConfig, plan: RunPlan) -> str:
    architecture = plan.architecture
    origin = "random weights" if config.model.init_from is None else str(config.model.init_from)
    words = f"{architecture.model_type}, {architecture.num_parameters:,} parameters, from {origin}"
    feature_model = config.ebft.feature_model
    return f"{words}; features of {feature_model}" if feature_model is not None and config.uses_rollouts else words


def _layout_words(config: RunConfig, plan: RunPlan) -> str:
    sizes, train = plan.parallel, config.train
    degrees = f"tensor {sizes.tensor_parallel} x data {sizes.data_parallel} x pipeline {sizes.pipeline_parallel}"
    processes = f"{sizes.world_size:,} processes" if sizes.world_size > 1 else "1 process"
    batch = f"{train.global_batch_size:,} rows a step in micro-batches of {train.micro_batch_size:,}"
    return f"{processes}: {degrees}; ZeRO stage {config.zero.stage}, {train.dtype}; {batch}"


def _data_words(config: RunConfig, plan: RunPlan) -> str:
    documents = sum(source.manifest.documents for source in plan.sources)
    tokens = sum(source.manifest.tokens for source in plan.sources)
    places = [str(source.shards) for source in config.data.named_sources.values()]
    where = places[0] if len(places) == 1 else f"{len(places)} sources ({', '.join(config.data.named_sources)})"
    held_out = f"; held out: {config.evaluation.shards}" if plan.evaluation_rows else "; nothing held out"
    return f"{where}: {documents:,} documents, {tokens:,} tokens{held_out}"


def _token_words(config: RunConfig, plan: RunPlan) -> str:
    rows, sources = rows_of_run(config), plan.train_rows.sources if plan.train_rows else ()
    epochs = [_number(source.epochs) + " epochs" + f" of {source.name}" * (len(sources) > 1) for source in sources]
    tokens = f"{rows * config.data.sequence_length:,} in {rows:,} rows of {config.data.sequence_length:,}"
    return f"{tokens}: {', '.join(epochs)}"


def checkpoint_words(config: RunConfig, plan: RunPlan) -> str:
    """Say in one line when and where a run takes checkpoints and how large one is."""
    num_bytes = checkpoint_bytes(config, plan.architecture.num_parameters) + critic_bytes(config, plan)
    size = f"{num_bytes / 1e9:.3f} GB each, in {config.output_dir / CHECKPOINTS}"
    return f"{checkpoint_times(config)}; {size}"


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> int:
    """Size of the tensors in a checkpoint of so many parameters: weights and moments, in float32."""
    return STATE_BYTES * (1 + len(optimizer(config).moments)) * num_parameters


def critic_bytes(config: RunConfig, plan: RunPlan) -> int:
    """Size of what a checkpoint has of the token critic; 0 without one."""
    critic = critic_record(config, plan.architecture, plan.feature_architecture)
    return 0 if critic is None else critic.num_bytes


def checkpoint_times(config: RunConfig) -> str:
    """Say when a run takes checkpoints."""
    interval, final = config.checkpoint.interval, config.checkpoint.final
    last_is_due = final or (interval is not None and config.total_steps % interval == 0)
    parts = []
    if interval is not None and interval < config.total_steps:
        parts.append(f"every {interval:,} optimizer steps")
    if last_is_due:
        parts.append("after the last step")
    if not parts:
        return "none, unless the run is asked to save or to stop"
    return " and ".join(parts) if last_is_due else f"{parts[0]}, none after the last one"


def optimization_rows(config: RunConfig) -> list[tuple[str, object]]:
    """The optimizer, the schedule, and the learning rate of the steps that show it."""
    rule = optimizer(config)
    rates = learning_rates(config)
    by_step = {step: rates.at(step) for step in rates.some_steps()}
    highest = max(by_step, key=lambda step: by_step[step])
    return [
        ("optimizer", f"{config.train.optimizer}: {rule.summary()}"),
        ("its moments", ", ".join(rule.moments) or "none"),
        ("learning-rate schedule", f"{config.train.lr_scheduler}: {rates.schedule.summary()}"),
        ("steps of warm-up", rates.warmup_steps),
        ("learning rate of the first step", f"{by_step[0]:.4g}"),
        ("highest learning rate", f"{by_step[highest]:.4g}, in step {highest + 1:,}"),
        ("learning rate of the last step", f"{by_step[config.total_steps - 1]:.4g}"),
    ]


def _number(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"
