"""Directories from anywhere: what is fine is rewritten bit for bit, what is not is named, and nothing is executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ebft_mega.apps.convert.importing import import_model
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError
from ebft_mega.model.weights.weight_sources import RandomWeights, SafetensorsWeights
from tests.conftest import tiny_config
from tests.unit.planted import Bomb
from tests.unit.written_checkpoint import write_checkpoint

KINDS = [(kind, tied) for kind in ("llama", "mistral", "qwen2", "qwen3") for tied in (True, False)]


def saved_model(directory: Path, kind: str = "llama", tied: bool = True, dtype=torch.float32) -> dict:
    """A random model as transformers saves it; its tensors."""
    fields = {key: value for key, value in tiny_config(kind, tied).items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).to(dtype)
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def imported(directory: Path, dtype=None, shard_bytes=10**9) -> dict:
    output = directory.with_name("imported")
    import_model(directory, output, dtype, shard_bytes)
    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def problems_of(directory: Path, dtype=None) -> list[str]:
    output = directory.with_name("refused")
    with pytest.raises(InputError) as caught:
        import_model(directory, output, dtype, 10**9)
    assert not output.exists()
    assert {path.name for path in directory.parent.iterdir()} <= {directory.name, "imported", "exploded"}
    return [f"{problem.key}: {problem.found}" for problem in caught.value.problems]


def change(directory: Path, name: str, **fields) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saved_comes_in_bit_for_bit(tmp_path, kind, tied, dtype):
    given = saved_model(tmp_path / "given", kind, tied, dtype)
    found = imported(tmp_path / "given", shard_bytes=20_000)
    assert found.keys() == given.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], given[name]) for name in given)
    assert len(list((tmp_path / "imported").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "imported", dtype="auto")
    assert again.dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_one_asked_for(tmp_path, dtype):
    given = saved_model(tmp_path / "given")
    found = imported(tmp_path / "given", dtype)
    assert all(torch.equal(found[name], given[name].to(getattr(torch, dtype))) for name in given)


def test_several_dtypes_become_one(tmp_path):
    given = saved_model(tmp_path / "given", dtype=torch.bfloat16)
    given["model.norm.weight"] = given["model.norm.weight"].float() + 1e-5
    save_file(given, tmp_path / "given" / "model.safetensors")
    found = imported(tmp_path / "given")
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], given[name].float()) for name in given)


def test_float64_comes_in_as_float32(tmp_path):
    given = saved_model(tmp_path / "given", dtype=torch.float64)
    found = imported(tmp_path / "given")
    assert all(torch.equal(found[name], given[name].float()) for name in given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    given = saved_model(tmp_path / "given")
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        given[name].view(-1)[-1] = value
    save_file(given, tmp_path / "given" / "model.safetensors")
    assert problems_of(tmp_path / "given") == [
        "model.layers.2.mlp.up_proj.weight: values that are infinite or no numbers",
        "model.norm.weight: values that are infinite or no numbers",
    ]


def test_values_that_the_dtype_cannot_hold_are_named(tmp_path):
    given = saved_model(tmp_path / "given")
    given["model.norm.weight"][3] = -70_000.0
    save_file(given, tmp_path / "given" / "model.safetensors")
    assert problems_of(tmp_path / "given", "float16") == ["model.norm.weight: values beyond the range of float16"]
    imported(tmp_path / "given", "bfloat16")


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    directory = tmp_path / "given"
    given = saved_model(directory)
    del given["model.layers.0.mlp.up_proj.weight"]
    given["model.norm.weight"] = given["model.norm.weight"].to(torch.int8)
    save_file(given, directory / "model.safetensors")
    change(directory, "generation_config.json", custom={"auto_map": {"generate": "x.y"}})
    change(directory, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    (directory / "special_tokens_map.json").write_text("[]")
    (directory / "tokenizer.json").write_text("{}")
    assert problems_of(directory) == [
        "model.layers.0.mlp.up_proj.weight: no such tensor",
        "model.norm.weight: dtype I8",
        'custom.auto_map: {"generate": "x.y"}',
        'auto_map: {"AutoTokenizer": ["x.Y", null]}',
        "special_tokens_map.json: a JSON list",
        "tokenizer.json: a JSON object without a model",
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "someone/kernels"},
        {"attn_implementation": "someone/kernels"},
        {"deeper": {"still": {"auto_map": {"x": "y"}}}},
    ],
)
def test_a_configuration_that_names_code_is_refused(tmp_path, fields):
    saved_model(tmp_path / "given")
    change(tmp_path / "given", "config.json", **fields)
    (problem,) = problems_of(tmp_path / "given")
    assert problem.partition(":")[0].split(".")[-1] in {*fields, "auto_map"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type: 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters.rope_theta: None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ],
)
def test_settings_that_the_layers_do_not_compute_are_refused(tmp_path, fields, problem):
    saved_model(tmp_path / "given")
    change(tmp_path / "given", "config.json", **fields)
    assert problems_of(tmp_path / "given") == [problem]


def test_a_tied_head_that_differs_comes_in_as_a_head_of_its_own(tmp_path):
    given = saved_model(tmp_path / "given")
    given["lm_head.weight"] = torch.randn_like(given["model.embed_tokens.weight"])
    save_file(given, tmp_path / "given" / "model.safetensors", metadata={"format": "pt"})
    result = import_model(tmp_path / "given", tmp_path / "imported", None, 10**9)
    assert "note: lm_head.weight differs from model.embed_tokens.weight" in str(result)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "imported")
    assert torch.equal(again.lm_head.weight, given["lm_head.weight"]) and not again.config.tie_word_embeddings
    assert torch.equal(again.model.embed_tokens.weight, given["model.embed_tokens.weight"])


def test_planted_code_and_pickles_are_neither_run_nor_copied(tmp_path):
    directory, mark = tmp_path / "given", tmp_path / "exploded"
    saved_model(directory)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("modeling_llama.py", "configuration_llama.py", "conftest.py"):
        (directory / name).write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    result = import_model(directory, tmp_path / "imported", None, 10**9)
    assert not mark.exists()
    kept = {path.name for path in (tmp_path / "imported").iterdir()}
    assert kept == {"config.json", "generation_config.json", "model.safetensors"}
    note = result.notes[0]
    assert all(name in note for name in ("pytorch_model.bin", "training_args.bin", "modeling_llama.py"))
    # With pickled weights alone there is nothing to import.
    (directory / "model.safetensors").unlink()
    assert problems_of(directory)[0] == "weights: adapter_model.bin, pytorch_model.bin, training_args.bin"
    assert not mark.exists()


def test_what_a_trainer_leaves_beside_a_model_is_no_obstacle(tmp_path):
    directory = tmp_path / "given"
    saved_model(directory)
    (directory / "trainer_state.json").write_text('{"log_history": [{"grad_norm": NaN}]}')
    (directory / "all_results.json").write_text('{"eval_loss": Infinity}')
    (directory / "epochs.json").write_text("3\n")
    (note,) = [note for note in import_model(directory, tmp_path / "imported", None, 10**9).notes if "left out" in note]
    assert "trainer_state.json (no JSON (NaN, which is not JSON))" in note and "epochs.json (a JSON int)" in note
    kept = {path.name for path in (tmp_path / "imported").iterdir()}
    assert kept == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "given").mkdir()
    assert problems_of(tmp_path / "given") == ["config.json: no such file", "weights: none"]


def test_a_checkpoint_is_for_export(tmp_path):
    architecture = Architecture.from_hf(tiny_config("llama", num_hidden_layers=1), "test")
    folder = write_checkpoint(tmp_path / "checkpoints", architecture, RandomWeights(architecture, 1))
    with pytest.raises(InputError, match="see export"):
        import_model(folder, tmp_path / "out", None, 10**9)


def test_an_import_can_be_imported_again(tmp_path):
    saved_model(tmp_path / "given", "qwen3", tied=False)
    first = imported(tmp_path / "given", "bfloat16")
    import_model(tmp_path / "imported", tmp_path / "again", None, 10**9)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    architecture = Architecture.from_directory(tmp_path / "again")
    assert SafetensorsWeights(tmp_path / "again", architecture).dtypes.keys() == hf_shapes(architecture).keys()
