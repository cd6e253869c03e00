"""Checks against processes and files: everything at once, naming key, file, found and expected."""

import itertools
import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.errors import ConfigError, InputError
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.planning.data_budget import allowed_skipped_rows
from ebft_mega.planning.dry_run import describe_run
from ebft_mega.planning.run_plan import check_run, check_world
from tests.unit.conftest import write_weights


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
    (source,) = plan.train_rows.sources
    assert source.manifest.tokens == 100 + 300 + 199 + 57 + 4
    assert (source.rows, source.epochs, plan.train_rows.total_rows) == (80, 80 * 32 / 660, None)
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
        "(train.micro_batch_size 2 x data-parallel size 3), or tensor 1 with pipeline 3"
    )


def test_degrees_that_do_not_multiply_to_the_world_size(inputs):
    degrees = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    config = load_config(inputs.write(parallel=degrees))
    assert check_world(config, 4).data_parallel == 1
    assert found_problems(inputs, 2, parallel=degrees) == [
        "run.yaml:14: parallel: found tensor 2 x pipeline 2 = 4 processes per replica; expected a divisor of the "
        "world size 2; with this batch: tensor 1 with pipeline 1 or 2; tensor 2 with pipeline 1"
    ]
    # 6 processes: 3 stages of 2 replicas (or 3 of two slices), because 8 rows go into neither 3 nor 6 replicas.
    assert found_problems(inputs, 6, parallel=degrees) == [
        "run.yaml:14: parallel: found tensor 2 x pipeline 2 = 4 processes per replica; expected a divisor of the "
        "world size 6; with this batch: tensor 1 with pipeline 3; tensor 2 with pipeline 3"
    ]
    (line,) = found_problems(inputs, 7, parallel=degrees)
    assert line.endswith("expected a divisor of the world size 7; with this batch: none")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_the_choices_that_are_named_are_those_that_pass(inputs, world_size):
    """Every layout of this many processes, tried out."""
    plan = check_run(load_config(inputs.write()), 1)
    passed = {}
    for tensor, pipeline in itertools.product(range(1, world_size + 1), repeat=2):
        parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        config = load_config(inputs.write(parallel=parallel))
        try:
            check_world(config, world_size, [plan.architecture])
        except ConfigError:
            continue
        passed.setdefault(tensor, []).append(pipeline)
    config = load_config(inputs.write(parallel={"tensor_parallel_size": 5, "pipeline_parallel_size": 5}))
    with pytest.raises(ConfigError) as caught:
        check_world(config, world_size, [plan.architecture])
    (problem,) = [problem for problem in caught.value.problems if problem.key == "parallel"]
    named = {}
    for choice in problem.expected.partition("with this batch: ")[2].split("; "):
        if choice != "none":
            tensor, *pipelines = map(int, re.findall(r"\d+", choice))
            named[tensor] = pipelines
    assert named == passed


def test_degrees_that_fit_neither_heads_nor_layers(inputs):
    parallel = {"tensor_parallel_size": 3, "pipeline_parallel_size": 5}
    assert found_problems(inputs, 15, parallel=parallel) == [
        "run.yaml:15: parallel.tensor_parallel_size: found 3: num_attention_heads 4 is not divisible by 3, "
        "hidden_size 16 is not divisible by 3, vocabulary blocks 64 is not divisible by 3, num_key_value_heads 2 is "
        "neither a multiple nor a divisor of 3; expected 1, 2 or 4, as heads, widths and vocabulary allow",
        "run.yaml:16: parallel.pipeline_parallel_size: found 5 stages for 4 layers; expected at most 4",
    ]


def test_the_feature_model_is_cut_by_the_same_degrees(inputs):
    other = inputs.root / "features"
    fields = {"model_type": "mistral", "hidden_size": 18, "head_dim": 4}
    write_weights(other, **fields)
    (other / "config.json").write_text(json.dumps(inputs.model_fields | fields))
    changes = {"ebft__feature_model": str(other)}
    check_run(load_config(inputs.write(**changes, parallel={"tensor_parallel_size": 2})), 2)
    (line,) = found_problems(inputs, 4, **changes, parallel={"tensor_parallel_size": 4})
    assert "found 4: hidden_size 18 is not divisible by 4; expected 1 or 2, as heads" in line


