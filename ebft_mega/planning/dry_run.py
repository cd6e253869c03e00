"""Describe a run as text for `--dry-run`: configuration, blocks, data, layout, memory per rank. No torch.

All sizes are computed, not measured; `rank_layout.py` and `memory.py` have the formulas.
"""

from ebft_mega.architecture.hf_config import tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.config.entries import feature_map, tapped_fractions
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.objective_text import followed_objective, objective_notes
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.cost_table import work_text
from ebft_mega.cost.rollout_nodes import DistinctShares
from ebft_mega.cost.step_cost import StepShape
from ebft_mega.planning.absent_inputs import listed_keys
from ebft_mega.planning.activation_memory import learn_tokens_per_row, scored_rows
from ebft_mega.planning.auto import USABLE_SHARE, choices, fit, possible_reuses, ways_out
from ebft_mega.planning.data_budget import allowed_skipped_rows, rows_of_run, skipped_rows
from ebft_mega.planning.memory import Choices, peak_bytes, plan_memory, worst_stage
from ebft_mega.planning.rank_layout import RankPart, rank_parts
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.planning.short_plan import checkpoint_bytes, checkpoint_times, critic_bytes, optimization_rows
from ebft_mega.registry.plugin_records import plugin_rows, slow_imports
from ebft_mega.shown_text import LONGEST_NOTE, shown

GIB_BYTES = 1 << 30
GIGABYTE = 1e9
MOST_WAYS = 4  # to make a run fit that are named


def describe_run(
    config: RunConfig, plan: RunPlan, memory_bytes: int | None = None, shares: DistinctShares | None = None
) -> str:
    """Compose everything that `--dry-run` prints.

    Args:
        memory_bytes: of an accelerator, for which `auto` is resolved; None: not known.
        shares: of distinct rows of rollouts, for which the work of a step is counted; None: not known.
    Raises:
        InputError: no rollouts have such shares.
    """
    parts = [
        _title("Resolved configuration") + resolved_yaml(config).rstrip(),
        *(_title("Plugins") + _table(rows) for rows in [plugin_rows(config.loaded_plugins, config.options)] if rows),
        _title("Model") + _model_text(plan),
        _title("Blocks") + _block_text(config, plan),
        _title("Data") + _data_text(config, plan),
        _title("Optimization") + _table(optimization_rows(config)),
        _title("Checkpoints") + _checkpoint_text(config, plan),
        _title("Layout") + _layout_text(config, plan),
        _title("Each rank's part") + _parts_text(config, plan),
        _title("Work of a step (TFLOP, counted)") + _work_text(config, plan, memory_bytes, shares),
        _title("Memory per rank (GiB, worked out, not measured)") + _memory_text(config, plan, memory_bytes),
    ]
    if config.uses_rollouts:
        title = "Peak by what learning takes over from rollouts and by zero.feature_network (GiB)"
        parts.append(_title(title) + _reuse_text(config, plan, memory_bytes))
    if memory_bytes is not None:
        size = f"{memory_bytes / GIGABYTE:,.10g} GB"
        parts.append(_title(f"On accelerators of {size}") + _fit_text(config, plan, memory_bytes))
    if notes := [*plan.notes, *objective_notes(config), *slow_imports(config.loaded_plugins)]:
        parts.append(_title("Notes") + "\n".join(shown(note, LONGEST_NOTE) for note in notes))
    if plan.to_be_supplied:
        rows: list[tuple[str, object]] = [(entry.key, entry.words) for entry in plan.to_be_supplied]
        parts.append(_title("To be supplied before a start") + _table(rows))
    return "\n\n".join(parts)


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"


