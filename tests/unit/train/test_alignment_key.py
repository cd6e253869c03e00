"""`ebft.alignment` reaches the rewards of a step, and no figure of an evaluation."""

import pytest
import torch

from ebft_mega.config.load import load_config
from ebft_mega.evaluation.held_out import EvaluationSettings
from ebft_mega.forest import Forest
from ebft_mega.reward.whitening import whitened_products
from ebft_mega.train.experience import Rewarding, make_experience
from ebft_mega.types import Rollout

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 8}
ebft: {stride: 2, context_length: 2, generate_max_len: 2, n_samples_per_prompt: 3, alignment_coef: 0.5}
train: {max_steps: 100}
"""


@pytest.mark.parametrize("whitening", ["none", "sample", "feature"])
def test_the_key_chooses_what_is_doubled(whitening, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(BASE)
    whitens = ("ebft.use_whitening=false",) if whitening == "none" else (f"ebft.whitening={whitening}",)
    configs = {
        kind: load_config(path, (*whitens, *settings))
        for kind, settings in {
            "default": (),
            **{k: (f"ebft.alignment={k}",) for k in ("cosine", "inner_product")},
        }.items()
    }
    draws = torch.Generator().manual_seed(1)
    plan = configs["default"].block_plan
    tokens = torch.randint(0, 9, (1, plan.num_samples, plan.num_blocks, plan.generate_length), generator=draws)
    features = torch.randn(1, plan.num_blocks, plan.num_samples + 1, 6, dtype=torch.float64, generator=draws)
    gram = features @ features.transpose(-1, -2)
    products = whitened_products(gram, whitening)
    expected = {"default": products.cosine, "cosine": products.cosine, "inner_product": products.cross}
    for kind, config in configs.items():
        rollout = Rollout(tokens, Forest.of(tokens, merges=True))
        experience = make_experience(gram, rollout, Rewarding.of(config), None, torch.zeros(1, 8, dtype=torch.int64))
        terms = experience.rewards.terms
        torch.testing.assert_close(terms["alignment"].values, 2 * expected[kind].transpose(-1, -2))
        assert list(terms) == ["alignment", "diversity"] and terms["alignment"].coefficient == 0.5
        reward = 0.5 * terms["alignment"].values - terms["diversity"].values
        torch.testing.assert_close(experience.rewards.reward, reward)
    assert len({EvaluationSettings.of(config) for config in configs.values()}) == 1