def test_notes_on_a_pipeline_that_waits(inputs):
    changes = {"parallel": {"pipeline_parallel_size": 4}, "train__micro_batch_size": 4}
    idle, feature_layers = check_run(load_config(inputs.write(**changes)), 4).notes
    assert idle == (
        "A replica has fewer micro-batches (2) than pipeline stages (4): a stage is idle for 50 % of the rollout "
        "phase and 60 % of the gradient pass."
    )
    assert feature_layers == "The feature network has 3 layers for 4 pipeline stages: the last have none."
    changes["train__micro_batch_size"] = 2
    assert check_run(load_config(inputs.write(**changes)), 4).notes == (feature_layers,)
    changes["parallel"] = {"pipeline_parallel_size": 3}  # as many as the feature network has layers
    assert check_run(load_config(inputs.write(**changes)), 3).notes == ()


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
            ("run.yaml:3: model.init_from: model: weights: found none; expected model.safetensors",),
            ("run.yaml:11: train.global_batch_size",),
            ("run.yaml:5: data.shards: ", shard.name),
            ("run.yaml:8: evaluation.shards: held_out: ", "no such directory"),
        ),
        strict=True,
    ):
        assert all(word in line for word in words), line


def test_model_directory_missing(inputs):
    (line,) = found_problems(inputs, model__init_from="nowhere")
    assert line.startswith(f"run.yaml:3: model.init_from: found no directory {REPOSITORY}/nowhere;")


def test_the_output_is_no_folder_of_an_input(inputs):
    for key, name in (("model__init_from", "model"), ("data__shards", "train"), ("ebft__feature_model", "model")):
        place = inputs.root / name
        (inputs.root / "link").unlink(missing_ok=True)
        (inputs.root / "link").symlink_to(place)
        (line,) = found_problems(inputs, output_dir=str(inputs.root / "link"), **{key: str(place)})
        assert f"output_dir: found link, which is {key.replace('__', '.')}" in line or "model.init_from and" in line
    inside = load_config(inputs.write(output_dir=str(inputs.root / "model" / "run")))
    assert check_run(inside, 1).total_steps == 10


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
        ({"model_type": "gpt2"}, "one of llama, mistral, qwen2, qwen3"),
        ({"vocab_size": 50}, "no token id outside the model's vocabulary of 50"),
    ],
)
def test_model_config_that_cannot_be_used(inputs, changes, words):
    (inputs.root / "model" / "config.json").write_text(json.dumps(inputs.model_fields | changes))
    write_weights(inputs.root / "model", **{key: value for key, value in changes.items() if key == "vocab_size"})
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


def copy_as_feature_model(inputs, **fields):
    """The model once more, as a feature model."""
    other = inputs.root / "features"
    shutil.copytree(inputs.root / "model", other)
    (other / "config.json").write_text(json.dumps(inputs.model_fields | fields))
    return {"ebft__feature_model": str(other)}


def test_the_feature_model_has_the_tokenizer_of_the_data_too(inputs):
    changes = copy_as_feature_model(inputs)
    assert check_run(load_config(inputs.write(**changes)), 1).notes == ()
    inputs.add_tokenizer("features", '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": ["a b"]}}')
    lines = found_problems(inputs, **changes)
    assert [line.split(": found")[0] for line in lines] == [
        "run.yaml:5: data.shards",
        "run.yaml:8: evaluation.shards",
    ]
    assert all("the tokenizer of features, sha256" in line and "(ebft.feature_model)" in line for line in lines)
    assert all("the model's has BPE beside None, 2 tokens beside 0, 2 of them" in line for line in lines)
    # Also where the policy's weights are random, and there is no tokenizer to compare them with.
    random = {"model__init_from": None, "model__config": inputs.model_fields}
    assert len(found_problems(inputs, **changes, **random)) == 2


@pytest.mark.parametrize("key", ["model", "features"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: found 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor: found no such"),
        ({"rope_theta": None}, "rope_theta: found None"),
        ({"query_pre_attn_scalar": 16}, "query_pre_attn_scalar: found 16"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 16}, "at most the 16 tokens of the model's sliding_window"),
        (
            {"model_type": "mistral", "sliding_window": None, "attention_dropout": 0.1, "auto_map": {"x": "y"}},
            "auto_map: found",
        ),
    ],
)
def test_what_is_checked_of_the_policy_is_checked_of_the_feature_model(inputs, key, fields, words):
    changes = copy_as_feature_model(inputs)
    (inputs.root / key / "config.json").write_text(json.dumps(inputs.model_fields | fields))
    lines = found_problems(inputs, **changes)
    assert any(words in line for line in lines)
    option = {"model": "model.init_from", "features": "ebft.feature_model"}[key]
    assert all(option in line for line in lines)