def _table(rows: list[tuple[str, object]]) -> str:
    rows = [(shown(name), value) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    texts = [(name, f"{value:,}" if isinstance(value, int) else shown(value, LONGEST_NOTE)) for name, value in rows]
    return "\n".join(f"{name:<{width}}  {text}" for name, text in texts)


def _model_text(plan: RunPlan) -> str:
    architecture = plan.architecture
    table: list[tuple[str, object]] = [
        ("architecture", architecture.model_type),
        ("parameters", architecture.num_parameters),
        ("layers", architecture.num_hidden_layers),
        ("vocabulary", architecture.vocab_size),
    ]
    stand_ins = [(entry.key, entry.stand_in_words) for entry in plan.to_be_supplied if entry.stand_in]
    return _table([*table, *((f"{key}: sizes from", file) for key, file in stand_ins)])


def _block_text(config: RunConfig, plan: RunPlan) -> str:
    blocks, rows = plan.block_plan, config.train.global_batch_size
    depth = plan.feature_architecture.num_hidden_layers
    document, generated = learn_tokens_per_row(config)
    per_row = blocks.generated_per_row if config.uses_rollouts else 0
    features = blocks.sequence_length + blocks.generated_per_row if config.uses_rollouts else 0
    return _table(
        [
            ("tokens per row", blocks.sequence_length),
            ("blocks per row", blocks.num_blocks),
            ("first and last anchor", f"{blocks.anchors[0]}, {blocks.anchors[-1]}"),
            ("samples per block", blocks.num_samples),
            ("tokens generated per row", per_row),
            ("tokens generated per step", per_row * rows),
            ("policy rows per row (gradient pass)", document + generated),
            ("head rows per row (gradient pass)", scored_rows(config)),
            ("feature rows per row", features),
            ("feature layers", f"{tapped_layers(tapped_fractions(config), depth)} of {depth}"),
            *_feature_map_rows(config, plan),
            ("objective (docs/numerics.md)", followed_objective(config)),
        ]
    )


def _feature_map_rows(config: RunConfig, plan: RunPlan) -> list[tuple[str, object]]:
    """The feature map and what it costs beside the network's pass; nothing without rollouts."""
    if not config.uses_rollouts:
        return []
    blocks, architecture, method = plan.block_plan, plan.feature_architecture, feature_map(config)
    read, taps = len(method.positions(blocks.generate_length)), len(tapped_fractions(config))
    width = method.vectors(blocks.generate_length) * architecture.hidden_size * taps
    shape = StepShape.of(config, plan.architecture, architecture)
    products = 2 * blocks.num_blocks * (blocks.num_samples + 1) ** 2 * width
    return [
        ("feature map", f"{method.name}, of the last {read} of {blocks.generate_length} positions"),
        *([("layer weights", f"{weights}")] if (weights := config.ebft.layer_weights) is not None else []),
        ("rows read per row and tapped layer", shape.pooled.outputs),
        ("numbers of a feature", width),
        ("float64 operations of inner products per row", products),
    ]


def _data_text(config: RunConfig, plan: RunPlan) -> str:
    rows = rows_of_run(config)
    run: list[tuple[str, object]] = [
        ("optimizer steps", plan.total_steps),
        ("rows per step", config.train.global_batch_size),
        ("rows of the run", rows),
        ("tokens of the run", rows * config.data.sequence_length),
    ]
    table = [*_size_rows(plan), *run, *_supply_rows(plan)]
    table.append(("document masking", "yes" if config.data.document_masking else "no"))
    if config.data.skip_rows:
        table.append(("rows that data.skip_rows turns into filler", skipped_rows(config)))
    if config.data.on_error == "skip":
        table.append(("damaged rows that may be skipped", allowed_skipped_rows(config)))
    table += [
        ("processes", plan.parallel.world_size),
        ("data-parallel size", plan.data_parallel_size),
        ("micro-batches per replica and step", plan.num_micro_batches),
    ]
    if plan.evaluation_rows:
        table.append(("held-out rows", f"{config.evaluation.rows:,} of {plan.evaluation_rows.rows_per_epoch:,}"))
    elif plan.lacks(key := "evaluation.shards"):
        table.append(("held-out rows", f"{config.evaluation.rows:,} of a number that is not known: {key} is absent"))
    return _table(table)


def _size_rows(plan: RunPlan) -> list[tuple[str, object]]:
    """Documents and tokens of the training data; of some of it alone where the rest is to be supplied."""
    sources = plan.sources
    if plan.train_rows is not None:
        return [
            ("documents", sum(source.manifest.documents for source in sources)),
            ("tokens", sum(source.manifest.tokens for source in sources)),
        ]
    of_known = [
        (f"documents and tokens of {source.name}", f"{source.manifest.documents:,} and {source.manifest.tokens:,}")
        for source in sources
    ]
    return [("documents", _not_known(plan)), ("tokens", _not_known(plan)), *of_known]


def _supply_rows(plan: RunPlan) -> list[tuple[str, object]]:
    """How often the run reads its data."""
    training = plan.train_rows
    if training is None:
        return [("rows there are", _not_known(plan)), ("epochs of the run", _not_known(plan))]
    table: list[tuple[str, object]] = [
        ("rows there are", "endless" if training.total_rows is None else training.total_rows)
    ]
    for source in training.sources:
        is_alone = len(training.sources) == 1
        share = "" if is_alone else f", {float(source.share):.2%} of the rows: {source.rows:,}"
        table.append(("epochs of the run" if is_alone else f"epochs of {source.name}", f"{source.epochs:.2f}{share}"))
    return table


def _not_known(plan: RunPlan) -> str:
    absent = [entry for entry in plan.to_be_supplied if entry.key.startswith("data.s")]
    return f"not known: {listed_keys(absent)} to be supplied" if absent else "not known"


def _checkpoint_text(config: RunConfig, plan: RunPlan) -> str:
    """When there are checkpoints, and what they take."""
    checkpoint, sizes = config.checkpoint, plan.parallel
    of_critic = critic_bytes(config, plan)  # divided over the ranks on whose stages layers are tapped
    size_bytes = checkpoint_bytes(config, plan.architecture.num_parameters) + of_critic
    largest_part = max(part.parameters for part in rank_parts(config, plan))
    held_bytes = checkpoint_bytes(config, largest_part) / sizes.data_parallel + of_critic
    kept = "all"
    if checkpoint.keep_last is not None:
        kept = f"the last {checkpoint.keep_last}"
        if checkpoint.keep_every is not None:
            kept += f", and those at multiples of {checkpoint.keep_every:,} steps"
    return _table(
        [
            ("taken", checkpoint_times(config)),
            ("where", str(config.output_dir / CHECKPOINTS)),
            ("kept", kept),
            ("size of one on the disk, GB", f"{size_bytes / 1e9:.3f}"),
            ("host memory per rank while it is written, GB", f"at most about {held_bytes / 1e9:.3f}"),
        ]
    )


def _layout_text(config: RunConfig, plan: RunPlan) -> str:
    """Which rank is what, and who talks to whom."""
    sizes = plan.parallel
    tensor, data, pipeline = sizes.tensor_parallel, sizes.data_parallel, sizes.pipeline_parallel
    apart = tensor * data  # ranks between neighbouring stages
    rows = config.train.global_batch_size // data
    own_rows = f"rows {rows} * r to {rows} * r + {rows - 1}" if rows > 1 else "row r"
    neighbours = f"rank - {apart} and rank + {apart}; the last stage returns tokens to rank - {apart * (pipeline - 1)}"
    state = {0: "nothing", 1: "the optimizer state", 2: "optimizer state and gradients", 3: "all states"}
    return _table(
        [
            ("tensor x data x pipeline parallel", f"{tensor} x {data} x {pipeline}"),
            ("rank", f"slice + {tensor} * (replica + {data} * stage)"),
            ("tensor-parallel peers", f"{tensor} consecutive ranks" if tensor > 1 else "none"),
            ("sequence parallel", "yes" if config.parallel.sequence_parallel else "no"),
            ("data-parallel peers", f"{data} ranks, {tensor} apart" if data > 1 else "none"),
            ("pipeline neighbours", neighbours if pipeline > 1 else "none"),
            ("rows of a replica per step", f"{rows}: replica r has {own_rows}"),
            ("ZeRO divides over the replicas", f"{state[config.zero.stage]} (stage {config.zero.stage})"),
        ]
    )


def _parts_text(config: RunConfig, plan: RunPlan) -> str:
    """One line for the ranks of each stage and slice."""
    head = ["ranks", "stage", "slice", "layers", "with", "parameters", "heads", "key-value heads", "token ids"]
    rows = [[*head, "feature layers"] if config.uses_rollouts else head]
    rows += [_part_cells(part) for part in rank_parts(config, plan)]
    return _columns(rows, numbers=(head.index("parameters"),))


def _part_cells(part: RankPart) -> list[str]:
    keys = _span(part.heads.key_value)
    tokens = f"{_span(part.vocabulary.tokens)} + {part.vocabulary.padding:,} padding"
    if not part.vocabulary.padding:
        tokens = _span(part.vocabulary.tokens)
    cells = [
        _ranks(part.ranks),
        str(part.stage),
        str(part.tensor_slice),
        _layers(part.policy),
        _modules(part.policy),
        f"{part.parameters:,}",
        _span(part.heads.query),
        keys if part.heads.sharers == 1 else f"1/{part.heads.sharers} of {keys}",
        tokens if part.has_vocabulary else "none",
    ]
    return cells if part.features is None else [*cells, _layers(part.features)]


def _ranks(ranks: range) -> str:
    """World ranks: `5`, `0-7`, or `3, 11, ... 1019` for every eighth."""
    if len(ranks) == 1 or ranks.step == 1:
        return _span(ranks)
    if len(ranks) == 2:
        return f"{ranks[0]}, {ranks[1]}"
    return f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def _span(numbers: range) -> str:
    """First and last of consecutive numbers."""
    if not numbers:
        return "none"
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _layers(shape: StageShape) -> str:
    return _span(range(shape.first_layer, shape.first_layer + shape.num_layers))


def _modules(shape: StageShape) -> str:
    """What a stage has besides layers."""
    parts = (("embedding", shape.has_embedding), ("norm", shape.has_final_norm), ("head", shape.has_head))
    return ", ".join(name for name, present in parts if present) or "-"


def _columns(rows: list[list[str]], numbers: tuple[int, ...]) -> str:
    """Aligned columns; those in `numbers` to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _work_text(config: RunConfig, plan: RunPlan, memory_bytes: int | None, shares: DistinctShares | None) -> str:
    shape = StepShape.of(config, plan.architecture, plan.feature_architecture)
    return work_text(config, shape, choices(config, plan, memory_bytes).reuse_rollout, shares)


def _memory_text(config: RunConfig, plan: RunPlan, memory_bytes: int | None) -> str:
    """Every tensor of the rank that needs the most; with several stages also a line for each of them."""
    chosen = choices(config, plan, memory_bytes)
    worst = worst_stage(config, plan, chosen)
    memory = plan_memory(config, plan, chosen, worst)
    rows = [(name, size) for name, size in memory.states.items()]
    rows += [(f"{phase}: {name}", size) for phase, parts in memory.phases.items() for name, size in parts.items()]
    rows.append(("peak (states and the largest phase)", memory.peak_bytes))
    table = _table([(name, f"{size / GIB_BYTES:10.3f}") for name, size in rows])
    if plan.parallel.pipeline_parallel == 1:
        return table
    return f"Ranks of stage {worst}, which need the most:\n{table}\n\nAll stages:\n{_stages_text(config, plan, chosen)}"


def _stages_text(config: RunConfig, plan: RunPlan, chosen: Choices) -> str:
    memories = [plan_memory(config, plan, chosen, stage) for stage in range(plan.parallel.pipeline_parallel)]
    phases = list(memories[0].phases)
    rows = [["stage", "states", *phases, "peak"]]
    for stage, memory in enumerate(memories):
        sizes = [memory.state_bytes, *(memory.phase_bytes(phase) for phase in phases), memory.peak_bytes]
        rows.append([str(stage), *(f"{size / GIB_BYTES:.3f}" for size in sizes)])
    return _columns(rows, numbers=tuple(range(1, len(rows[0]))))


def _reuse_text(config: RunConfig, plan: RunPlan, memory_bytes: int | None) -> str:
    """What a rank needs for everything that learning can take over from the rollouts, and what is planned here."""
    rows = [["learn.reuse_rollout", "resident", "sharded"]]
    for reuse in possible_reuses(config):
        peaks = (peak_bytes(config, plan, Choices(reuse, is_sharded)) for is_sharded in (False, True))
        rows.append([reuse, *(f"{peak / GIB_BYTES:.3f}" for peak in peaks)])
    chosen = choices(config, plan, memory_bytes)
    return "\n".join(
        [
            _columns(rows, numbers=(1, 2)),
            f"Planned above: {chosen.reuse_rollout}, feature network {_network(chosen)}.",
            f"A run takes for 'auto' the first of {', '.join(possible_reuses(config))} that fits into",
            f"{USABLE_SHARE:.0%} of the smallest accelerator, and then a resident feature network if that fits, too.",
        ]
    )


def _network(chosen: Choices) -> str:
    return "sharded" if chosen.feature_network_is_sharded else "resident"


def _fit_text(config: RunConfig, plan: RunPlan, memory_bytes: int) -> str:
    """What `auto` becomes on accelerators of this memory, and whether the run fits there."""
    found = fit(config, plan, memory_bytes)
    left = found.usable_bytes - found.peak_bytes
    words = f"{'yes' if found.fits else 'no'}: {abs(left) / GIB_BYTES:,.3f} GiB {'left' if found.fits else 'too much'}"
    resolved = [
        ("learn.reuse_rollout", f"{found.choices.reuse_rollout} (configured: {config.learn.reuse_rollout})"),
        ("zero.feature_network", f"{_network(found.choices)} (configured: {config.zero.feature_network})"),
    ]
    usable = f"{found.usable_bytes / GIB_BYTES:,.3f} ({USABLE_SHARE:.0%} of {memory_bytes / GIB_BYTES:,.3f})"
    return _table(
        [
            *resolved * config.uses_rollouts,
            ("peak of the ranks that need the most, GiB", f"{found.peak_bytes / GIB_BYTES:,.3f}"),
            ("memory for it, GiB", usable),
            ("it fits", words),
            *([] if found.fits else _ways_out(config, plan, memory_bytes)),
        ]
    )


def _ways_out(config: RunConfig, plan: RunPlan, memory_bytes: int) -> list[tuple[str, object]]:
    """What else may be set so that the run fits by the same formulas."""
    rows: list[tuple[str, object]] = []
    for way in ways_out(config, plan, memory_bytes)[:MOST_WAYS]:
        settings = " ".join(f"{key}={value}" for key, value in way.changes.items())
        name = "it fits with" if way.fits else "nearest to it"
        rows.append((name, f"--set {settings}: peak {way.peak_bytes / GIB_BYTES:,.3f} GiB"))
    if not any(name == "it fits with" for name, _ in rows):
        rows.append(("else", "more or larger accelerators, shorter rows, fewer samples, or a smaller model"))
    return rows
