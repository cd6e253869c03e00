"""The bench file as Markdown tables."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SIDE_NAMES = {
    "naive": "naive, eager",
    "naive_checkpointing": "naive, eager, checkpointing",
    "naive_sdpa": "naive, dense-mask SDPA",
    "ours": "ours, checkpoints",
    "ours_unmerged": "ours, checkpoints, without merging",
    "ours_activations": "ours, activations",
    "ours_activations_unmerged": "ours, activations, without merging",
    "ours_off": "ours, reuse off",
    "ours_inner_products": "ours, inner products",
    "ours_critic": "ours, token critic",
}
COUNTED_PHASES = ("generate", "features", "policy_forward", "policy_backward")
CRITIC_PHASES = ("generate", "features", "policy_backward", "update")
TIMED_PHASES = ("rollout", "features", "reward", "learn", "update")


def sides_of(case: Mapping[str, Any]) -> list[str]:
    """Names of the sides that a case of the bench file has."""
    return [name for name in SIDE_NAMES if name in case]


def linear_flops(side: Mapping[str, Any]) -> int:
    """FLOPs of a side in linear layers and the head, recomputation not included."""
    return sum(phase["linear_flops"] + phase["head_flops"] for phase in side["phases"].values())


def times_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Seconds, memory and their ratios to the eager baseline, a line per case and side."""
    rows = []
    for case in cases:
        for name in sides_of(case):
            side, found = case[name], case["ratios"]
            rows.append(
                [
                    case["name"],
                    SIDE_NAMES[name],
                    _seconds(side["seconds_all"]),
                    *(
                        _number(found.get(f"{what} {name} / {other}"))
                        for what, other in (("seconds", "naive"), ("seconds", "naive_sdpa"), ("cpu", "naive"))
                    ),
                    _megabytes(side["peak_bytes"]),
                    _number(found.get(f"peak {name} / naive")),
                    f"{side['flops'] / 1e9:,.1f}",
                    _number(found.get(f"flops {name} / naive")),
                    _number(found[f"flops {name} / bound"]),
                    _number(side.get("share_of_product_speed")),
                ]
            )
    head = ["case", "side", "s, median (min-max)", "/ naive", "/ SDPA", "CPU s / naive", "peak MB", "/ naive"]
    return markdown([*head, "GFLOP", "/ naive", "x bound", "share of product speed"], rows)


def merging_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """What merging is worth where a side also ran without it; empty if there is none.

    Shares and FLOPs are those of the step whose matrix products were counted; seconds are of steps with other noise.
    """
    rows = []
    for case in cases:
        for name in sides_of(case):
            side, found, without = case[name], case["ratios"], f"{name}_unmerged"
            if without not in case or "bound_with_merging" not in side:
                continue
            shares, bound = side["distinct_shares"], side["bound_with_merging"]
            rows.append(
                [
                    case["name"],
                    SIDE_NAMES[name],
                    *(_number(shares[phase]) for phase in ("features", "policy", "head")),
                    *(_seconds(case[of][key]) for key in ("cpu_seconds_all",) for of in (without, name)),
                    *(_number(found.get(f"{what} {name} / {without}")) for what in ("cpu", "seconds", "peak", "flops")),
                    f"{side['flops'] / 1e9:,.2f}",
                    f"{bound['flops'] / 1e9:,.2f}",
                    _number(found[f"flops {name} / bound with merging"]),
                ]
            )
    if not rows:
        return ""
    head = [
        "case",
        "side",
        "distinct rows, features",
        "policy",
        "head",
        "CPU s without",
        "CPU s with",
        "CPU s, with / without",
    ]
    head += ["s", "peak", "FLOP", "GFLOP with", "bound with merging", "x bound with merging"]
    return markdown(head, rows)


def critic_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """What the token critic costs where the step also ran without it; empty if it did not.

    Shares are of the step with the critic.
    """
    rows = []
    for case in cases:
        if "ours_critic" not in case or "ours_inner_products" not in case:
            continue
        side, found = case["ours_critic"], case["ratios"]
        ratios = [found.get(f"{what} ours_critic / ours_inner_products") for what in ("cpu", "seconds")]
        rows.append(
            [
                case["name"],
                *(_seconds(case[name]["cpu_seconds_all"]) for name in ("ours_inner_products", "ours_critic")),
                *(_number(None if ratio is None else 1 - 1 / ratio) for ratio in ratios),
                *(f"{side['flops'] / 1e9:,.2f}", _number(side["critic_flops"] / side["flops"])),
                *(f"{side['phases'][phase]['critic_flops'] / 1e9:,.3f}" for phase in CRITIC_PHASES),
            ]
        )
    if not rows:
        return ""
    head = ["case", "CPU s without", "CPU s with", "critic's share of CPU s", "of seconds", "GFLOP", "share of FLOP"]
    return markdown([*head, *(f"critic's GFLOP, {phase.replace('_', ' ')}" for phase in CRITIC_PHASES)], rows)