def test_weights_and_files_of_both_models_are_checked(inputs):
    changes = copy_as_feature_model(inputs)
    for name in ("model", "features"):
        path = inputs.root / name / "model.safetensors"
        save_file({**load_file(path), "vision.weight": np.ones(2, np.float32)}, path)
        (inputs.root / name / "tokenizer_config.json").write_text("junk")
    lines = found_problems(inputs, **changes)
    assert [line.split(": ")[1:3] for line in lines] == [
        ["model.init_from", "model/model.safetensors"],
        ["model.init_from", "model/tokenizer_config.json:1"],
        ["ebft.feature_model", "features/model.safetensors"],
        ["ebft.feature_model", "features/tokenizer_config.json:1"],
    ]


def test_notes_on_models(inputs):
    """The dry run prints them, and so does the start: both show the notes of the plan."""
    changes = copy_as_feature_model(inputs, eos_token_id=[5, 6], attention_dropout=0.1)
    path = inputs.root / "model" / "model.safetensors"
    head = {"lm_head.weight": np.zeros((100, 16), np.float32)}
    save_file({**load_file(path), **head}, path)
    (inputs.root / "features" / "tokenizer.json").unlink()
    plan = check_run(load_config(inputs.write(**changes)), 1)
    assert not plan.architecture.tie_word_embeddings and plan.feature_architecture.tie_word_embeddings
    beginnings = [
        "model.init_from: lm_head.weight differs from model.embed_tokens.weight",
        "ebft.feature_model: attention_dropout 0.1 is not applied",
        "ebft.feature_model: there is no tokenizer in ",
        "data.shards: documents end with token 0, but the eos_token_id of the model in ebft.feature_model is 5 or 6.",
        "evaluation.shards: documents end with token 0, but the eos_token_id of the model in ebft.feature_",
    ]
    assert len(plan.notes) == len(beginnings)
    for note, beginning in zip(plan.notes, beginnings, strict=True):
        assert note.startswith(beginning)
        assert note in describe_run(load_config(inputs.write(**changes)), plan)


def test_a_begin_that_the_models_tokenizer_adds_and_the_data_lacks_is_a_note(inputs):
    config = {"eos_token": "a", "bos_token": "<s>", "add_bos_token": True}
    (inputs.root / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    notes = check_run(load_config(inputs.write()), 1).notes
    begin = "documents begin with their text, but the tokenizer of the model in model.init_from puts '<s>' before it"
    assert [note.partition(" (")[0] for note in notes if "puts" in note] == [
        f"data.shards: {begin}",
        f"evaluation.shards: {begin}",
    ]


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
    write_weights(other, hidden_size=32)
    (other / "config.json").write_text(json.dumps(inputs.model_fields | {"hidden_size": 32}))
    plan = check_run(load_config(inputs.write(ebft__feature_model=str(other))), 1)
    assert (plan.feature_architecture.hidden_size, plan.architecture.hidden_size) == (32, 16)
    write_weights(other, vocab_size=101)
    (other / "config.json").write_text(json.dumps(inputs.model_fields | {"vocab_size": 101}))
    (line,) = found_problems(inputs, ebft__feature_model=str(other))
    assert "ebft.feature_model: found a vocabulary of 101 tokens; expected 100 tokens" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ebft__n_samples_per_prompt": 1}, "the advantage is the reward itself"),
        ({"ebft__n_samples_per_prompt": 2}, "has no baseline"),
        ({"data__max_skipped_rows": 7}, "data.max_skipped_rows changes nothing: data.on_error is raise"),
        ({"train__warmup_steps": 10}, "train.warmup_steps 10 reaches to the end of the run (10 steps): the learning"),
        (
            {"train__warmup_share": 0.91},
            "train.warmup_share 0.91 reaches to the end of the run (10 steps): the learning",
        ),
        ({"zero": {"stage": 2, "hold_parameters": "step"}}, "hold_parameters step changes nothing"),
        ({"zero__feature_network": "sharded", "ebft": {"rl_coef": 0, "ce_coef": 1}}, "there is no feature network"),
        ({"learn__reuse_rollout": "activations", "ebft": {"rl_coef": 0, "ce_coef": 1}}, "there are no rollouts"),
        ({"learn__reuse_rollout": "checkpoints", "ebft": {"rl_coef": 0, "ce_coef": 1}}, "there are no rollouts"),
    ],
)
def test_notes(inputs, changes, words):
    (note,) = check_run(load_config(inputs.write(**changes)), 1).notes
    assert words in note


