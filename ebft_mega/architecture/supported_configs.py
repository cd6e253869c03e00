"""Which `config.json` can be computed: defaults by type of model, windows, and everything that is refused. No torch."""

import re
from collections.abc import Iterator
from typing import Any

from ebft_mega.architecture.config_values import MAX_COUNT, Refusal, is_count, is_number

# Hugging Face's names of the classes, by model type.
CAUSAL_LM_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# A config may point the loader at code; nothing from a model directory is ever executed here.
CODE_KEYS = (
    *("auto_map", "custom_pipelines", "trust_remote_code"),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
)
# What transformers 5 takes a missing key for; None: it follows from other sizes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}
DEFAULT_EPSILON = 1e-6
_WINDOW = 4096  # where the config has no sliding_window
_MAX_WINDOW_LAYERS = 28  # where a Qwen config has no max_window_layers: the lowest layers without a window
_MOST_LAYERS = 10_000
# Keys of related models that change what is computed, each with the values that change nothing. The classes of the
# supported types do not read them, so a config that sets one describes another model.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    # scales of attention, embeddings, residuals and logits
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    **dict.fromkeys(("attention_multiplier", "softmax_scale", "attn_scale", "attention_scale", "clip_qkv"), (None,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (None, 1)),
    **dict.fromkeys(("scale_emb", "lm_head_multiplier", "key_multiplier"), (None, 1)),
    **dict.fromkeys(("scale_depth", "dim_model_base", "mup_scale"), (None,)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "attn_temperature_tuning"), (None, False)),
    # other positions, masks and orders of the layers
    **dict.fromkeys(("alibi", "use_alibi", "parallel_attn", "use_parallel_residual"), (None, False)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "attention_chunk_size"), (None,)),
    **dict.fromkeys(("use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder"), (None, False)),
    "is_causal": (None, True),
    **dict.fromkeys(("cross_attention_layers", "block_configs", "kv_lora_rank", "q_lora_rank"), (None,)),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers"), (None, 0)),
    **dict.fromkeys(("per_layer_config", "pruned_heads"), (None, {})),
    # transformers lets a config rename its own keys
    "attribute_map": (None, {}),
    # other norms and activations
    **dict.fromkeys(("hidden_activation", "activation_function", "activation"), (None, "silu", "swish")),
    **dict.fromkeys(("norm_type", "normalization_type"), (None, "rmsnorm", "RMSNorm", "rms_norm")),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), (None,)),
    # models within models, and files that name other files
    **dict.fromkeys(("text_config", "vision_config", "audio_config"), (None, {})),
    "transformers_weights": (None,),
}
_BIASES = ("attention_bias", "mlp_bias", "use_bias", "bias", "add_bias_linear", "lm_head_bias", "attention_out_bias")
_HEAD_NORMS = ("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm")
_EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|\w*experts_per_tok|moe_\w+|\w+_moe")


def refusals(config: dict[str, Any]) -> Iterator[Refusal]:
    """Everything in a config that cannot be computed as transformers would; rotary settings apart.

    First what else counts on: with another kind of model, or without its sizes, there is no more to say.
    """
    found = list(_unsupported_kind(config))
    yield from found
    if not found:
        yield from _unsupported_sizes(config)
        yield from _unsupported_switches(config)
        yield from _special_tokens(config)
        yield from resolve_window(config)[1]


def _unsupported_kind(config: dict[str, Any]) -> Iterator[Refusal]:
    """Another kind of model, code, or fields without which nothing else can be said."""
    for key, value in code_keys(config):
        yield Refusal(key, value, "no such key: code or kernels named by a model directory are never run")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            yield Refusal(key, config[key], "no such key: weights of 16 or 32 bits")
    for key, value in config.items():
        if _EXPERTS.fullmatch(str(key)) and value:
            yield Refusal(key, value, "no such key: mixtures of experts are not supported")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CAUSAL_LM_CLASSES:
        yield Refusal("model_type", model_type, "one of " + ", ".join(CAUSAL_LM_CLASSES))
    elif config.get("architectures") not in (None, []):
        wanted = CAUSAL_LM_CLASSES[model_type]
        if not isinstance(config["architectures"], list) or wanted not in config["architectures"]:
            yield Refusal("architectures", config["architectures"], f"{wanted}, which {model_type} stands for")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        value, most = config.get(key), _MOST_LAYERS if key == "num_hidden_layers" else MAX_COUNT
        if not is_count(value, most):
            is_large = is_count(value) or (type(value) is int and value > most)
            yield Refusal(key, value, "a positive integer" + f" of at most {most}" * is_large)


def _unsupported_sizes(config: dict[str, Any]) -> Iterator[Refusal]:
    """Sizes that do not go together."""
    heads, hidden, model_type = config["num_attention_heads"], config["hidden_size"], config["model_type"]
    groups = key_value_heads(config)
    if not is_count(groups) or heads % groups:
        yield Refusal("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    width = head_width(config)
    if not is_count(width) or width % 2:
        yield Refusal("head_dim", width, "an even number")
    elif hidden % heads and (model_type == "llama" or config.get("head_dim") is None):
        yield Refusal("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
    if not is_count(max_positions(config)):
        yield Refusal("max_position_embeddings", max_positions(config), "a positive number of positions")
    epsilon = config.get("rms_norm_eps", DEFAULT_EPSILON)
    if not is_number(epsilon, 0, 1) or not 0 < epsilon < 1:
        yield Refusal("rms_norm_eps", epsilon, "a number between 0 and 1")


def _special_tokens(config: dict[str, Any]) -> Iterator[Refusal]:
    """Ids of tokens that no reader of the config could use."""
    ends = config.get("eos_token_id")
    if ends is not None and not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends])):
        yield Refusal("eos_token_id", ends, "null, an id or a list of ids")
    padding, most = config.get("pad_token_id"), config["vocab_size"]
    # Negative ids count from the end; -1 is in common use for "none".
    if padding is not None and not (type(padding) is int and -most <= padding < most):
        yield Refusal("pad_token_id", padding, f"null or an id below vocab_size {most}")


