"""What `tools/evaluate.py` asks for, with the evaluation itself replaced."""

import pytest

from ebft_mega.apps import evaluate_model
from ebft_mega.apps.report import evaluation_plot


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """The requests that the tool makes."""
    made = []

    def evaluate(requests, grid, output):
        made.extend(requests.values())
        path = tmp_path / "evaluation.json"
        path.write_text('{"rows": 2, "eval/cfm_loss": 0.123456789, "eval/alignment": null, "per_row": {}}')
        return dict.fromkeys(requests, path)

    monkeypatch.setattr(evaluate_model, "evaluate_models", evaluate)
    monkeypatch.setattr(evaluation_plot, "plot_evaluation", lambda path: path)
    return made


def test_distinct_shares_are_counted_instead(inputs, run_tool, requests, monkeypatch, tmp_path):
    from ebft_mega.apps import distinct_rows

    asked = []

    def measure(request, choices, config, output):
        asked.append((request.model, choices, output))
        return tmp_path / "distinct_rows.json"

    monkeypatch.setattr(distinct_rows, "measure_distinct_rows", measure)
    model = inputs.root / "model"
    places = ("--model", model, "--data", inputs.root / "held_out", "--output", tmp_path / "out")
    lists = ("--samples", 4, 2, "--temperatures", 0.6, 1)
    code, out, _ = run_tool("evaluate.py", "--distinct-shares", *places, "--config", inputs.write(), *lists)
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "distinct_rows.json")
    assert asked == [(model, distinct_rows.Choices((2, 4), (8,), (0.6, 1.0)), tmp_path / "out")] and not requests
    code, _, err = run_tool("evaluate.py", *places, *lists)
    assert code == 2 and "--samples: found 4 2; expected one number; several go with --distinct-shares" in err
    code, _, err = run_tool("evaluate.py", "--distinct-shares", *places, "--temperatures", 0)
    assert code == 2 and "expected a number above 0" in err


def test_a_trained_model_is_evaluated_with_the_features_of_its_run(inputs, run_tool, requests, tmp_path):
    places = ("--data", inputs.root / "held_out", "--output", tmp_path / "out")
    trained, initial = inputs.root / "run" / "hf", inputs.root / "model"
    code, out, _ = run_tool("evaluate.py", "--config", inputs.write(), "--model", trained, *places)
    assert code == 0 and out.startswith(f"feature network: {initial} (model.init_from)\n") and "note" not in out
    path = tmp_path / "evaluation.json"
    assert out.splitlines()[1:] == ["eval/alignment  null", "eval/cfm_loss   0.123457", str(path), str(path)]
    code, out, _ = run_tool("evaluate.py", "--model", initial, *places)
    assert code == 0 and "note: the model itself gives the features" in out
    assert [(request.model, request.feature_model, request.feature_key) for request in requests] == [
        (trained, initial, "model.init_from"),
        (initial, initial, "--model"),
    ]
