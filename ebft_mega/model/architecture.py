"""What a decoder-only model looks like, read from a Hugging Face `config.json`: pure Python, no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.errors import InputError, Problem

MODEL_TYPES = ("llama", "qwen2", "qwen3")
# A config may point the loader at code; nothing from a model directory is ever executed here.
REFUSED_KEYS = ("auto_map", "_attn_implementation", "_attn_implementation_internal", "trust_remote_code")


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a Llama, Qwen2 or Qwen3 model; field names follow Hugging Face."""

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

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has a bias on the query, key and value projections, the others have none."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head."""
        return self.model_type == "qwen3"

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
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
        problems: list[Problem] = []

        def refuse(key: str, found: Any, expected: str) -> None:
            problems.append(Problem(where, key, repr(found), expected))

        for key in REFUSED_KEYS:
            if config.get(key):
                refuse(key, config[key], "no such key: code or kernels named by a model directory are never run")
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            refuse("model_type", model_type, "one of " + ", ".join(MODEL_TYPES))
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            value = config.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(key, value, "a positive integer")
        if problems:
            raise InputError(problems)

        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if not isinstance(groups, int) or heads % groups:
            refuse("num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
        if not isinstance(head_dim, int) or head_dim % 2 or head_dim < 2:
            refuse("head_dim", head_dim, "an even number")
        if config.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", config["hidden_act"], "'silu'")
        for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if config.get(key):
                refuse(key, config[key], "false: not yet supported")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3"):
            refuse("rope_parameters.rope_type", rope_type, "default, linear or llama3")
        if problems:
            raise InputError(problems)
        return cls(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            hf_config=dict(config),
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
        return cls.from_hf(config, str(path))


def tapped_layers(fractions: list[float] | tuple[float, ...], num_layers: int) -> tuple[int, ...]:
    """Depths at which the feature network is read: `max(1, min(L, floor(f * L)))`, in blocks from the input.

    Depth i is the residual stream after block i; depth L also passes the final norm, as in Hugging Face's
    `hidden_states` (the authors' code). In a shallow model two fractions may name one depth, which then counts
    twice.
    """
    return tuple(sorted(max(1, min(num_layers, int(fraction * num_layers))) for fraction in fractions))
