"""Times, throughput, utilisation and memory of a step, without running one."""

from types import SimpleNamespace

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.attention import flex
from ebft_mega.config.load import load_config
from ebft_mega.cost.mfu import model_flops_utilisation
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.train.step_metrics import memory_metrics, speed_metrics

CONFIG = """
output_dir: unused
model:
  config: {model_type: llama, vocab_size: 131, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 5,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8}
data: {shards: unused, sequence_length: 24}
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, ce_coef: 0.1}
train: {global_batch_size: 6, max_steps: 3, lr: 3.0e-3}
"""


@pytest.fixture
def trainer(tmp_path, groups, monkeypatch):
    """What the summary reads of a trainer whose feature network is another model than its policy."""

    monkeypatch.setattr(flex, "_compilations", 0)  # tests of the kernels in this process count theirs

    def make(*overrides):
        path = tmp_path / "c.yaml"
        path.write_text(CONFIG)
        config = load_config(path, overrides)
        policy = Architecture.from_hf(config.model.config, "policy")
        features = Architecture.from_hf({**config.model.config, "num_hidden_layers": 9}, "features")
        return SimpleNamespace(
            config=config,
            plan=config.block_plan,
            stage=SimpleNamespace(architecture=policy),
            feature_network=SimpleNamespace(stage=SimpleNamespace(architecture=features))
            if config.uses_rollouts
            else None,
        )

    return make


def test_times_and_throughput(trainer):
    assert speed_metrics(trainer(), 2.0, {"data": 0.1, "learn": 1.5}, 0.7, None) == {
        "perf/data_seconds": 0.1,
        "perf/learn_seconds": 1.5,
        "perf/communication_seconds": 0.7,
        "perf/step_seconds": 2.0,
        "perf/documents_per_second": 3.0,
        "perf/tokens_per_second": 3.0 * 24,  # rows of 24 tokens; what is sampled from them does not count
        "perf/rollout_tokens_per_second": 6 * (5 * 3 * 4) / 2.0,  # rows, blocks, samples, tokens
    }


def test_utilisation_of_a_device_whose_peak_is_known(trainer):
    given = trainer()
    found = speed_metrics(given, 2.0, {}, 0.0, 1e9)["perf/mfu"]
    architectures = given.stage.architecture, given.feature_network.stage.architecture
    assert found == model_flops_utilisation(given.config, *architectures, 2.0, 1, 1e9) > 0
    assert found != model_flops_utilisation(given.config, architectures[0], architectures[0], 2.0, 1, 1e9)
    assert speed_metrics(given, 4.0, {}, 0.0, 1e9)["perf/mfu"] == pytest.approx(found / 2)


def test_without_rollouts_there_is_a_utilisation_but_no_rollout_tokens(trainer):
    found = speed_metrics(trainer("ebft.rl_coef=0"), 2.0, {}, 0.0, 1e9)
    assert found["perf/mfu"] > 0 and "perf/rollout_tokens_per_second" not in found


def test_compiled_kernels_are_counted_where_there_are_any(trainer, monkeypatch):
    assert "perf/compiled_kernels" not in speed_metrics(trainer(), 2.0, {}, 0.0, None)
    monkeypatch.setattr(flex, "_compilations", 3)
    assert speed_metrics(trainer(), 2.0, {}, 0.0, None)["perf/compiled_kernels"] == 3.0


def test_memory_by_phase_and_of_the_run():
    readings = iter([1, 5, 2])
    gauge = SimpleNamespace(can_restart=True, peak=lambda: next(readings), restart=lambda: None)
    memory = PhaseMemory(gauge)
    memory.enter("rollout")
    memory.leave()
    assert memory_metrics(memory) == {"memory/rollout_peak_bytes": 5.0, "memory/peak_bytes": 5.0}
