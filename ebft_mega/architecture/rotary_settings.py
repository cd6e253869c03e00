"""Resolve the rotary settings of a model once, by the keys that transformers lets win, for check and computation.

Source: transformers 5, `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`).
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ebft_mega.architecture.config_values import MISSING, Refusal, is_count, is_number

DEFAULT_THETA = 10_000.0  # transformers' own, for all supported types of model
_LEAST_FACTOR = 1e-9
_LARGEST_THETA = 1e30  # float32 holds its powers
# Keys that each type reads. `type` is the older spelling of `rope_type`.
_ALWAYS_READ = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_READ_BY_TYPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys that other types read: without effect beside a supported one.
_READ_BY_OTHERS = (
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "mscale", "mscale_all_dim"),
    "truncate",
)
_KNOWN = tuple(dict.fromkeys((*_ALWAYS_READ, *_READ_BY_TYPE["llama3"], *_READ_BY_OTHERS)))
ROPE_TYPES = tuple(_READ_BY_TYPE)
_TYPES_IN_WORDS = "default, linear or llama3"


@dataclass(frozen=True)
class RotarySettings:
    """What decides the rotary frequencies, beside the width of a head. Nothing scales the attention."""

    rope_type: str  # one of ROPE_TYPES
    rope_theta: float
    factor: float | None = None  # linear and llama3: longer wavelengths are this much longer
    # llama3: wavelengths above original / low are stretched, those below original / high are not.
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def frequencies(self, head_dim: int) -> list[float]:
        """Inverse frequencies in float64, radians per position: what `model.rotary` computes in float32.

        Returns:
            [head_dim / 2].
        """
        plain = [self.rope_theta ** -(index / head_dim) for index in range(0, head_dim, 2)]
        if self.factor is None:
            return plain
        if self.rope_type == "linear":
            return [frequency / self.factor for frequency in plain]
        return [self._stretched(frequency, self.factor) for frequency in plain]

    def _stretched(self, frequency: float, factor: float) -> float:
        """A frequency after llama3's scaling by wavelength."""
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        assert low is not None and high is not None and original is not None, "resolve_rotary lets nothing else pass"
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / factor
        share = (original / wavelength - low) / (high - low)
        return (1 - share) * frequency / factor + share * frequency


@dataclass(frozen=True)
class ResolvedRotary:
    """The settings, what is refused, and what may surprise."""

    settings: RotarySettings
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_rotary(config: dict[str, Any], max_position_embeddings: Any) -> ResolvedRotary:
    """Resolve the rotary settings as transformers does.

    `rope_scaling` wins over `rope_parameters` wherever it says anything; then `rope_theta` and
    `partial_rotary_factor` inside win over those at the top; but `original_max_position_embeddings` at the top wins.

    Args:
        config: contents of a `config.json`.
        max_position_embeddings: the model's, which stand in for missing original positions.
    Returns:
        With refusals, settings that mean nothing.
    """
    wrong = [
        Refusal(key, config[key], "a mapping, or null")
        for key in ("rope_scaling", "rope_parameters")
        if not isinstance(config.get(key), dict | None)
    ]
    if wrong:
        return ResolvedRotary(RotarySettings("default", DEFAULT_THETA), tuple(wrong))
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given: dict[str, Any] = config.get(name) or {}
    type_key = "rope_type" if "rope_type" in given else "type"
    rope_type = given.get(type_key, "default")
    refusals = [*_refused_keys(name, given), *_refused_values(name, given, config)]
    if rope_type not in ROPE_TYPES or not isinstance(rope_type, str):
        refusals.insert(0, Refusal(f"{name}.{type_key}", rope_type, _TYPES_IN_WORDS))
        return ResolvedRotary(RotarySettings("default", DEFAULT_THETA), tuple(refusals))
    values: dict[str, Any] = {key: given.get(key, MISSING) for key in _READ_BY_TYPE[rope_type]}
    if rope_type == "llama3":
        values["original_max_position_embeddings"] = _original_positions(config, given, max_position_embeddings)
    refusals += _refused_factors(name, values)
    theta: Any = given.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if refusals:
        return ResolvedRotary(RotarySettings("default", DEFAULT_THETA), tuple(refusals))
    numbers: dict[str, Any] = {
        key: value if key.startswith("original") else float(value) for key, value in values.items()
    }
    settings = RotarySettings(rope_type=rope_type, rope_theta=float(theta), **numbers)
    return ResolvedRotary(settings, notes=tuple(_notes(name, given, config, rope_type)))


