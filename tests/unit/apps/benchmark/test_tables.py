"""A comparison from runs to file, tables and plot; memory is measured by the tool's own test."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from ebft_mega.apps.benchmark import measurement as comparison
from ebft_mega.apps.benchmark import product_speed
from ebft_mega.apps.benchmark.case import MODELS, BenchCase
from ebft_mega.apps.benchmark.cost_plots import draw_costs
from ebft_mega.apps.benchmark.measurement import Timing, compare, entry, ratios
from ebft_mega.apps.benchmark.suite import CASES, large_model_costs, merged_costs
from ebft_mega.apps.benchmark.tables import (
    critic_table,
    growth_table,
    large_model_table,
    linear_flops,
    markdown,
    merged_table,
    merging_table,
    phases_table,
    report,
    times_table,
)
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.cost.naive_cost import cost_of_naive_step
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from tests.unit.apps.benchmark.benchmark_models import TINY_CASES, TINY_MODEL

ROOT = Path(__file__).resolve().parents[4]
PROMISED = {
    "rows_generate",
    "head_rows_generate",
    "rows_features",
    "feature_layers_run",
    "rows_policy_forward",
    "flops",
    "seconds_median",
    "seconds_all",
    "peak_bytes",
}


@pytest.fixture
def compared(groups, monkeypatch):
    """An entry of the bench file, from real steps and made-up memory."""
    peaks = {"naive": 4_000_000, "ours": 1_000_000, "ours_unmerged": 1_250_000}
    monkeypatch.setattr(comparison, "peak_bytes_in_child", lambda side, case, model: peaks[side])
    monkeypatch.setattr(product_speed, "MEASURED_SECONDS", 0.01)
    said = []
    case = dataclasses.replace(TINY_CASES["stride=G"], temperature=0.3)
    found = compare(case, ("naive", "ours", "ours_unmerged"), TINY_MODEL, groups, said.append)
    assert len(said) == 3 + 3 * case.runs + 3
    return found


def test_a_compared_case_has_what_the_bench_file_promises(compared):
    assert (compared["sequence_length"], compared["samples"]) == (28, 3)
    assert (compared["stride"], compared["generate_max_len"]) == (4, 4)
    assert compared["bound"]["flops"] < compared["ours_unmerged"]["flops"] < compared["naive"]["flops"]
    for side in ("naive", "ours", "ours_unmerged"):
        assert set(compared[side]) >= PROMISED
        assert compared[side]["seconds_median"] == statistics.median(compared[side]["seconds_all"]) > 0
        phases = compared[side]["phase_seconds_median"]
        assert 0 < sum(phases.values()) <= compared[side]["seconds_median"]
        assert sum(phase["flops"] for phase in compared[side]["phases"].values()) == compared[side]["flops"]
    # 6 blocks of 3 samples: 24 document positions and 3 of 4 tokens of each rollout.
    assert compared["ours_unmerged"]["rows_generate"] == 24 + 18 * 3
    assert compared["naive"]["rows_generate"] == 3 * (4 * 28 + 6 * (0 + 1 + 2 + 3))
    assert compared["ratios"]["peak ours / naive"] == 0.25
    assert compared["ours"]["grad_norm"] == pytest.approx(compared["naive"]["grad_norm"], rel=1e-4)
    before, after = compared["product_flops_per_second"]
    share = compared["ours"]["flops"] / compared["ours"]["cpu_seconds_median"] / statistics.mean((before, after))
    assert share > 0 and compared["ours"]["share_of_product_speed"] == pytest.approx(share)
    assert f"| {share:.3f} |" in times_table([compared])
    json.dumps(compared)


def test_what_merging_is_worth(compared):
    ours, without, bound = compared["ours"], compared["ours_unmerged"], compared["ours"]["bound_with_merging"]
    shares = ours["distinct_shares"]
    assert 1 / 3 < shares["policy"] < shares["features"] < 1
    assert without["distinct_shares"] == compared["naive"]["distinct_shares"] == dict.fromkeys(shares, 1.0)
    # 18 rollouts: 3 tokens of each are fed back to the policy, 4 are read by the feature network.
    assert ours["rows_generate"] == bound["phases"]["generate"]["rows"] == 24 + round(18 * 3 * shares["policy"])
    assert ours["rows_features"] == bound["phases"]["features"]["rows"] == 28 + round(18 * 4 * shares["features"])
    assert bound["flops"] < compared["bound"]["flops"] and "bound_with_merging" not in without
    found = compared["ratios"]
    assert found["flops ours / ours_unmerged"] == ours["flops"] / without["flops"] < 1
    assert found["cpu ours / ours_unmerged"] == ours["cpu_seconds_median"] / without["cpu_seconds_median"]
    assert found["peak ours / ours_unmerged"] == 0.8
    assert found["flops ours / bound with merging"] == ours["flops"] / bound["flops"] > 1
    # The same gradient, computed with fewer rows.
    assert ours["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-4)
    lines = merging_table([compared]).splitlines()
    assert len(lines) == 3 and "ours, checkpoints" in lines[2] and f"| {shares['policy']:.3f} |" in lines[2]
    assert merging_table([made_up(TINY_CASES["stride=G"], {"ours": [1.0]})]) == ""
    assert "## With and without merging" in report({"cases": [compared], "large_model": large_model_costs()})


def made_up(case, seconds):
    """An entry without running anything."""
    config = case.config(TINY_MODEL, "off")
    architecture = TINY_MODEL.architecture
    shape = StepShape.of(config, architecture, architecture)
    costs = {"naive": cost_of_naive_step(shape), "ours": cost_of_step(shape, "checkpoints")}
    if "ours_critic" in seconds:
        costs = {}
        for name, estimator in (("ours_inner_products", "rloo"), ("ours_critic", "token_critic")):
            own = StepShape.of(case.config(TINY_MODEL, "off", estimator=estimator), architecture, architecture)
            costs[name] = cost_of_step(own, "checkpoints")
    timings = {name: Timing(wall=list(values), processor=list(values)) for name, values in seconds.items()}
    return entry(case, TINY_MODEL, costs, timings, {"ours": 7_000_000})


def test_ratios_are_those_of_medians():
    found = made_up(TINY_CASES["stride=G"], {"naive": [8.0, 10.0, 40.0], "ours": [1.0, 2.0, 2.5]})
    assert found["ratios"]["seconds ours / naive"] == 0.2
    assert found["ratios"]["flops ours / naive"] == found["ours"]["flops"] / found["naive"]["flops"]
    assert found["ratios"]["flops naive / bound"] == found["naive"]["flops"] / found["bound"]["flops"]
    assert "peak ours / naive" not in found["ratios"], "the baseline's is unknown"


def test_a_side_alone_has_no_ratio_but_that_to_the_bound():
    ours = made_up(TINY_CASES["stride=G"], {"ours": [1.0]})["ours"]
    assert set(ratios({"ours": ours}, 1)) == {"flops ours / bound", "flops ours / bound with merging"}


def test_what_the_token_critic_costs():
    case = dataclasses.replace(TINY_CASES["stride=G"], embed_method="mean_pooling")
    found = made_up(case, {"ours_inner_products": [1.0, 2.0, 9.0], "ours_critic": [2.4, 2.5, 2.6]})
    assert found["ratios"]["cpu ours_critic / ours_inner_products"] == 1.25
    assert found["ratios"]["flops ours_critic / ours_inner_products"] > 1
    side = found["ours_critic"]
    assert side["flops"] - found["ours_inner_products"]["flops"] == side["critic_flops"] > 0
    assert sum(phase["critic_flops"] for phase in side["phases"].values()) == side["critic_flops"]
    assert side["bound_with_merging"]["flops"] > found["ours_inner_products"]["bound_with_merging"]["flops"]
    (*_, line) = critic_table([found]).splitlines()
    assert "| 0.200 | 0.200 |" in line and f"| {side['critic_flops'] / side['flops']:.3f} |" in line
    assert critic_table([made_up(case, {"ours": [1.0]})]) == ""
    assert "## With and without the token critic" in report({"cases": [found], "large_model": large_model_costs()})


def test_tables_say_what_was_not_run():
    case = made_up(TINY_CASES["stride=G"], {"ours": [1.0, 2.0, 2.5]})
    table = times_table([case])
    assert "2.00 (1.00-2.50)" in table and "not run" in table
    lines = phases_table(case).splitlines()
    assert len(lines) == 2 + 4 * 4  # naive, ours, the bound and that with merging, four phases each
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_the_report_has_every_case():
    cases = [made_up(case, {"ours": [1.0]}) for case in TINY_CASES.values()]
    text = report({"cases": cases, "large_model": large_model_costs()})
    assert text.count("\n## ") == 2 + len(cases)
    assert "| 1024 | ours, checkpoints | 64.6 | 48.6 | 0.0 | 194.3 | 307.6 | 1.276 |" in text


def test_growth_is_told_per_position():
    case = made_up(TINY_CASES["stride=G"], {"ours": [1.0]})
    ours = growth_table([case]).splitlines()[-1].split(" | ")
    assert ours[:3] == ["| 28", "3", "4"]
    assert float(ours[4]) == pytest.approx(linear_flops(case["ours"]) / 1e9, abs=0.05)
    assert float(ours[5]) == pytest.approx(linear_flops(case["ours"]) / 1e9 / 28, abs=5e-5)


def test_markdown_tables_are_tables():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_costs_are_drawn(tmp_path):
    cases = [made_up(BenchCase("", 16 + 4 * k, samples=3, stride=4), {"ours": [1.0 * k]}) for k in (1, 2, 3)]
    draw_costs(cases, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes()[:4] == b"\x89PNG"
    works = [linear_flops(case["ours"]) for case in cases]
    assert works[2] - works[1] == works[1] - works[0]


def test_the_documentation_has_the_counts_of_the_code():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert large_model_table(large_model_costs()) in text
    names = ("Qwen2.5-7B", "Llama-3.1-8B", "Qwen2.5-32B")
    models = {name: Architecture.from_directory(ROOT / "configs" / "models" / name) for name in names}
    assert merged_table(merged_costs(models)) in text
    plan, sizes = CASES[2], MODELS["7b"].architecture
    shape = StepShape(sizes, sizes, plan.config(MODELS["7b"], "off").block_plan)
    naive, ours = cost_of_naive_step(shape), cost_of_step(shape, "checkpoints")
    counts = {
        "rows while generating": (naive.generate.rows, ours.generate.rows),
        "head rows while generating": (naive.generate.head_rows, ours.generate.head_rows),
        "pairs while generating": (naive.generate.pairs, ours.generate.pairs),
        "pairs in the feature network": (naive.features.pairs, ours.features.pairs),
        "rows of its backward pass": (naive.policy_backward.rows, ours.policy_backward.rows),
    }
    for what, (of_naive, of_ours) in counts.items():
        assert f"| {what} | {of_naive:,} | {of_ours:,} | {of_ours / of_naive:.3f} |" in text


def test_the_suite_varies_one_thing_at_a_time():
    first = CASES[0]
    for case in CASES[1:]:
        names = ("sequence_length", "samples", "stride", "context_length", "generate_length")
        assert sum(getattr(case, name) != getattr(first, name) for name in names) == 1
    runs = {case.name: case.runs for case in CASES}
    assert runs["L256"] >= 5 and min(runs.values()) >= 3
    assert {case.sequence_length for case in CASES if "naive" in case.sides} == {256, 512, 1024}
