"""The feature network is the same for as long as a run lasts: its weights, and the settings that decide it."""

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.run_state import RunState
from ebft_mega.errors import InputError
from ebft_mega.lifecycle.model_identity import require_same_feature_architecture
from tests.conftest import tiny_config
from tests.unit.checkpoint.folder_stand_ins import run_config, run_state


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_factor"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, "head_dim"),
    ],
)
def test_a_resumed_run_has_the_feature_network_that_it_began_with(tmp_path, changes, name):
    """The weights are the same ones, byte for byte; what is computed with them is not."""
    config = run_config(tmp_path, ebft__feature_model=str(tmp_path)).with_places({"ebft.feature_model": "run.yaml:9"})
    began_with = Architecture.from_hf(tiny_config("llama"), "test")
    described = require_same_feature_architecture(config, began_with, None)
    state = RunState.from_json(run_state(3, feature_architecture=described).to_json())
    assert require_same_feature_architecture(config, began_with, state) == described
    with pytest.raises(InputError) as caught:
        require_same_feature_architecture(config, Architecture.from_hf(tiny_config("llama") | changes, "test"), state)
    assert f"ebft.feature_model: {name}" in [problem.key for problem in caught.value.problems]
    assert all(problem.where == "run.yaml:9" for problem in caught.value.problems)
    # Checkpoints of before do not say it.
    require_same_feature_architecture(config, Architecture.from_hf(tiny_config("qwen2"), "test"), run_state(3))
