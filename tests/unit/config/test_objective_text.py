"""What a configuration says that it follows; `tests/unit/objective/test_exact_objectives.py` shows that it does."""

import pytest

from ebft_mega.config.load import load_config
from ebft_mega.config.objective_text import followed_objective
from tests.own_entries import in_registries

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 100}
ebft: {use_whitening: false, embed_method: mean_pooling}
"""
INNER = "ebft.alignment=inner_product"
LAST = "ebft.embed_method=last_token"
EXPECTED = {
    (): "|E phi|^2 - 2 E cos(phi, y)",
    (INNER,): "feature matching, |E phi - y|^2",
    (INNER, "ebft.ce_coef=0.3"): "feature matching, |E phi - y|^2 + 0.3 (cross-entropy)",
    (INNER, "ebft.rl_coef=0.5", "ebft.ce_coef=1"): "0.5 (feature matching, |E phi - y|^2) + cross-entropy",
    (INNER, "ebft.diversity_coef=0.5"): "0.5 |E phi|^2 - 2 y . E phi",
    (INNER, "ebft.alignment_coef=0.7"): "|E phi|^2 - 1.4 y . E phi",
    (INNER, "ebft.diversity_coef=0"): "-2 y . E phi",
    (INNER, "ebft.alignment_coef=0"): "|E phi|^2",
    (INNER, "ebft.n_samples_per_prompt=1"): "-2 y . E phi",
    ("ebft.alignment_coef=0", "ebft.n_samples_per_prompt=1"): "no function (one rollout has no other to differ from)",
    (LAST,): "feature matching, |E phi - y|^2",
    (LAST, "ebft.feature_norm=per_layer"): "|E phi|^2 - 2 E cos(phi, y)",
    (LAST, "ebft.feature_layers=[0.5, 1]", "ebft.layer_weights=[1, 2]"): "|E phi|^2 - 2 E cos(phi, y)",
    ("ebft.embed_method=completion_mean",): "feature matching, |E phi - y|^2",
    (INNER, "ebft.reward_terms={matches: 0.5, surprise: -1}"): "feature matching, |E phi - y|^2 - 0.5 E matches "
    "+ E surprise",
    (INNER, "ebft.advantage_estimator=reinforce"): "feature matching, |E phi - y|^2",
    (INNER, "ebft.advantage_estimator=token_critic"): "feature matching, |E phi - y|^2",
    (INNER, "ebft.advantage_estimator=group_norm"): "no function (advantages of group_norm)",
    (INNER, "ebft.advantage_estimator=later"): "not known (advantages of later)",
    (INNER, "ebft.top_p=0.9"): "no function (rollouts of a nucleus)",
    (INNER, "ebft.use_whitening=true", "ebft.ce_coef=0.1"): "no function (whitened rewards) + 0.1 (cross-entropy)",
    ("ebft.rl_coef=0", "ebft.ce_coef=1"): "cross-entropy",
    ("ebft.rl_coef=0", "ebft.ce_coef=1", "ebft.entropy_coef=0.1"): "cross-entropy - 0.1 (entropy of the next token)",
}


@pytest.mark.parametrize("overrides", EXPECTED, ids=" ".join)
def test_objective(overrides, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(BASE)
    with in_registries():
        assert followed_objective(load_config(path, overrides)) == EXPECTED[overrides]
