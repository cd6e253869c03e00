"""Model FLOPs utilisation: what is counted, and the peaks it is divided by."""

import pytest

from ebft_mega.apps.benchmark.case import MODELS, BenchCase
from ebft_mega.config.schema import EbftConfig, LearnConfig, TrainConfig
from ebft_mega.cost.mfu import PEAKS, model_flops_utilisation, peak_flops
from ebft_mega.cost.step_cost import StepShape, cost_of_step

LARGE = MODELS["7b"].architecture


def config_of(**sections):
    return BenchCase("", 1024).config(MODELS["7b"], "checkpoints").model_copy(update=sections)


def utilisation(config, seconds=10.0, world_size=1, peak=989.4e12):
    return model_flops_utilisation(config, LARGE, LARGE, seconds, world_size, peak)


def test_it_is_the_step_s_work_over_what_the_devices_could_do():
    config = config_of(train=TrainConfig(global_batch_size=16, max_steps=1))
    cost = cost_of_step(StepShape.of(config, LARGE, LARGE), "activations")
    needed = cost.generate.flops.total + cost.features.flops.total + cost.policy_backward.flops.total
    assert utilisation(config) == pytest.approx(16 * needed / (10.0 * 989.4e12))
    # The limit of 241.2 TF a row, and what last layers do for rows that nobody reads.
    assert utilisation(config) == pytest.approx(16 * 242.4e12 / (10.0 * 989.4e12), rel=1e-3)


def test_more_devices_or_seconds_mean_less_of_each():
    config = config_of()
    assert utilisation(config, world_size=8) == pytest.approx(utilisation(config) / 8)
    assert utilisation(config, seconds=20.0) == pytest.approx(utilisation(config) / 2)


@pytest.mark.parametrize("ce_coef", [0.0, 0.3])
def test_work_done_twice_does_not_count(ce_coef):
    """The same seconds are the same utilisation, whatever is recomputed within them."""
    ebft = EbftConfig(ce_coef=ce_coef)
    values = {
        utilisation(
            config_of(
                ebft=ebft,
                learn=LearnConfig(reuse_rollout=reuse),
                train=TrainConfig(max_steps=1, activation_checkpointing=checkpointing),
            )
        )
        for reuse in ("checkpoints", "activations", "off", "auto")
        for checkpointing in ("none", "full")
    }
    assert len(values) == 1


def test_plain_pretraining_is_three_forwards():
    config = config_of(ebft=EbftConfig(rl_coef=0.0, ce_coef=1.0), train=TrainConfig(global_batch_size=1, max_steps=1))
    forward = cost_of_step(StepShape.of(config, LARGE, LARGE), "off").policy_forward.flops.total
    assert utilisation(config) == pytest.approx(3 * forward / (10.0 * 989.4e12))


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312.0e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756.0e12, 51.2e12),
        ("NVIDIA H100 NVL", 835.5e12, 60.0e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA GH200 480GB", 989.4e12, 66.9e12),
        ("NVIDIA L4", 121.0e12, 30.3e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        # Names that contain another's must not be taken for it, and what is unknown stays unknown.
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 2080 Ti", None, None),
        ("AMD Instinct MI300X", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_of_devices(name, bfloat16, float32):
    assert peak_flops(name, "bfloat16") == (None if bfloat16 is None else pytest.approx(bfloat16))
    assert peak_flops(name, "float32") == (None if float32 is None else pytest.approx(float32))


def test_every_peak_knows_both_dtypes():
    assert all(set(peaks) == {"bfloat16", "float32"} for _, peaks in PEAKS)
