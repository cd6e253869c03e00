"""Checks against processes and files: everything at once, naming key, file, found and expected."""

import json
import shutil

import pytest
from safetensors.numpy import save_file

from ebft_mega.config.load import load_config
from ebft_mega.config.validate import check_run, check_world
from ebft_mega.errors import ConfigError, InputError


def found_problems(inputs, world_size=1, **changes):
    """The problems of a run, without the folder of the inputs."""
    config = load_config(inputs.write(**changes))
    with pytest.raises(InputError) as caught:
        check_run(config, world_size)
    assert caught.value.exit_code == 2
    return [str(problem).replace(f"{inputs.root}/", "") for problem in caught.value.problems]


def test_plan_of_a_good_run(inputs):
    plan = check_run(load_config(inputs.write()), world_size=2)
    assert plan.data_parallel_size == 2
    assert plan.num_micro_batches == 8 // (2 * 2)
    assert plan.total_steps == 10
    assert (plan.train_rows.rows_per_epoch, plan.train_rows.tail_tokens) == (20, 20)
    assert plan.train_rows.manifest.tokens == 100 + 300 + 199 + 57 + 4
    assert plan.evaluation_rows.manifest.documents == 2
    assert plan.architecture.hidden_size == 16 and plan.feature_architecture == plan.architecture
    assert plan.block_plan.num_blocks == 3
    assert plan.notes == ()


def test_total_steps_from_tokens_never_read_more(inputs):
    config = load_config(inputs.write(train__max_steps=None, train__max_tokens=8 * 32 * 3 + 255))
    assert check_run(config, 1).total_steps == 3


@pytest.mark.parametrize(("world_size", "data_parallel"), [(1, 1), (2, 2), (4, 4)])
def test_world(inputs, world_size, data_parallel):
    sizes = check_world(load_config(inputs.write()), world_size)
    assert (sizes.data_parallel, sizes.world_size) == (data_parallel, world_size)


def test_batch_not_divisible_by_replicas(inputs):
    (line,) = found_problems(inputs, world_size=3)
    assert line == (
        "run.yaml:11: train.global_batch_size: found 8; expected a multiple of 6 "
        "(train.micro_batch_size 2 x data-parallel size 3)"
    )


def test_degrees_that_do_not_multiply_to_the_world_size(inputs):
    config = load_config(inputs.write())
    parallel = config.parallel.model_copy(update={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    config = config.model_copy(update={"parallel": parallel})
    assert check_world(config, 4).data_parallel == 1
    for world_size in (2, 6):
        with pytest.raises(ConfigError, match=f"tensor 2 x pipeline 2 = 4.*divisor of the world size {world_size}"):
            check_world(config, world_size)


def test_all_problems_at_once(inputs):
    (inputs.root / "model" / "model.safetensors").unlink()
    shard = next((inputs.root / "train").glob("*.tar"))
    shard.unlink()
    shutil.rmtree(inputs.root / "held_out")
    lines = found_problems(inputs, world_size=3)
    assert len(lines) == 4
    for line, words in zip(
        lines,
        (
            ("train.global_batch_size",),
            ("run.yaml:3: model.init_from: model: weights: found none; expected model.safetensors",),
            ("run.yaml:5: data.shards: ", shard.name),
            ("run.yaml:8: evaluation.shards: held_out: ", "no such directory"),
        ),
        strict=True,
    ):
        assert all(word in line for word in words), line


def test_model_directory_missing(inputs):
    (line,) = found_problems(inputs, model__init_from="nowhere")
    assert line.startswith("run.yaml:3: model.init_from: found no directory nowhere")


def test_pickled_weights_are_no_weights(inputs):
    model = inputs.root / "model"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (line,) = found_problems(inputs)
    assert "found pytorch_model.bin; expected model.safetensors" in line and "can hold code" in line


def test_truncated_weights(inputs):
    path = inputs.root / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    (line,) = found_problems(inputs)
    assert f"model.safetensors: found {len(whole) - 1} bytes; expected {len(whole)} bytes" in line
    path.write_bytes(whole[:20])
    assert "a complete safetensors header" in found_problems(inputs)[0]
    path.write_bytes(b"")
    assert "found 0 bytes" in found_problems(inputs)[0]


def test_index_names_a_missing_file(inputs):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "../x.safetensors"}}
    model = inputs.root / "model"
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = found_problems(inputs)
    assert len(lines) == 2
    assert "'../x.safetensors'; expected plain file names" in lines[0]
    assert "model-2.safetensors: found no such file" in lines[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"model_type": "gpt2"}, "one of llama, qwen2, qwen3"),
        ({"vocab_size": 50}, "no token id outside the model's vocabulary of 50"),
    ],
)
def test_model_config_that_cannot_be_used(inputs, changes, words):
    (inputs.root / "model" / "config.json").write_text(json.dumps(inputs.model_fields | changes))
    lines = found_problems(inputs)
    assert any(words in line for line in lines)


