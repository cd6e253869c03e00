"""Every key of the interface is known, has its default and is described."""

from pathlib import Path

import pytest

from ebft_mega.config.fields import allowed_text
from ebft_mega.config.schema import RunConfig, all_keys

INTERFACE_DEFAULTS = {
    "seed": 0,
    "model.init_from": None,
    "model.config": None,
    "data.shards": None,
    "data.sources": None,
    "data.document_masking": False,
    "data.train_on_first_token": True,
    "data.on_error": "raise",
    "data.skip_rows": (),
    "permissions": "private",
    "deterministic": False,
    "plugins": (),
    "options": {},
    "data.allow_changed": False,
    "data.max_skipped_rows": 100,
    "data.max_skipped_share": 0.001,
    "data.workers": 1,
    "data.tokenizer": None,
    "data.cache": Path("runs/cache"),
    "data.cache_gigabytes": 100.0,
    "data.redirect_hosts": (),
    "evaluation.shards": None,
    "evaluation.interval": None,
    "evaluation.rows": 64,
    "ebft.mode": "strided",
    "ebft.stride": 8,
    "ebft.context_length": 8,
    "ebft.generate_max_len": 8,
    "ebft.n_samples_per_prompt": 4,
    "ebft.temperature": 0.6,
    "ebft.top_p": 1.0,
    "ebft.merge_equal_prefixes": True,
    "ebft.feature_layers": (0.25, 0.5, 0.75),
    "ebft.embed_method": "last_token",
    "ebft.layer_weights": None,
    "ebft.feature_norm": "joint",
    "ebft.use_whitening": True,
    "ebft.whitening": "sample",
    "ebft.alignment": "cosine",
    "ebft.noise_interval": None,
    "ebft.alignment_coef": 1.0,
    "ebft.diversity_coef": 1.0,
    "ebft.reward_terms": {},
    "ebft.rl_coef": 1.0,
    "ebft.entropy_coef": 0.0,
    "ebft.ce_coef": 0.0,
    "ebft.advantage_estimator": "rloo",
    "ebft.feature_model": None,
    "parallel.tensor_parallel_size": 1,
    "parallel.pipeline_parallel_size": 1,
    "parallel.sequence_parallel": False,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 1,
    "train.max_steps": None,
    "train.max_tokens": None,
    "train.max_run_minutes": None,
    "train.lr": 1e-6,
    "train.lr_scheduler": "constant",
    "train.min_lr": 0.0,
    "train.warmup_steps": 0,
    "train.warmup_share": 0.0,
    "train.optimizer": "adamw",
    "train.weight_decay": 0.0,
    "train.betas": (0.9, 0.95),
    "train.grad_clip": 1.0,
    "train.dtype": "bfloat16",
    "train.activation_checkpointing": "none",
    "train.attention": "auto",
    "train.step_timeout_minutes": 30.0,
    "zero.stage": 3,
    "zero.hold_parameters": "rollout",
    "zero.feature_network": "auto",
    "zero.offload_optimizer": "none",
    "learn.reuse_rollout": "auto",
    "checkpoint.interval": None,
    "checkpoint.final": True,
    "checkpoint.keep_last": None,
    "checkpoint.keep_every": None,
    "checkpoint.resume": "auto",
    "checkpoint.on_error": "continue",
    "profile.start": None,
    "profile.steps": None,
}
REQUIRED = {"output_dir", "data.sequence_length"}


def test_keys_are_exactly_those_of_the_interface():
    assert set(all_keys()) == set(INTERFACE_DEFAULTS) | REQUIRED


@pytest.mark.parametrize("key", INTERFACE_DEFAULTS)
def test_default(key):
    assert all_keys()[key].default == INTERFACE_DEFAULTS[key]


@pytest.mark.parametrize("key", sorted(INTERFACE_DEFAULTS.keys() | REQUIRED))
def test_key_is_described(key):
    field = all_keys()[key]
    assert field.description and allowed_text(field)
    assert field.is_required() == (key in REQUIRED)


def test_values_cannot_change():
    config = RunConfig.model_validate(
        {"output_dir": "runs/a", "model": {}, "data": {"shards": "d", "sequence_length": 64}, "train": {}}
    )
    assert config.data.shards == Path("d")
    with pytest.raises(Exception, match="frozen"):
        config.data.sequence_length = 3
