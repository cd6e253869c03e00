"""What `tools/evaluate.py` asks for, with the evaluation itself replaced."""

import pytest

from ebft_mega.apps import evaluate_model
from ebft_mega.apps.report import arm_comparison, evaluation_plot
from ebft_mega.block_plan import BlockPlan

made_grids = []


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """The requests that the tool makes."""
    made = []
    made_grids.clear()

    def evaluate(requests, grid, output):
        made.extend(requests.values())
        made_grids.append((list(requests), grid, output))
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


def test_models_conditions_and_maps(inputs, run_tool, requests, monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(arm_comparison, "write_comparison", lambda *arguments: compared.append(arguments) or "page")
    models = ("--model", f"EBFT T1={inputs.root}/model", "--model", f"warm={inputs.root / 'run' / 'hf'}")
    places = ("--config", inputs.write(), "--data", inputs.root / "held_out", "--output", tmp_path / "out")
    lists = ("--temperatures", 1, 0.4, 1.0, "--completion-lengths", 2, 16, "--samples", 3)
    maps = ("--feature-map", "last", "embed_method=last_token", "feature_layers=[0.5]")
    maps += ("--feature-map", "other", f"feature_model={inputs.root}/other", "feature_norm=per_layer")
    code, out, err = run_tool("evaluate.py", *models, *places, *lists, *maps)
    assert code == 0, err
    assert [request.model for request in requests] == [inputs.root / "model", inputs.root / "run" / "hf"]
    ((names, grid, output),) = made_grids
    assert names == ["EBFT T1", "warm"] and output == tmp_path / "out"
    assert out.splitlines()[-1] == "Report: page" and compared[0][1] == tmp_path / "out"
    assert grid.temperatures == (0.4, 0.6, 1.0) and grid.lengths == (2, 8, 16)
    # Rows of 32: the longest completions leave two anchors of 8 tokens' stride.
    assert grid.plan == BlockPlan(32, 8, 8, 16, 3) and (grid.own.temperature, grid.own.completion_length) == (0.6, 8)
    assert [(each.name, each.directory) for each in grid.maps] == [
        ("trained", None),
        ("last", None),
        ("other", inputs.root / "other"),
    ]
    last = grid.maps[1]
    assert last.words == "embed_method=last_token feature_layers=[0.5] feature_norm=joint"
    assert last.config.ebft.feature_layers == (0.5,) and grid.config.ebft.n_samples_per_prompt == 3


def test_everything_that_is_wrong_with_a_command_line_at_once(inputs, run_tool, requests, tmp_path):
    (tmp_path / "a=b").mkdir()
    places = ("--config", inputs.write(ebft__layer_weights=[1, 2, 3]), "--data", inputs.root, "--output", tmp_path)
    models = ("--model", "a=/m", "--model", "a=/n", "--model", "/p", "--model", "../x=/m", "--model", "report.html=/m")
    lists = ("--temperatures", 0, "nan", 1, "--completion-lengths", 4, 25, 0, "--samples", 4, "x", "--lengths", 3)
    maps = ("--feature-map", "m", "embed_methd=concat", "feature_layers=[2]", "feature_norm", "feature_norm=joint")
    maps += ("--feature-map", "trained", "feature_norm=joint", "--feature-map", "n", "--feature-map", "a/b", "x=1")
    maps += ("--feature-map", "two", "feature_norm=joint", "--feature-map", "two", "feature_norm=joint")
    code, out, err = run_tool("evaluate.py", *models, *places, *lists, *maps)
    assert code == 2 and not requests and not out
    expected = [
        "--lengths: found this option; expected it with --distinct-shares",
        "--samples: found 4 x; expected one number",
        "--model: found 'a' twice; expected different names",
        "--model: found '/p'; expected NAME=PATH for each of several models",
        "--model: found '../x=/m'; expected NAME=PATH",
        "--model: found 'report.html'; expected another name",
        "--samples: found 'x'; expected a whole number from 1",
        "--temperatures: found '0'; expected a number above 0",
        "--temperatures: found 'nan'; expected a number above 0",
        "--completion-lengths: found '0'; expected a whole number from 1",
        "--feature-map m: found embed_methd; expected one of embed_method, feature_layers, feature_norm, feature_model."
        " Did you mean 'embed_method'?",
        "--feature-map m: found 'feature_norm'; expected KEY=VALUE",
        "--feature-map m: ebft.feature_layers: found [2]; expected a list of numbers > 0 and <= 1",
        "--feature-map: found the name of the configuration's own; expected different names",
        "--feature-map n: found no KEY=VALUE; expected at least one of embed_method",
        "--feature-map: found 'a/b'; expected a name of letters",
        "--feature-map: found 'two' twice; expected different names",
        "--completion-lengths: found 25; expected at most 24: rows of 32 tokens and a context of 8",
    ]
    for line in expected:
        assert line in err, (line, err)
    code, _, err = run_tool("evaluate.py", "--model", tmp_path / "a=b", *places)
    assert code == 0 and requests[0].model == tmp_path / "a=b"  # a path with "=" is one


def test_what_does_not_go_with_distinct_shares(inputs, run_tool, requests, tmp_path):
    places = ("--config", inputs.write(), "--data", inputs.root, "--output", tmp_path, "--model", "a=/m")
    options = ("--model", "b=/n", "--completion-lengths", 4, "--feature-map", "m", "feature_norm=joint")
    code, _, err = run_tool("evaluate.py", "--distinct-shares", *places, *options)
    assert code == 2
    for name in ("--completion-lengths", "--feature-map", "--distinct-shares: found several models"):
        assert f"command line: {name}" in err
    code, _, err = run_tool("evaluate.py", *places[2:], "--set", "ebft.temperature=1")
    assert code == 2 and "--set: found ebft.temperature=1; expected keys of --config, which is not given" in err
