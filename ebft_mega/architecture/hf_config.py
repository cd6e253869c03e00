"""Read a decoder-only model's architecture from a Hugging Face `config.json`. No torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.errors import InputError, Problem

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
_MISTRAL_WINDOW = 4096  # where a Mistral config does not say


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a Llama, Mistral, Qwen2 or Qwen3 model; field names follow Hugging Face."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    hf_config: dict[str, Any]  # the whole config, for rotary frequencies and for export
    # Positions that a token may look back at, itself among them (Mistral); None: all. The layers know no window, so
    # rows must not be longer.
    sliding_window: int | None = None

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has a bias on the query, key and value projections, the others have none."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head."""
        return self.model_type == "qwen3"

    @property
    def query_width(self) -> int:
        """Numbers in a token's queries of one layer: heads * head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Numbers in a token's keys of one layer, and as many in its values: key-value heads * head_dim."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        query, key_value = self.query_width, 2 * self.key_value_width
        attention = self.hidden_size * (query + key_value) + query * self.hidden_size
        bias = query + key_value if self.qkv_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        mlp = 3 * self.hidden_size * self.intermediate_size
        return attention + bias + head_norms + mlp + 2 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, tied weights once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "Architecture":
        """Read a Hugging Face config dictionary.

        Args:
            config: contents of `config.json`, or the `model.config` section of a run's configuration.
            where: file (and line) named in errors.
        Raises:
            InputError: every unsupported or missing field at once.
        """
        # Later checks count on what the earlier ones let pass.
        for check in (_unsupported_kind, _unsupported_sizes, _unsupported_switches):
            problems = [Problem(where, key, repr(found), expected) for key, found, expected in check(config)]
            if problems:
                raise InputError(problems)
        heads = config["num_attention_heads"]
        return cls(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            hf_config=dict(config),
            sliding_window=_sliding_window(config),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "Architecture":
        """Read `config.json` of a Hugging Face model directory.

        Raises:
            InputError: no such file, not JSON, or an unsupported architecture.
        """
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                [Problem(str(directory), "config.json", "no such file", "a Hugging Face model directory")]
            ) from None
        except json.JSONDecodeError as error:
            raise InputError([Problem(f"{path}:{error.lineno}", "config.json", error.msg, "JSON")]) from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise InputError([Problem(str(path), "config.json", str(error), "JSON")]) from None
        if not isinstance(config, dict):
            raise InputError([Problem(str(path), "config.json", f"a JSON {type(config).__name__}", "a JSON object")])
        return cls.from_hf(config, str(path))

    def exported_config(self, dtype: str) -> dict[str, Any]:
        """Contents of `config.json` for weights of a dtype.

        Holds every key that was read, and the values assumed for missing keys, so that no other reader assumes other
        defaults.

        Args:
            dtype: torch's name of it: float32, bfloat16, ...
        """
        read_as: dict[str, Any] = {
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.model_type == "mistral":
            read_as["sliding_window"] = self.sliding_window
        # transformers 5 reads `dtype` and falls back on the older name; older versions know only that one.
        written_as = {"architectures": [CAUSAL_LM_CLASSES[self.model_type]], "dtype": dtype, "torch_dtype": dtype}
        return {**self.hf_config, **read_as, **written_as}


# A key, what stands there, what would be valid.
Refusal = tuple[str, Any, str]


def _unsupported_kind(config: dict[str, Any]) -> Iterator[Refusal]:
    """Another kind of model, code, or fields without which nothing else can be said."""
    for key, value in code_keys(config):
        yield key, value, "no such key: code or kernels named by a model directory are never run"
    if config.get("quantization_config"):
        yield "quantization_config", config["quantization_config"], "no such key: weights of 16 or 32 bits"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CAUSAL_LM_CLASSES:
        yield "model_type", model_type, "one of " + ", ".join(CAUSAL_LM_CLASSES)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not _is_count(config.get(key)):
            yield key, config.get(key), "a positive integer"


def _unsupported_sizes(config: dict[str, Any]) -> Iterator[Refusal]:
    """Sizes that do not go together."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if not _is_count(groups) or heads % groups:
        yield "num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})"
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if not _is_count(head_dim) or head_dim % 2:
        yield "head_dim", head_dim, "an even number"
    window = _sliding_window(config)
    if window is not None and not _is_count(window):
        yield "sliding_window", window, "null or a positive number of positions"
    if not _is_count(config.get("max_position_embeddings") or 1):
        yield "max_position_embeddings", config["max_position_embeddings"], "a positive number of positions"
    epsilon = config.get("rms_norm_eps") or 1e-6
    if not isinstance(epsilon, float | int) or isinstance(epsilon, bool) or not 0 < epsilon < 1:
        yield "rms_norm_eps", epsilon, "a number between 0 and 1"


def _unsupported_switches(config: dict[str, Any]) -> Iterator[Refusal]:
    """Variants that the layers here do not have."""
    if config.get("hidden_act", "silu") != "silu":
        yield "hidden_act", config["hidden_act"], "'silu'"
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            yield key, config[key], "false: not yet supported"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        yield "rope_parameters", rope, "a mapping"
        rope = {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        yield "rope_parameters.rope_type", rope_type, "default, linear or llama3"
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        yield "partial_rotary_factor", rotated, "1: heads are rotated whole"
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types):
        yield "layer_types", layer_types, "full_attention for every layer"


def _sliding_window(config: dict[str, Any]) -> Any:
    """Only Mistral has one without saying so; Qwen's is behind a switch."""
    return config.get("sliding_window", _MISTRAL_WINDOW) if config["model_type"] == "mistral" else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def code_keys(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a Hugging Face JSON file that name code, at any depth, with their values."""
    for key, value in config.items():
        if key in CODE_KEYS and value:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from code_keys(value, f"{prefix}{key}.")


def tapped_layers(fractions: list[float] | tuple[float, ...], num_layers: int) -> tuple[int, ...]:
    """Depths at which the feature network is read: `max(1, min(L, floor(f * L)))`, in blocks from the input.

    Depth i is the residual stream after block i; depth L also passes the final norm, as in Hugging Face's
    `hidden_states` (the authors' code). In a shallow model two fractions may name one depth, which then counts
    twice.
    """
    return tuple(sorted(max(1, min(num_layers, int(fraction * num_layers))) for fraction in fractions))
