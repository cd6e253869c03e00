"""Real runs of two ranks with a NaN in one feature: skipped steps and blocks left out, not a traceback."""

import json

import pytest

from tests.integration.jobs import Site, finish

STEPS = 3
LAYOUTS = {
    "data": (),
    "tensor": ("parallel.tensor_parallel_size=2",),
    "pipeline": ("parallel.pipeline_parallel_size=2",),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data and a configuration."""
    return Site.made_in(tmp_path_factory.mktemp("features"))


@pytest.mark.slow
@pytest.mark.parametrize("whitening", ["sample", "feature"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_in_a_feature_skips_steps_and_is_left_out_of_evaluations(site, tmp_path, layout, whitening):
    settings = (f"train.max_steps={STEPS}", f"ebft.whitening={whitening}", *LAYOUTS[layout])
    console = finish(site, tmp_path / "out", *settings, feature=0)
    assert "Traceback" not in console and f"step {STEPS}: skipped by all ranks" in console, console

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[-1]["train/skipped_steps"] == STEPS and records[-1]["ebft/mean_reward"] is None
    evaluations = [record for record in records if "eval/ce_loss" in record]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == STEPS
    for record in evaluations:
        assert record["eval/blocks_left_out"] > 0 == record["eval/rows_left_out"]
        assert record["eval/alignment"] is not None and record["eval/ce_loss"] == evaluations[0]["eval/ce_loss"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "blocks were left out, because something was not finite" in report