def test_what_a_run_writes_for_its_defaults_is_no_note(inputs, tmp_path):
    config = load_config(inputs.write())
    written = tmp_path / "config.resolved.yaml"
    written.write_text(resolved_yaml(config), encoding="utf-8")
    again = load_config(written)
    assert "max_skipped_rows" in again.data.model_fields_set
    assert check_run(again, 1).notes == check_run(config, 1).notes == ()


def test_note_on_evaluating_the_training_data(inputs):
    path = inputs.write(evaluation__shards=str(inputs.root / "train"))
    assert "nothing is held out" in check_run(load_config(path), 1).notes[0]


def test_no_sampling_notes_without_rollouts(inputs):
    path = inputs.write(ebft__n_samples_per_prompt=1, ebft__rl_coef=0, ebft__ce_coef=1)
    assert check_run(load_config(path), 1).notes == ()


SOURCES = {"a": {"shards": "train", "weight": 3}, "b": {"shards": "held_out", "max_epochs": 2.5}}


def with_sources(inputs, sources=SOURCES, **changes):
    """A configuration with several sources; paths are below the inputs."""
    placed = {name: {**keys, "shards": str(inputs.root / keys["shards"])} for name, keys in sources.items()}
    return load_config(inputs.write(data={"sources": placed, "sequence_length": 32}, **changes))


def test_sources_share_the_rows_until_one_ends(inputs):
    plan = check_run(with_sources(inputs, train__max_steps=100), world_size=2)
    a, b = plan.train_rows.sources
    cap = int(2.5 * 279) // 32
    assert (a.key, b.key, a.share, b.share) == ("data.sources.a.shards", "data.sources.b.shards", 0.75, 0.25)
    assert (a.rows, b.rows, plan.train_rows.total_rows) == (800 - cap, cap, None)
    assert b.epochs == cap * 32 / 279 and b.tail_tokens == int(2.5 * 279) % 32
    assert any(f"data.sources.b.shards: the last {b.tail_tokens} tokens within max_epochs" in n for n in plan.notes)
    assert any("a training dataset itself (data.sources.b.shards)" in note for note in plan.notes)
    text = describe_run(with_sources(inputs, train__max_steps=100), plan)
    assert "epochs of b" in text and f"25.00% of the rows: {cap}" in text


def test_weights_are_taken_as_they_are_written(inputs):
    """Seven tenths and three tenths; as binary numbers they would repeat after 2**54 rows."""
    weights = {"a": {"shards": "train", "weight": 0.7}, "b": {"shards": "held_out", "weight": 0.3}}
    shares = [source.share for source in check_run(with_sources(inputs, weights), 1).train_rows.sources]
    assert shares == [Fraction(7, 10), Fraction(3, 10)]


def test_everything_wrong_with_the_sources_comes_at_once(inputs):
    inputs.add_tokenizer("other", '{"model": {"type": 2}}')
    inputs.add_dataset("foreign", "other", [400])
    sources = {"a": {"shards": "nowhere"}, "b": {"shards": "gone"}, "c": {"shards": "foreign"}}
    lines = problems_of(with_sources(inputs, sources))
    assert len([line for line in lines if "no such directory" in line]) == 2
    assert "data.sources.a.shards" in lines[0] and "data.sources.b.shards" in lines[1]
    lines = problems_of(with_sources(inputs, {"a": {"shards": "train"}, "c": {"shards": "foreign"}}))
    assert any("data.sources" in line and "the tokenizer of source a" in line for line in lines)
    lines = problems_of(with_sources(inputs, {"a": {"shards": "train"}, "b": {"shards": "train"}}))
    assert any("each dataset once" in line for line in lines)
    uneven = {"a": {"shards": "train", "weight": 0.123457}, "b": {"shards": "held_out", "weight": 1}}
    assert any("repeat within 10000 rows, such as" in line for line in problems_of(with_sources(inputs, uneven)))


