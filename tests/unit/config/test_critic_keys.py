"""Settings that a token critic refuses, each by its name, before anything starts."""

import pytest

from ebft_mega.errors import ConfigError

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
ebft: {advantage_estimator: token_critic, use_whitening: false, alignment: inner_product}
train: {max_steps: 100}
"""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ebft.use_whitening=true", "use_whitening: found true, with ebft.advantage_estimator token_critic"),
        ("ebft.top_p=0.9", "ebft.top_p: found 0.9, with"),
        ("ebft.n_samples_per_prompt=1", "ebft.n_samples_per_prompt: found 1, with"),
    ],
)
def test_what_would_have_another_mean_is_refused(load, override, words):
    with pytest.raises(ConfigError, match=words):
        load(override)


@pytest.mark.parametrize(
    ("overrides", "works"),
    [
        ((), True),
        (("ebft.embed_method=completion_mean",), True),
        (("ebft.embed_method=mean_pooling",), False),
        (("ebft.feature_norm=per_layer",), False),
        (("ebft.layer_weights=[1, 2, 1]",), False),
        (("ebft.embed_method=concat",), False),
    ],
)
def test_cosines_are_taken_where_features_have_length_one(load, overrides, works):
    cosine = ("ebft.alignment=cosine", *overrides)
    if works:
        load(*cosine)
    else:
        with pytest.raises(ConfigError, match="ebft.alignment: found cosine, with ebft.advantage_estimator token_cri"):
            load(*cosine)
    load("ebft.alignment=inner_product", *overrides)


def test_two_rollouts_work_and_other_runs_are_left_alone(load):
    load("ebft.n_samples_per_prompt=2")
    load("ebft.advantage_estimator=rloo", "ebft.use_whitening=true", "ebft.top_p=0.9")
    load("ebft.rl_coef=0", "ebft.ce_coef=1", "ebft.use_whitening=true", "ebft.top_p=0.9")


def test_options_have_bounds(load):
    load("options.token_critic.rank=16", "options.token_critic.leave_one_out_share=0")
    with pytest.raises(ConfigError, match="options.token_critic.decay"):
        load("options.token_critic.decay=1.5")
