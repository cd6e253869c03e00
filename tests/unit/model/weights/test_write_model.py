"""Model directories: complete or not at all, cut into files as planned, and no more than one tensor in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError
from ebft_mega.model.weights import model_directory
from ebft_mega.model.weights.model_directory import plan_shards, write_model
from ebft_mega.model.weights.weight_sources import RandomWeights, SafetensorsWeights
from tests.conftest import tiny_config
from tests.memory import peak_tensor_bytes

ARCHITECTURE = Architecture.from_hf(tiny_config("qwen2", tied=False), "test")


def tensors_of(architecture: Architecture, seed: int = 1):
    source = RandomWeights(architecture, seed)
    return ((name, source.tensor(name)) for name in hf_shapes(architecture))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    shard_bytes=st.integers(1, 200),
)
def test_a_plan_fills_files_in_order(sizes, shard_bytes):
    shapes = {f"t{number}": (size,) for number, size in enumerate(sizes)}
    shards = plan_shards(shapes, torch.bfloat16, shard_bytes)
    assert [name for shard in shards for name in shard.tensors] == list(shapes)
    assert len({shard.name for shard in shards}) == len(shards)
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        size = sum(spec.num_bytes for spec in shard.tensors.values())
        assert size <= shard_bytes or len([spec for spec in shard.tensors.values() if spec.num_bytes]) == 1
        if following is not None:
            first = next(iter(following.tensors.values()))
            assert size + first.num_bytes > shard_bytes, "the next tensor would have had room"
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
    else:
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_everything_that_was_given_is_there(tmp_path, dtype, shard_bytes):
    write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), dtype, shard_bytes=shard_bytes)
    expected = {name: tensor.to(dtype) for name, tensor in tensors_of(ARCHITECTURE)}
    loaded = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        loaded |= load_file(path)
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], expected[name]) for name in expected)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    if shard_bytes == 10**9:
        assert not index.exists()
    else:
        total = sum(tensor.nbytes for tensor in expected.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
    SafetensorsWeights(tmp_path / "hf", ARCHITECTURE)
    # transformers takes the dtype from the configuration.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == dtype
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_the_configuration_says_what_missing_keys_were_taken_for(tmp_path):
    """They are taken for transformers' own defaults: for Qwen3 32 key-value heads, heads of 128."""
    fields = tiny_config("qwen3", dtype="float16", torch_dtype="float16", num_attention_heads=32)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        del fields[name]
    architecture = Architecture.from_hf(fields, "test")
    write_model(tmp_path / "hf", architecture, tensors_of(architecture), torch.bfloat16)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    found = (written["num_key_value_heads"], written["head_dim"], written["max_position_embeddings"])
    assert found == (32, 128, 32768)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == found
    assert config.dtype == torch.bfloat16
    assert config.architectures == ["Qwen3ForCausalLM"]
    again = Architecture.from_directory(tmp_path / "hf")
    assert again.layer_parameters == architecture.layer_parameters
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_generation_config_and_tokenizer_come_along(tmp_path):
    given = tmp_path / "given"
    GenerationConfig(temperature=0.7, do_sample=True, max_new_tokens=5).save_pretrained(given)
    (given / "tokenizer.json").write_text("{}")
    (given / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    write_model(
        *(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32),
        described_by={name: (given / name).read_bytes() for name in names}
        | {"additional_chat_templates/a.jinja": b"a"},
    )
    assert (tmp_path / "hf" / "additional_chat_templates" / "a.jinja").read_bytes() == b"a"
    shutil.rmtree(tmp_path / "hf" / "additional_chat_templates")
    found = contents(tmp_path / "hf")
    assert found.keys() == names | {"config.json", "model.safetensors"}
    assert {name: found[name] for name in names} == {name: (given / name).read_bytes() for name in names}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.temperature == 0.7


WRONG = {
    "missing": (lambda pairs: pairs[:-1], "lm_head.weight has not come"),
    "in between": (lambda pairs: pairs[:3] + pairs[4:], "comes where model.layers.0.self_attn.q_proj.weight was"),
    "extra": (lambda pairs: [*pairs, ("extra", torch.zeros(2))], "extra comes after the last"),
    "misshapen": (lambda pairs: [(pairs[0][0], pairs[0][1][1:]), *pairs[1:]], r"float32 \(130, 32\), announced"),
    "out of order": (lambda pairs: [pairs[1], pairs[0], *pairs[2:]], "comes where model.embed_tokens.weight"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_of_another_model_leave_the_old_directory_as_it_was(tmp_path, wrong):
    write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32)
    before = contents(tmp_path / "hf")
    change, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words):
        write_model(tmp_path / "hf", ARCHITECTURE, change(list(tensors_of(ARCHITECTURE, 2))), torch.float32)
    assert contents(tmp_path / "hf") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"], "the unfinished directory is removed"
    write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE, 2), torch.float32)
    assert contents(tmp_path / "hf") != before


def test_a_full_disk_leaves_the_old_directory_as_it_was(tmp_path, monkeypatch):
    write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32)
    before = contents(tmp_path / "hf")

    class FullDisk(model_directory.TensorFileWriter):
        def write(self, name, tensor):
            if name == "model.norm.weight":
                raise OSError(28, "No space left on device")
            super().write(name, tensor)

    monkeypatch.setattr(model_directory, "TensorFileWriter", FullDisk)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE, 2), torch.float32)
    assert contents(tmp_path / "hf") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_what_is_no_model_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="other files"):
        write_model(tmp_path / "thesis", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32)
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"years of work"}
    write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32, overwrite=False)
    with pytest.raises(InputError, match="an earlier result"):
        write_model(tmp_path / "hf", ARCHITECTURE, tensors_of(ARCHITECTURE), torch.float32, overwrite=False)


def test_no_more_than_one_tensor_is_kept(tmp_path):
    """Sixty tensors of 64 KiB in files of a megabyte: live are the one that was made and its narrower copy."""
    architecture = Architecture.from_hf(
        tiny_config("llama", vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=8, head_dim=32)
        | {"num_key_value_heads": 4},
        "test",
    )
    one = 128 * 128 * 4
    tensors = ((name, torch.zeros(shape)) for name, shape in hf_shapes(architecture).items())
    _, peak = peak_tensor_bytes(
        lambda: write_model(tmp_path / "hf", architecture, tensors, torch.bfloat16, shard_bytes=2**20)
    )
    assert one <= peak <= 1.5 * one + 4096