def test_sources_that_end_before_the_run(inputs):
    sources = {"a": {"shards": "train", "max_epochs": 1}, "b": {"shards": "held_out", "max_epochs": 2}}
    (line,) = problems_of(with_sources(inputs, sources))
    assert "data.sources: found 37 rows of 32 tokens" in line and "at least the 80 rows of the run" in line
    assert check_run(with_sources(inputs, sources, train__max_steps=4), 1).train_rows.total_rows == 37


def problems_of(config):
    """What `check_run` finds wrong."""
    with pytest.raises(InputError) as caught:
        check_run(config, 1)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("rows", "share", "allowed"), [(100, 0.001, 0), (100, 0.1, 8), (7, 1.0, 7), (100, 0.0, 0)])
def test_the_budget_for_damaged_rows_is_the_smaller_of_number_and_share(inputs, rows, share, allowed):
    data = {"data__max_skipped_rows": rows, "data__max_skipped_share": share, "data__on_error": "skip"}
    config = load_config(inputs.write(**data))
    assert allowed_skipped_rows(config) == allowed
    assert any("allows no row of this run's 80" in note for note in check_run(config, 1).notes) == (not allowed)


def test_rows_that_are_left_out_are_counted_and_lie_within_the_run(inputs):
    config = load_config(inputs.write(data__skip_rows=[[0, 7], [70, 79]]))
    plan = check_run(config, 1)
    assert plan.notes == ("data.skip_rows leaves out 18 of the run's 80 rows: they are filler.",)
    assert re.search(r"rows that data.skip_rows turns into filler +18\n", describe_run(config, plan))
    (line,) = found_problems(inputs, data__skip_rows=[[0, 7], [70, 80]])
    assert re.fullmatch(r"run.yaml:\d+: data.skip_rows: found \[70, 80\]; expected row numbers below 80, .*", line)
    (inputs.root / "output" / "checkpoints").mkdir(parents=True)
    assert check_run(load_config(inputs.write(data__skip_rows=[[0, 80]], output_dir=str(inputs.root / "output"))), 1)
    (line,) = found_problems(
        inputs, data__skip_rows=[[0, 80]], output_dir=str(inputs.root / "output"), checkpoint={"resume": "never"}
    )
    assert "below 80" in line


@pytest.mark.parametrize("ranges", [[[0, 79]], [[0, 7], [8, 79]]])
def test_a_run_of_which_every_row_is_left_out_is_refused(inputs, ranges):
    (line,) = found_problems(inputs, data__skip_rows=ranges)
    expected = "data.skip_rows: found all 80 rows of the run; expected at least one row that is trained on"
    assert re.fullmatch(rf"run.yaml:\d+: {expected}", line.rpartition("/")[2])
    assert check_run(load_config(inputs.write(data__skip_rows=[[0, 78]])), 1)


def test_text_shards_need_a_tokenizer(inputs, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.tar").write_bytes(bytes(1024))
    fields = {"model__init_from": None, "model__config": dict(inputs.model_fields), "evaluation__shards": None}
    (line,) = problems_of(load_config(inputs.write(data__shards=str(texts), **fields)))
    assert "data.tokenizer: found not set; expected a tokenizer directory" in line


def test_resume_from_what_is_not_there(inputs):
    (line,) = found_problems(inputs, checkpoint={"resume": "runs/gone"})
    assert f"checkpoint.resume: found '{REPOSITORY}/runs/gone', which is no directory; expected auto, never or" in line


def test_rows_longer_than_a_sliding_window(inputs):
    fields = inputs.model_fields | {"model_type": "mistral", "sliding_window": 16}
    (inputs.root / "model" / "config.json").write_text(json.dumps(fields))
    (line,) = found_problems(inputs)
    assert "data.sequence_length: found 32 tokens; expected at most the 16 tokens of the model's sliding_window" in line


def test_notes_on_retention_without_effect(inputs):
    assert check_run(load_config(inputs.write(checkpoint={"keep_every": 5})), 1).notes == (
        "checkpoint.keep_every changes nothing: without checkpoint.keep_last all checkpoints are kept.",
    )