def test_another_tokenizer_than_the_dataset(inputs):
    inputs.add_tokenizer("model", '{"model": {"other": 1}}')
    lines = found_problems(inputs)
    assert [line.split(": found")[0] for line in lines] == [
        "run.yaml:5: data.shards",
        "run.yaml:8: evaluation.shards",
    ]
    assert all("the tokenizer of model, sha256" in line for line in lines)


def test_datasets_of_two_tokenizers(inputs):
    inputs.add_tokenizer("other", '{"model": {"other": 1}}')
    inputs.add_dataset("other_data", "other", [400])
    config = inputs.write(
        model__init_from=None,
        model__config=inputs.model_fields,
        evaluation__shards=str(inputs.root / "other_data"),
    )
    with pytest.raises(InputError, match="evaluation.shards: found tokens.*expected the tokenizer of data.shards"):
        check_run(load_config(config), 1)


def test_too_few_rows(inputs):
    lines = found_problems(inputs, train__global_batch_size=22, evaluation__rows=9)
    assert lines == [
        "run.yaml:5: data.shards: found 20 rows of 32 tokens; expected at least the 22 rows of train.global_batch_size",
        "run.yaml:8: evaluation.shards: found 8 rows of 32 tokens; expected at least the 9 rows of evaluation.rows",
    ]


def test_feature_model_needs_the_same_vocabulary(inputs):
    other = inputs.root / "features"
    other.mkdir()
    save_file({}, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(inputs.model_fields | {"hidden_size": 32}))
    plan = check_run(load_config(inputs.write(ebft__feature_model=str(other))), 1)
    assert (plan.feature_architecture.hidden_size, plan.architecture.hidden_size) == (32, 16)
    (other / "config.json").write_text(json.dumps(inputs.model_fields | {"vocab_size": 101}))
    (line,) = found_problems(inputs, ebft__feature_model=str(other))
    assert "ebft.feature_model: found a vocabulary of 101 tokens; expected 100 tokens" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ebft__n_samples_per_prompt": 1}, "the advantage is the reward itself"),
        ({"ebft__n_samples_per_prompt": 2}, "has no baseline"),
        ({"train__warmup_steps": 10}, "never gets to train.lr"),
    ],
)
def test_notes(inputs, changes, words):
    (note,) = check_run(load_config(inputs.write(**changes)), 1).notes
    assert words in note


def test_note_on_evaluating_the_training_data(inputs):
    path = inputs.write(evaluation__shards=str(inputs.root / "train"))
    assert "nothing is held out" in check_run(load_config(path), 1).notes[0]


def test_no_sampling_notes_without_rollouts(inputs):
    path = inputs.write(ebft__n_samples_per_prompt=1, ebft__rl_coef=0, ebft__ce_coef=1)
    assert check_run(load_config(path), 1).notes == ()
