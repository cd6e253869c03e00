"""Which cases `tools/bench_step.py` asks for, with the benchmark itself replaced."""

import json

import pytest

from ebft_mega.apps.benchmark import suite
from ebft_mega.apps.benchmark.case import MODELS


@pytest.fixture
def asked(monkeypatch):
    """Cases and model of each run of the suite."""
    found = []

    def run_suite(cases, model, say):
        found.append((cases, model))
        return {"cases": [], "large_model": {}}

    monkeypatch.setattr(suite, "run_suite", run_suite)
    return found


@pytest.fixture
def bench(run_tool, asked, tmp_path):
    return lambda *options: run_tool("bench_step.py", "--output", tmp_path / "bench.json", *options)


def test_a_model_directory_is_run_with_and_without_merging(inputs, bench, asked, tmp_path):
    places = ("--model", inputs.root / "model", "--data", inputs.root / "held_out")
    geometry = ("--sequence-length", 24, "--stride", 4, "--context-length", 4, "--generate-length", 4, "--rows", 2)
    code, _, err = bench(*places, *geometry, "--samples", 4, 8, "--temperature", 0.5, "--runs", 2)
    assert code == 0, err
    ((cases, model),) = asked
    assert [(case.name, case.samples, case.rows, case.temperature) for case in cases] == [
        ("n4", 4, 2, 0.5),
        ("n8", 8, 2, 0.5),
    ]
    assert {case.sides for case in cases} == {("ours_unmerged", "ours")}
    assert (model.directory, model.data) == (str(inputs.root / "model"), str(inputs.root / "held_out"))
    assert cases[0].config(model, "off").model.init_from == inputs.root / "model"
    assert json.loads((tmp_path / "bench.json").read_text())["cases"] == []


def test_sizes_and_cases_by_name(bench, asked):
    assert bench("--cases", "n2", "n8")[0] == 0
    assert bench("--model", "0.5b", "--samples", 8, "--sides", "ours", "ours_unmerged")[0] == 0
    assert bench("--quick")[0] == 0
    critic = ("--embed-method", "mean_pooling", "--ce-coef", 0.3, "--sides", "ours_inner_products", "ours_critic")
    assert bench(*critic)[0] == 0
    (by_name, _), (own, model), (quick, toy), ((judged,), _) = asked
    config = judged.config(toy, "off", estimator="token_critic")
    assert (config.ebft.embed_method, config.ebft.ce_coef, config.ebft.alignment) == (
        "mean_pooling",
        0.3,
        "inner_product",
    )
    assert not config.ebft.use_whitening and config.ebft.advantage_estimator == "token_critic"
    assert [case.name for case in by_name] == ["n2", "n8"]
    assert [(case.samples, case.sides) for case in own] == [(8, ("ours", "ours_unmerged"))]
    assert model.sizes == MODELS["0.5b"].sizes and toy == MODELS["toy"] and quick == suite.QUICK_CASES


def test_what_does_not_go_together(inputs, bench, asked):
    model = inputs.root / "model"
    for options, says in (
        (("--model", model), "a model directory goes with --data"),
        (("--data", model), "--data with a model directory"),
        (("--cases", "n2", "--samples", 3), "--cases and --quick go without"),
        (("--sequence-length", 27), "is not divisible by the stride 8"),
        (("--model", inputs.root / "nothing", "--data", model), "found no such file; expected the config.json"),
        (("--model", model, "--data", inputs.root / "nothing", "--sequence-length", 32), "nothing"),
    ):
        code, _, err = bench(*options)
        assert code == 2 and says in err, (options, err)
    assert asked == []
