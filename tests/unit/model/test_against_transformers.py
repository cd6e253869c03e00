"""Logits, hidden states and gradients equal to transformers', for every architecture, tied and untied."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError
from ebft_mega.model.head import ScoredTokens
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import ReadRows, StridedLayout
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.stage_weights import hf_tensors, load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights, SafetensorsWeights
from tests.conftest import tiny_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = [
    tiny_config("llama"),
    tiny_config("llama", tied=False),
    tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    tiny_config("mistral"),
    tiny_config("mistral", tied=False, sliding_window=None),
    tiny_config("qwen2"),
    tiny_config("qwen2", tied=False),
    tiny_config("qwen3"),
    tiny_config("qwen3", tied=False),
]
IDS = [
    *("llama", "llama-untied", "llama3-rope", "mistral", "mistral-untied"),
    *("qwen2", "qwen2-untied", "qwen3", "qwen3-untied"),
]


def random_hf_model(config: dict) -> torch.nn.Module:
    """A transformers model in which every parameter, biases and norms too, is random."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return model.eval()


@pytest.mark.parametrize("config", MODELS, ids=IDS)
def test_import_equals_transformers(config, groups, tmp_path):
    reference = random_hf_model(config)
    reference.save_pretrained(tmp_path / "model")
    architecture = Architecture.from_directory(tmp_path / "model")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, SafetensorsWeights(tmp_path / "model", architecture))

    tokens = torch.randint(0, config["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    expected = reference(tokens, output_hidden_states=True)
    layout, positions = document_layout(stage, 40, num_rows=2), torch.arange(40).repeat(2)
    hidden = stage.hidden_states(tokens.view(1, -1), positions, layout)[:, 0]
    logits = stage.logits(hidden).view(2, 40, -1)
    assert (logits - expected.logits).abs().max() <= 1e-4
    assert expected.logits.abs().max() > 1.0

    read = ReadRows((3, 17, 39), 0, torch.tensor([3, 17, 39, 43, 57, 79]))
    for last in (1, 3, 4):
        with torch.no_grad():
            taps = tuple(depth for depth in (1, 3, 4) if depth <= last)
            _, rows = cut_after(stage, last).tapped_rows(tokens.view(1, -1), positions, layout, read, taps)
        for depth, tap in zip(taps, rows, strict=True):
            wanted = expected.hidden_states[depth][:, [3, 17, 39]]
            torch.testing.assert_close(tap.view(2, 3, -1), wanted, atol=1e-4, rtol=1e-4)

    weight = torch.randn(expected.logits.shape, generator=torch.Generator().manual_seed(1))
    choices = torch.arange(config["vocab_size"]).expand(80, -1)
    scored = ScoredTokens(choices, torch.ones(80, dtype=torch.float64))
    logprobs = stage.logprobs(hidden, scored).view(2, 40, -1)
    (logprobs * weight).sum().backward()
    (expected.logits.log_softmax(-1) * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    compared = dict(hf_tensors(gradients.items(), stage))
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max()
        assert (compared[name] - parameter.grad).abs().max() <= 1e-4 * scale, name
    assert set(compared) == set(hf_shapes(architecture)) == {name for name, _ in reference.named_parameters()}


def document_layout(stage: Stage, length: int, num_rows: int = 1) -> StridedLayout:
    """Plain causal attention over a document of each row, without rollouts."""
    return StridedLayout(num_rows, (), length, (), 0, stage.attention)


def cut_after(stage: Stage, depth: int) -> Stage:
    """The same weights without the layers behind a depth."""
    cut = copy.copy(stage)
    cut._modules = dict(stage._modules, layers=stage.layers[:depth])
    return cut


@pytest.mark.parametrize("config", MODELS, ids=IDS)
def test_export_loads_with_transformers(config, groups, tmp_path):
    architecture = Architecture.from_hf(config, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, seed=3))
    # A shard limit of 8 KiB makes many files and an index.
    tensors = hf_tensors(stage.named_parameters(), stage)
    write_model(tmp_path / "hf", architecture, tensors, torch.float32, shard_bytes=8192)
    assert list(hf_shapes(architecture)) == [name for name, _ in hf_tensors(stage.named_parameters(), stage)]
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(24)[None] % config["vocab_size"]
    with torch.no_grad():
        hidden = stage.hidden_states(tokens, torch.arange(24), document_layout(stage, 24))
        logits = stage.logits(hidden[:, 0])
        expected = model(tokens).logits[0]
    assert (logits - expected).abs().max() <= 1e-5
    again = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(again, SafetensorsWeights(tmp_path / "hf", Architecture.from_directory(tmp_path / "hf")))
    for (name, first), (_, second) in zip(stage.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_random_weights_depend_on_seed_and_name_only():
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    first, second = RandomWeights(architecture, 1), RandomWeights(architecture, 2)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(first.tensor(name), RandomWeights(architecture, 1).tensor(name))
    assert not torch.equal(first.tensor(name), second.tensor(name))
    assert not torch.equal(first.tensor(name), first.tensor(other))


def test_missing_and_misshapen_tensors_are_named_at_once(tmp_path):
    from safetensors.torch import save_file

    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    tensors = {name: torch.zeros(shape) for name, shape in hf_shapes(architecture).items()}
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        SafetensorsWeights(tmp_path, architecture)
    assert [problem.key for problem in error.value.problems] == [
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    # A feature network of two layers reads neither.
    SafetensorsWeights(tmp_path, architecture, num_layers=2)


def test_truncated_weights_are_refused(tmp_path):
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(InputError, match="a complete safetensors header"):
        SafetensorsWeights(tmp_path, architecture)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"_attn_implementation_internal": "evil"}, "_attn_implementation_internal"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"nested": {"auto_map": {"AutoModel": "x.Y"}}}, "nested.auto_map"),
        ({"custom_pipelines": {"text": {"impl": "x.Y"}}}, "custom_pipelines"),
        ({"model_type": "mistral", "sliding_window": "all"}, "sliding_window"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(change, key):
    with pytest.raises(InputError) as error:
        Architecture.from_hf(tiny_config("llama") | change, "config.json")
    assert [problem.key for problem in error.value.problems] == [key]


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({}, 4096),  # transformers' own default
        ({"sliding_window": None}, None),
        ({"sliding_window": 64}, 64),
        ({"model_type": "qwen2", "sliding_window": 64}, None),  # behind a switch that is off
        ({"model_type": "llama", "sliding_window": 64}, None),
    ],
)
def test_the_sliding_window_is_what_transformers_takes_it_for(fields, window):
    config = tiny_config("mistral") | fields
    architecture = Architecture.from_hf(config, "test")
    assert architecture.sliding_window == window
    exported = architecture.exported_config("float32")
    others = {key: value for key, value in exported.items() if key != "model_type"}
    transformers_config = AutoConfig.for_model(config["model_type"], **others)
    if config["model_type"] == "mistral":
        assert transformers_config.sliding_window == window
    else:
        assert Architecture.from_hf(exported, "test").sliding_window is None


def test_a_window_is_the_same_attention_as_none_for_rows_that_are_not_longer(tmp_path):
    """The rule by which rows are admitted; one token more, and it no longer holds."""
    model = random_hf_model(tiny_config("mistral", sliding_window=24))
    tokens = torch.arange(25)[None]
    with torch.no_grad():
        windowed = model(tokens).logits
        model.config.sliding_window = None
        whole = model(tokens).logits
    assert torch.equal(windowed[:, :24], whole[:, :24])
    assert not torch.allclose(windowed[:, 24], whole[:, 24], atol=1e-3)


def test_num_parameters_counts_every_tensor_once():
    for config in MODELS:
        architecture = Architecture.from_hf(config, "test")
        counted = sum(torch.Size(shape).numel() for shape in hf_shapes(architecture).values())
        assert architecture.num_parameters == counted