def _original_positions(config: dict[str, Any], given: dict[str, Any], max_position_embeddings: Any) -> Any:
    """Positions before the scaling; a value at the top wins, as in transformers."""
    key = "original_max_position_embeddings"
    return config[key] if key in config else given.get(key, max_position_embeddings)


def _refused_keys(name: str, given: dict[str, Any]) -> Iterator[Refusal]:
    """Keys that no rotary embedding here reads: misspelled, of several kinds of layers, or multimodal."""
    for key, value in given.items():
        if key in _KNOWN:
            continue
        nearest = difflib.get_close_matches(str(key), _KNOWN, n=1)
        expected = "no such key: settings by kind of layer are not supported" if isinstance(value, dict) else ""
        yield Refusal(f"{name}.{key}", value, expected or f"one of {', '.join(_KNOWN)}", nearest[0] if nearest else "")


def _refused_values(name: str, given: dict[str, Any], config: dict[str, Any]) -> Iterator[Refusal]:
    """A base that is no number, or heads that are rotated in part."""
    for key, is_valid, expected in (
        ("rope_theta", lambda value: is_number(value, 1, _LARGEST_THETA), f"a number from 1 to {_LARGEST_THETA:g}"),
        (
            "partial_rotary_factor",
            # Null within the mapping: transformers cannot compute it.
            lambda value: is_number(value, 1, 1) or (value is None and "partial_rotary_factor" not in given),
            "1: heads are rotated whole",
        ),
    ):
        if key in given:
            place, value = f"{name}.{key}", given[key]
        elif key in config:
            place, value = key, config[key]
        else:
            continue
        if not is_valid(value):
            yield Refusal(place, value, expected)


def _refused_factors(name: str, values: dict[str, Any]) -> Iterator[Refusal]:
    """What a scaled type needs, and its range."""
    if "factor" in values and not is_number(values["factor"], 1):
        yield Refusal(f"{name}.factor", values["factor"], "a number of at least 1")
    if "low_freq_factor" not in values:
        return
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    wrong = [key for key in ("low_freq_factor", "high_freq_factor") if not is_number(values[key], _LEAST_FACTOR)]
    yield from (Refusal(f"{name}.{key}", values[key], "a number above 0") for key in wrong)
    if not wrong and low >= high:
        yield Refusal(f"{name}.high_freq_factor", high, f"more than low_freq_factor {low}")
    original = values["original_max_position_embeddings"]
    if not is_count(original):
        yield Refusal(f"{name}.original_max_position_embeddings", original, "a positive number of positions")


def _notes(name: str, given: dict[str, Any], config: dict[str, Any], rope_type: str) -> Iterator[str]:
    """Settings that lose to others or that the type does not read, each in a sentence."""
    lost = config.get("rope_parameters")
    if name == "rope_scaling" and lost and lost != given:
        yield f"rope_scaling {given} wins over rope_parameters {lost}, as in transformers."
    if "rope_theta" in given and config.get("rope_theta") not in (None, given["rope_theta"]):
        inner, outer = given["rope_theta"], config["rope_theta"]
        yield f"{name}.rope_theta {inner} wins over rope_theta {outer}, as in transformers."
    if "rope_type" in given and given.get("type") not in (None, given["rope_type"]):
        yield f"{name}.rope_type {given['rope_type']} wins over {name}.type {given['type']}, as in transformers."
    original = "original_max_position_embeddings"
    if rope_type == "llama3":
        if original in config and given.get(original) not in (None, config[original]):
            yield f"{original} {config[original]} wins over {name}.{original} {given[original]}, as in transformers."
        if original not in config and original not in given:
            yield f"{name} has no {original}: max_position_embeddings stands in for it, as in transformers."
    read = (*_ALWAYS_READ, *_READ_BY_TYPE[rope_type])
    for key in given:
        if key not in read and given[key] is not None:
            yield f"{name}.{key} changes nothing for rope_type {rope_type}, here and in transformers."
