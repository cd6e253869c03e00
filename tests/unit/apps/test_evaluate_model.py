"""What is evaluated is checked as what is trained: the model, the feature network, and the data with both."""

import dataclasses
import json
import math
import shutil

import pytest

from ebft_mega.apps.evaluation_inputs import EvaluationRequest, check_inputs
from ebft_mega.apps.feature_choice import choose_feature_network
from ebft_mega.apps.written_evaluation import write_evaluation
from ebft_mega.config.load import load_config
from ebft_mega.errors import InputError


def request_of(inputs, features=None) -> EvaluationRequest:
    model = inputs.root / "model"
    return EvaluationRequest(model, features or model, inputs.root / "held_out", rows=4, skip_rows=0)


@pytest.fixture
def features(inputs):
    shutil.copytree(inputs.root / "model", inputs.root / "features")
    return inputs.root / "features"


def problems_of(inputs, features) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_inputs(request_of(inputs, features), load_config(inputs.write()))
    assert caught.value.exit_code == 2
    return [str(problem).replace(f"{inputs.root}/", "") for problem in caught.value.problems]


def test_good_inputs(inputs, features):
    config = load_config(inputs.write())
    (model, again), notes = check_inputs(request_of(inputs), config)
    assert model is again and notes == []
    (features / "tokenizer.json").unlink()
    (model, other), (note,) = check_inputs(request_of(inputs, features), config)
    assert other.directory == features and note.startswith("--feature-model: there is no tokenizer in ")


def test_the_feature_network_is_that_of_the_run(inputs):
    trained, initial, other = inputs.root / "run" / "hf", inputs.root / "model", inputs.root / "other"

    def chosen(given=None, **changes):
        choice = choose_feature_network(given, load_config(inputs.write(**changes)), "my.yaml", trained)
        assert not choice.note and choice.words == f"feature network: {choice.directory} ({choice.key})"
        return choice.directory, choice.key

    assert chosen() == (initial, "model.init_from")
    assert chosen(ebft__feature_model=str(other)) == (other, "ebft.feature_model")
    assert chosen(trained, ebft__feature_model=str(other)) == (trained, "--feature-model")


def test_where_no_initial_model_is_known_the_model_itself_is_the_feature_network_and_a_note_says_so(inputs):
    trained = inputs.root / "run" / "hf"
    config = load_config(inputs.write(model={"config": inputs.model_fields}))
    for of_run, words in ((config, "the initial model of my.yaml has random weights"), (None, "there is no --config")):
        choice = choose_feature_network(None, of_run, "my.yaml", trained)
        assert (choice.directory, choice.key) == (trained, "--model") and f", since {words}; " in choice.note


def test_a_feature_network_is_named_by_what_names_it(inputs, features):
    shutil.rmtree(features)
    request = dataclasses.replace(request_of(inputs, features), feature_key="model.init_from")
    with pytest.raises(InputError) as caught:
        check_inputs(request, load_config(inputs.write()))
    assert str(caught.value.problems[0]).startswith("model.init_from: ")


@pytest.mark.parametrize("name", ["hf", "checkpoints"])
def test_for_the_directory_of_a_run_its_models_are_named(inputs, name):
    (inputs.root / "run" / name).mkdir(parents=True)
    request = dataclasses.replace(request_of(inputs), model=inputs.root / "run")
    with pytest.raises(InputError) as caught:
        check_inputs(request, load_config(inputs.write()))
    line = str(caught.value.problems[0])
    assert line.startswith("--model: ") and "found the directory of a run" in line
    assert f"expected its final model, {inputs.root}/run/hf, or one of its checkpoints" in line


def test_another_evaluation_is_not_replaced_in_silence(tmp_path, capsys):
    path = tmp_path / "evaluation.json"
    for _ in range(2):
        write_evaluation(path, {"model": "a", "eval/ce_loss": 1.0})
        assert capsys.readouterr().out == ""
    write_evaluation(path, {"model": "b", "eval/ce_loss": 1.0})
    assert capsys.readouterr().out.endswith("evaluation.json: the earlier evaluation there, of a, is replaced\n")
    path.write_text("[")
    write_evaluation(path, {"model": "b"})
    assert "of an unknown model" in capsys.readouterr().out and json.loads(path.read_text()) == {"model": "b"}


@pytest.mark.parametrize("name", ["model", "features"])
def test_another_tokenizer_is_refused_for_either_model(inputs, features, name):
    inputs.add_tokenizer(name, '{"model": {"other": 1}}')
    (line,) = problems_of(inputs, features)
    option = {"model": "--model", "features": "--feature-model"}[name]
    assert line.startswith("--data: --data: found tokens of a tokenizer with sha256") and f"({option})" in line


@pytest.mark.parametrize("name", ["model", "features"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.type: found 'dynamic'"),
        ({"model_type": "mistral", "sliding_window": 16}, "data.sequence_length: found 32 tokens"),
    ],
)
def test_settings_are_checked_of_either_model(inputs, features, name, fields, words):
    (inputs.root / name / "config.json").write_text(json.dumps(inputs.model_fields | fields))
    (line,) = problems_of(inputs, features)
    assert words in line and {"model": "--model", "features": "--feature-model"}[name] in line


def test_everything_at_once(inputs, features):
    (inputs.root / "model" / "tokenizer_config.json").write_text("junk")
    (features / "model.safetensors").unlink()
    shutil.rmtree(inputs.root / "held_out")
    assert [line.partition(": ")[0] for line in problems_of(inputs, features)] == [
        "--model",
        "--feature-model",
        "held_out",
    ]


def test_what_was_left_out_is_noted_and_a_mean_of_nothing_is_null(tmp_path, capsys):
    counts = {"eval/blocks_left_out": 12.0, "eval/rows_left_out": 0.0}
    content = {"model": "m", "eval/alignment": math.nan, **counts, "per_row": {"eval/alignment": [None, None]}}
    written = write_evaluation(tmp_path / "evaluation.json", content).read_text()

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(written, parse_constant=refuse) == content | {"eval/alignment": None}
    line = "note: something was not finite: 12 blocks are left out, and the cross-entropy of 0 rows\n"
    assert capsys.readouterr().out == line
    write_evaluation(tmp_path / "another.json", content | dict.fromkeys(counts, 0.0))
    assert capsys.readouterr().out == ""
