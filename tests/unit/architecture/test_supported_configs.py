"""Defaults, windows and ties are what transformers takes them for; what is not computed is refused by name."""

import pytest
from transformers import CONFIG_MAPPING

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.errors import InputError
from tests.conftest import tiny_config

KINDS = ("llama", "mistral", "qwen2", "qwen3")


def refused(fields) -> list[str]:
    """Keys that are refused."""
    with pytest.raises(InputError) as caught:
        Architecture.from_hf(fields, "test")
    assert caught.value.exit_code == 2
    return [problem.key for problem in caught.value.problems]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "missing",
    ["num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"],
)
def test_missing_keys_are_taken_for_what_transformers_takes_them_for(kind, missing):
    fields = tiny_config(kind, num_attention_heads=32, hidden_size=64)
    fields.pop(missing, None)
    architecture = Architecture.from_hf(fields, "test")
    expected = CONFIG_MAPPING[kind](**fields)
    for name in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(architecture, name) == getattr(expected, name)
    # Qwen2's class has no such field; its layers divide the width.
    assert architecture.head_dim == getattr(expected, "head_dim", 64 // 32)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": 16}, None),  # no more layers than max_window_layers' default
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, 16),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        (
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 4},
            None,
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            16,
        ),
    ],
)
def test_a_window_counts_where_some_layer_has_one(kind, changes, window):
    fields = tiny_config(kind) | changes
    architecture = Architecture.from_hf(fields, "test")
    assert architecture.sliding_window == window
    expected = CONFIG_MAPPING[kind](**fields)
    has_window = "sliding_attention" in expected.layer_types
    assert window == (expected.sliding_window if has_window else None)
    assert Architecture.from_hf(architecture.exported_config("float32"), "test").sliding_window == window


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"use_sliding_window": "true"}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": None}, "max_window_layers"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ],
)
def test_windows_that_cannot_be_resolved_are_refused(kind, changes, key):
    assert refused(tiny_config(kind) | changes) == [key]


FOREIGN = {
    "attention_multiplier": 0.5,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "scale_emb": 12,
    "clip_qkv": 8.0,
    "alibi": True,
    "parallel_attn": True,
    "is_causal": False,
    "is_encoder_decoder": True,
    "attention_chunk_size": 8192,
    "no_rope_layers": [1, 0],
    "hidden_activation": "gelu_pytorch_tanh",
    "norm_type": "layernorm",
    "layer_norm_eps": 1e-5,
    "per_layer_config": {"0": {}},
    "vision_config": {"hidden_size": 8},
    "transformers_weights": "other.safetensors",
    "attribute_map": {"rms_norm_eps": "other"},
    "eos_token_id": "</s>",
    "pad_token_id": 10**6,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_intermediate_size": 64,
    "quantization_config": {"bits": 4},
    "compression_config": {"bits": 4},
    "mlp_bias": True,
    "lm_head_bias": True,
    "use_bias": True,
    "hidden_act": "gelu",
    "tie_word_embeddings": "false",
    "rms_norm_eps": 0,
    "num_key_value_heads": 0,
    "num_hidden_layers": 10**9,
    "vocab_size": 2**40,
    "intermediate_size": 48.0,
    "max_position_embeddings": None,
    "architectures": ["LlavaForConditionalGeneration"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", FOREIGN)
def test_what_the_layers_do_not_compute_is_refused_by_its_name(kind, key):
    assert refused(tiny_config(kind) | {key: FOREIGN[key]}) == [key]


NEUTRAL = {
    "attention_multiplier": None,
    "logit_scale": 1.0,
    "residual_multiplier": 1,
    "is_causal": True,
    "is_encoder_decoder": False,
    "hidden_activation": "silu",
    "hidden_act": "swish",
    "norm_type": "rmsnorm",
    "num_experts": 0,
    "vision_config": None,
    "architectures": [],
    "mlp_bias": False,
    "pruned_heads": {},
    "eos_token_id": [1, 2],
    "pad_token_id": -1,
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_values_that_change_nothing_are_accepted(key):
    plain = Architecture.from_hf(tiny_config("llama"), "test")
    found = Architecture.from_hf(tiny_config("llama") | {key: NEUTRAL[key]}, "test")
    assert found.layer_parameters == plain.layer_parameters and found.notes == ()


@pytest.mark.parametrize(
    ("kind", "key", "is_refused"),
    [
        ("qwen2", "attention_bias", False),
        ("qwen3", "attention_bias", True),
        ("llama", "attention_bias", True),
        ("qwen2", "qkv_bias", False),
        ("llama", "qkv_bias", True),
        ("qwen3", "use_qk_norm", False),
        ("qwen2", "use_qk_norm", True),
    ],
)
def test_biases_and_head_norms_are_those_of_the_type(kind, key, is_refused):
    fields = tiny_config(kind) | {key: True}
    if is_refused:
        assert refused(fields) == [key]
    else:
        Architecture.from_hf(fields, "test")


def test_dropout_that_is_not_applied_is_said():
    (note,) = Architecture.from_hf(tiny_config("llama", attention_dropout=0.1), "test").notes
    assert "attention_dropout 0.1 is not applied" in note
