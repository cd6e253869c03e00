"""Read a decoder-only model's architecture from a Hugging Face `config.json`. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft_mega.architecture.rotary_settings import RotarySettings, resolve_rotary
from ebft_mega.architecture.supported_configs import (
    CAUSAL_LM_CLASSES,
    DEFAULT_EPSILON,
    head_width,
    key_value_heads,
    max_positions,
    notes,
    refusals,
    resolve_window,
)
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import read_contained_json

_LONGEST_VALUE = 200  # characters of a value in a message


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
    hf_config: dict[str, Any]  # the whole config, for export
    rotary: RotarySettings
    # Positions that a token of some layer may look back at, itself among them; None: all. The layers know no window,
    # so rows must not be longer.
    sliding_window: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)  # settings that may surprise, in sentences

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
        found = list(refusals(config))
        is_known = not any(refusal.key == "model_type" for refusal in found)
        rotary = resolve_rotary(config, max_positions(config) if is_known else None)
        problems = [
            Problem(where, key, repr(value)[:_LONGEST_VALUE], expected, suggestion)
            for key, value, expected, suggestion in (*found, *rotary.refusals)
        ]
        if problems:
            raise InputError(problems)
        return cls(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=key_value_heads(config),
            head_dim=head_width(config),
            max_position_embeddings=max_positions(config),
            rms_norm_eps=float(config.get("rms_norm_eps", DEFAULT_EPSILON)),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            hf_config=dict(config),
            rotary=rotary.settings,
            sliding_window=resolve_window(config)[0],
            notes=(*rotary.notes, *notes(config)),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> "Architecture":
        """Read `config.json` of a Hugging Face model directory.

        Raises:
            InputError: no such file, not JSON, or an unsupported architecture.
        """
        name = "config.json"
        config = read_contained_json(directory, name, f"the {name} of a Hugging Face model directory")
        return cls.from_hf(config, str(directory / name))

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


def tapped_layers(fractions: list[float] | tuple[float, ...], num_layers: int) -> tuple[int, ...]:
    """Depths at which the feature network is read: `max(1, min(L, floor(f * L)))`, in blocks from the input.

    Depth i is the residual stream after block i; depth L also passes the final norm, as in Hugging Face's
    `hidden_states` (the authors' code). In a shallow model two fractions may name one depth, which then counts
    twice.
    """
    return tuple(sorted(max(1, min(num_layers, int(fraction * num_layers))) for fraction in fractions))