def _unsupported_switches(config: dict[str, Any]) -> Iterator[Refusal]:
    """Variants that the layers here do not have."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield Refusal("hidden_act", config["hidden_act"], "'silu'")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        yield Refusal("tie_word_embeddings", tied, "true or false")
    for key in _BIASES:
        # Qwen2's biases of queries, keys and values are always there, whatever the config says.
        if config.get(key) and not (config["model_type"] == "qwen2" and key == "attention_bias"):
            yield Refusal(key, config[key], "false: not yet supported")
    if config.get("qkv_bias") not in (None, config["model_type"] == "qwen2"):
        expected = f"no such key: the type {config['model_type']} decides"
        yield Refusal("qkv_bias", config["qkv_bias"], expected)
    for key in _HEAD_NORMS:
        if config.get(key) not in (None, config["model_type"] == "qwen3"):
            yield Refusal(key, config[key], f"no such key: the type {config['model_type']} decides")
    for key, neutral in _FOREIGN.items():
        if key in config and not any(type(config[key]) is type(value) and config[key] == value for value in neutral):
            if not (is_number(config[key], 1, 1) and 1 in neutral):
                expected = "no such key: the layers do not compute it, nor do transformers' of this type"
                yield Refusal(key, config[key], expected)


def key_value_heads(config: dict[str, Any]) -> Any:
    """Heads of keys and values as transformers takes them; where the key is null, as many as of queries."""
    found = config.get("num_key_value_heads", DEFAULTS[config["model_type"]]["num_key_value_heads"])
    return config["num_attention_heads"] if found is None and config["model_type"] != "mistral" else found


def head_width(config: dict[str, Any]) -> Any:
    """Numbers in a head as transformers takes them; where the key is null, an equal share of the hidden width."""
    found = config.get("head_dim", DEFAULTS[config["model_type"]]["head_dim"])
    is_shared = found is None and config["model_type"] != "qwen3"
    return config["hidden_size"] // config["num_attention_heads"] if is_shared else found


def max_positions(config: dict[str, Any]) -> Any:
    """Positions that the model has been made for."""
    return config.get("max_position_embeddings", DEFAULTS[config["model_type"]]["max_position_embeddings"])


def resolve_window(config: dict[str, Any]) -> tuple[int | None, list[Refusal]]:
    """The sliding window that transformers gives any layer of the model, and what cannot be resolved.

    A Mistral model has one in all layers, also where its config does not say so. A Qwen model has one where
    `use_sliding_window` is on, in the layers that `layer_types` names or, without that, in those from
    `max_window_layers` on. A Llama model has none.

    Returns:
        Positions that a token of some layer may look back at, itself among them; None: all.
    """
    model_type, window = config["model_type"], config.get("sliding_window", _WINDOW)
    is_qwen, is_used = model_type.startswith("qwen"), config.get("use_sliding_window", False)
    found: list[Refusal] = []
    if not isinstance(is_used, bool) or (is_used and not is_qwen):
        expected = "true or false" if is_qwen else f"false: a {model_type} model has no such switch"
        found.append(Refusal("use_sliding_window", is_used, expected))
    if (model_type == "mistral" or (is_qwen and is_used)) and not (window is None or is_count(window)):
        found.append(Refusal("sliding_window", window, "null or a positive number of positions"))
    kinds = _layer_kinds(config, is_qwen and is_used is True and window is not None, found)
    if found or model_type == "llama":
        return None, found
    if is_qwen and (not is_used or "sliding_attention" not in kinds):
        return None, found
    return window, found


def _layer_kinds(config: dict[str, Any], has_window: bool, found: list[Refusal]) -> list[str]:
    """The kind of attention of each layer of a model; what is wrong with the keys is added to `found`."""
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    kinds = config.get("layer_types")
    if kinds is None:
        if has_window and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
            found.append(Refusal("max_window_layers", first, "a number of layers"))
            return []
        return ["sliding_attention" if has_window and layer >= first else "full_attention" for layer in range(layers)]
    allowed = ("full_attention", "sliding_attention") if has_window else ("full_attention",)
    if not isinstance(kinds, list | tuple) or any(kind not in allowed for kind in kinds):
        expected = f"{' or '.join(allowed)} for every layer"
        found.append(Refusal("layer_types", kinds, expected))
        return []
    if len(kinds) not in (0, layers):
        found.append(Refusal("layer_types", f"{len(kinds)} layers", f"the {layers} layers of num_hidden_layers"))
    return list(kinds)


def notes(config: dict[str, Any]) -> Iterator[str]:
    """Settings of a supported config that are not followed, each in a sentence."""
    if config.get("attention_dropout"):
        yield f"attention_dropout {config['attention_dropout']} is not applied: there is no dropout here."


def code_keys(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a Hugging Face JSON file that name code, at any depth, with their values."""
    for key, value in config.items():
        if key in CODE_KEYS and value:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from code_keys(value, f"{prefix}{key}.")
