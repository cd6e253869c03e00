"""What is computed is what transformers computes from the same keys, or it is refused by the name of the key."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.errors import InputError
from ebft_mega.model.rotary import inverse_frequencies
from tests.conftest import tiny_config

MODULES = {
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}
ACCEPTED = [
    {},
    {"rope_theta": 500000.0},
    {"rope_theta": 1000000},
    {"rope_parameters": None, "rope_scaling": None},
    {"rope_parameters": {}},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
    # The older key wins, and the base of the newer one is lost.
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {**LLAMA3, **ORIGINAL}, "rope_theta": 5e5},
    {"rope_parameters": {**LLAMA3, **ORIGINAL, "rope_theta": 5e5}},
    {"rope_parameters": {**LLAMA3, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, **ORIGINAL}},
    {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    {"rope_parameters": {**LLAMA3, **ORIGINAL}, "original_max_position_embeddings": 300},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1}},
    {"rope_parameters": {"rope_type": "default", "attention_factor": 3.0, "factor": 9.0}},
]
REFUSED = [
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": None}},
        "rope_scaling.partial_rotary_factor",
    ),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling.type",
    ),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "su"}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.type"),
    ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": None}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_parameters.rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor"),
    ({"rope_parameters": {**LLAMA3, "factor": None}}, "rope_parameters.factor"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 0}}, "rope_parameters.low_freq_factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": "4"}}, "rope_parameters.high_freq_factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_parameters.high_freq_factor"),
    (
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64.5}},
        "rope_parameters.original_max_position_embeddings",
    ),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": None}, "rope_theta": 9.0}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_theta": True}}, "rope_parameters.rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"rope_parameters": {"rope_typ": "linear"}}, "rope_parameters.rope_typ"),
    ({"rope_scaling": {"type": "default", "mrope_section": [2, 2]}}, "rope_scaling.mrope_section"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": False}, "rope_scaling"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": {"type": "default"}, "rope_parameters": "x"}, "rope_parameters"),
]


def of_transformers(fields):
    """The rotary module of a config, as transformers builds it; it changes the dictionaries that it is given."""
    return MODULES[fields["model_type"]](CONFIG_MAPPING[fields["model_type"]](**copy.deepcopy(fields)))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_frequencies_are_those_of_transformers_to_the_last_bit(kind, changes):
    fields = tiny_config(kind) | changes
    before = copy.deepcopy(fields)
    architecture = Architecture.from_hf(fields, "test")
    module = of_transformers(fields)
    assert torch.equal(inverse_frequencies(architecture), module.inv_freq)
    assert module.attention_scaling == 1.0
    assert fields == before, "a resolved config is still what was read"
    # The check of stored buffers computes the same without torch.
    checked = torch.tensor(architecture.rotary.frequencies(architecture.head_dim))
    assert torch.allclose(checked, module.inv_freq, rtol=1e-6, atol=0)
    # What is written resolves to the same, here and there.
    exported = architecture.exported_config("float32")
    assert Architecture.from_hf(exported, "test").rotary == architecture.rotary
    assert torch.equal(of_transformers(exported).inv_freq, module.inv_freq)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("changes", "key"), REFUSED, ids=str)
def test_what_is_not_computed_is_refused_by_the_name_of_its_key(kind, changes, key):
    with pytest.raises(InputError) as caught:
        Architecture.from_hf(tiny_config(kind) | changes, "test")
    assert [problem.key for problem in caught.value.problems] == [key]


def test_all_missing_factors_are_named_at_once():
    with pytest.raises(InputError) as caught:
        Architecture.from_hf(tiny_config("llama") | {"rope_parameters": {"rope_type": "llama3"}}, "test")
    found = {problem.key.removeprefix("rope_parameters."): problem.found for problem in caught.value.problems}
    assert found == dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), "no such key")


def test_a_misspelled_key_comes_with_the_nearest_one():
    with pytest.raises(InputError) as caught:
        Architecture.from_hf(tiny_config("llama") | {"rope_scaling": {"type": "linear", "facter": 2.0}}, "test")
    assert [problem.suggestion for problem in caught.value.problems] == ["factor", ""]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (ACCEPTED[12], "wins over rope_parameters"),
        (ACCEPTED[7], "rope_parameters.rope_theta 500000.0 wins over rope_theta 7.0"),
        (ACCEPTED[11], "rope_scaling.rope_type linear wins over rope_scaling.type dynamic"),
        (ACCEPTED[17], "max_position_embeddings stands in for it"),
        (ACCEPTED[18], "original_max_position_embeddings 300 wins over"),
        (ACCEPTED[21], "rope_parameters.attention_factor changes nothing for rope_type default"),
    ],
)
def test_what_loses_or_changes_nothing_is_said(changes, words):
    notes = Architecture.from_hf(tiny_config("llama") | changes, "test").notes
    assert any(words in note for note in notes)
    assert Architecture.from_hf(tiny_config("llama") | {"rope_parameters": {"rope_theta": 9.0}}, "test").notes == ()


NUMBERS = st.sampled_from([None, True, 0, 1, 2, 4.0, 0.5, -1, 64, 1e4, 5e5, "4", float("nan")])
INNER = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", None]),
        "type": st.sampled_from(["default", "linear", "llama3", "dynamic"]),
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "rope_theta"), NUMBERS),
        **dict.fromkeys(("original_max_position_embeddings", "partial_rotary_factor", "beta_fast"), NUMBERS),
    },
)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(MODULES)),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "rope_scaling": st.none() | INNER,
            "rope_parameters": st.none() | INNER,
            "rope_theta": NUMBERS,
            "original_max_position_embeddings": NUMBERS,
        },
    ),
)
def test_any_settings_are_refused_or_computed_as_transformers_does(kind, changes):
    fields = tiny_config(kind) | changes
    try:
        architecture = Architecture.from_hf(fields, "test")
    except InputError as error:
        assert all(problem.key.startswith(("rope_", "original_", "partial_")) for problem in error.problems)
        return
    module = of_transformers(fields)
    assert torch.equal(inverse_frequencies(architecture), module.inv_freq) and module.attention_scaling == 1.0