def phases_table(case: Mapping[str, Any]) -> str:
    """Counts of every phase of every side of a case."""
    rows = []
    lines = {name: case[name]["phases"] for name in (*sides_of(case), "bound")}
    merging = [name for name in sides_of(case) if "bound_with_merging" in case[name]]
    if merging:
        lines["bound with merging"] = case[merging[0]]["bound_with_merging"]["phases"]
    for name, phases in lines.items():
        for phase in COUNTED_PHASES:
            counted = phases[phase]
            counts = [f"{counted[key]:,}" for key in ("rows", "layers", "head_rows", "pairs")]
            flops = [
                f"{counted[key] / 1e9:,.2f}"
                for key in ("linear_flops", "head_flops", "attention_flops", "recomputed_flops")
            ]
            rows.append([SIDE_NAMES.get(name, name), phase.replace("_", " "), *counts, *flops])
    head = ["side", "phase", "rows", "layers", "head rows", "pairs per head and layer"]
    return markdown([*head, "linear GFLOP", "head", "attention", "recomputed"], rows)


def phase_seconds_table(case: Mapping[str, Any]) -> str:
    """Seconds of every phase of every side of a case."""
    rows = [
        [SIDE_NAMES[name], *(_seconds(case[name]["phase_seconds_all"][phase]) for phase in TIMED_PHASES)]
        for name in sides_of(case)
    ]
    return markdown(["side", *TIMED_PHASES], rows)


def growth_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """FLOPs of linear layers and attention without recomputation, the same for all sides that merge nothing."""
    rows = []
    for case in cases:
        ours = "ours_unmerged" if "ours_unmerged" in case else "ours"
        for name in (name for name in ("naive", ours) if name in case):
            linear, phases = linear_flops(case[name]) / case["rows"], case[name]["phases"].values()
            attention = sum(phase["attention_flops"] for phase in phases) / case["rows"]
            sizes = [str(case[key]) for key in ("sequence_length", "samples", "stride")]
            per_position = f"{linear / 1e9 / case['sequence_length']:.4f}"
            rows.append([*sizes, name.split("_")[0], f"{linear / 1e9:,.1f}", per_position, f"{attention / 1e9:,.1f}"])
    return markdown(["L", "n", "stride", "side", "linear and head GFLOP", "per position of the row", "attention"], rows)


def large_model_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Counts of a model that is never run, in TFLOP per row and as multiples of the bound."""
    rows = []
    for length, sides in models.items():
        for name, side in sides.items():
            flops = [f"{side['phases'][phase] / 1e12:,.1f}" for phase in COUNTED_PHASES]
            rows.append([length, name, *flops, f"{side['flops'] / 1e12:,.1f}", _number(side["times_bound"])])
    return markdown(["L", "side", *(phase.replace("_", " ") for phase in COUNTED_PHASES), "total", "x bound"], rows)


def merged_table(costs: Iterable[Mapping[str, Any]]) -> str:
    """Counts of models that are never run with given shares of distinct rows, in TFLOP per row."""
    rows = []
    for line in costs:
        plain, merged, bound = line["flops"], line["flops_merged"], line["bound_merged"]
        flops = [f"{value / 1e12:,.1f}" for value in (plain, merged)]
        rows.append(
            [
                *(line["model"], str(line["samples"]), line["reuse"], *flops),
                *(_number(merged / plain), f"{bound / 1e12:,.1f}", _number(merged / bound)),
            ]
        )
    head = ["model", "n", "learning reuses", "nothing merged", "with the shares", "ratio"]
    return markdown([*head, "bound with merging", "x bound with merging"], rows)


def report(bench: Mapping[str, Any]) -> str:
    """All tables of a bench file."""
    parts = ["## Measured and counted", times_table(bench["cases"])]
    if merged := merging_table(bench["cases"]):
        parts += ["## With and without merging of rollouts that begin alike", merged]
    if critic := critic_table(bench["cases"]):
        parts += ["## With and without the token critic", critic]
    for case in bench["cases"]:
        title = f"## {case['name']}: L={case['sequence_length']}, n={case['samples']}, stride={case['stride']}"
        parts += [title, phase_seconds_table(case), phases_table(case)]
    parts += ["## Linear work and attention, each once", growth_table(bench["cases"])]
    parts += ["## 7B, counted only: TFLOP per row", large_model_table(bench["large_model"])]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(values: Sequence[float]) -> str:
    """Median and range of runs."""
    if not values:
        return "not run"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"
