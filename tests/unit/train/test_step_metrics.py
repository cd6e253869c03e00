"""Times, throughput, utilisation and memory of a step, without running one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.attention import flex
from ebft_mega.config.load import load_config
from ebft_mega.cost.mfu import model_flops_utilisation
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.forest import Forest
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.train import step_metrics as summary
from ebft_mega.train.step_metrics import (
    distinct_row_metrics,
    distinct_shares_in,
    memory_metrics,
    speed_metrics,
    step_metrics,
)

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


def forest_of(*rollouts, document=None):
    """Of one row and one block, whose document continues with those tokens."""
    own = None if document is None else torch.tensor([document])
    return Forest.of(torch.tensor(rollouts)[None, :, None], merges=True, continuations=own)


def result_of(*forests):
    rollouts = [SimpleNamespace(rollout=SimpleNamespace(forest=forest)) for forest in forests]
    return SimpleNamespace(experiences=rollouts)


# 1, 2 and 3 nodes of 3; 2, 2 and 3 of 3, since the document has (1, 6) itself.
BRANCHING = forest_of((5, 6, 7), (5, 6, 8), (5, 9, 8))
DIFFERENT = forest_of((1, 6, 7), (2, 6, 7), (3, 6, 7), document=(1, 6, 8))
OWN = {"policy": 7 / 12, "head": 9 / 12, "features": 13 / 18}


@pytest.mark.parametrize(("rank", "others"), [(0, (0.5, 0.6, 0.9)), (1, (1.0, 1.0, 0.5))])
def test_shares_of_distinct_rows_over_micro_batches_and_replicas(monkeypatch, rank, others):
    """This replica has two micro-batches; the other one is in the other place of the same reduction."""
    other = [value for share in others for value in ((0.0, share) if rank == 0 else (share, 0.0))]
    groups = SimpleNamespace(data_parallel_rank=rank, data_parallel_size=2, data_parallel=None)
    sent = []

    def all_reduce(values, group):
        sent.append(values.clone())
        values.add_(torch.tensor([0.0, 0.0, *other], dtype=torch.float64))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(summary, "_mask_metrics", lambda trainer, masks: {})
    terms = SimpleNamespace(terms=SimpleNamespace(rl=torch.tensor(1.0), ce=torch.tensor(2.0), entropy=None))
    result = result_of(BRANCHING, DIFFERENT)
    result.learned, result.update = [terms], SimpleNamespace(grad_norm=0.0)
    result.masks = SimpleNamespace(num_blocks=0)  # the sums over blocks are left out
    ebft = SimpleNamespace(rl_coef=1.0, ce_coef=1.0, entropy_coef=0.0)
    given = SimpleNamespace(groups=groups, config=SimpleNamespace(ebft=ebft, uses_targets=True))
    metrics = step_metrics(given, result, 0.1)
    found = {key: value for key, value in metrics.items() if key.startswith("perf/")}
    expected = {}
    for (phase, own), share in zip(OWN.items(), others, strict=True):
        expected |= {phase: pytest.approx((own + share) / 2), f"{phase}_max": pytest.approx(max(own, share))}
    assert found == {f"perf/distinct_rows_share/{name}": value for name, value in expected.items()}
    assert len(sent) == 1 and len(sent[0]) == 2 + 2 * 3  # one reduction, for losses and shares alike
    shares = distinct_shares_in(metrics)
    assert (shares.policy, shares.head, shares.features) == tuple(expected[phase] for phase in OWN)


def test_one_token_a_rollout_has_no_rows_in_the_policy(trainer):
    found = distinct_row_metrics(result_of(forest_of((1,), (1,), (2,))), [2 / 3])
    assert found == {"perf/distinct_rows_share/features": 2 / 3, "perf/distinct_rows_share/features_max": 2 / 3}
    assert distinct_shares_in(found) == DistinctShares(2 / 3)
    assert distinct_row_metrics(SimpleNamespace(experiences=()), []) == {}
    assert distinct_shares_in({}) is None
    given = trainer("ebft.generate_max_len=1", "ebft.context_length=3", "ebft.stride=4")
    found = speed_metrics(given, 2.0, {}, 0.0, 1e9, DistinctShares(2 / 3))
    assert 0 < found["perf/mfu"] < found["perf/mfu_without_merging"]


def test_utilisation_counts_distinct_rows_and_beside_it_all(trainer):
    given = trainer()
    found = speed_metrics(given, 2.0, {}, 0.0, 1e9, DistinctShares(0.6, 0.5))
    of_all = speed_metrics(given, 2.0, {}, 0.0, 1e9)["perf/mfu"]
    assert found["perf/mfu_without_merging"] == of_all
    architectures = given.stage.architecture, given.feature_network.stage.architecture
    nodes = RolloutNodes.of_shares(given.plan, DistinctShares(0.6, 0.5))
    assert found["perf/mfu"] == model_flops_utilisation(given.config, *architectures, 2.0, 1, 1e9, nodes) < of_all
    equal = speed_metrics(given, 2.0, {}, 0.0, 1e9, DistinctShares(1.0))
    assert equal["perf/mfu"] == equal["perf/mfu_without_merging"] == of_all
