"""Fixtures shared by all tests: one gloo process group of size one, tiny random models of every architecture."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# What is ignored stays ignored in a run (`nohup`), and shells ignore SIGINT in what they start in the background. Tests
# that send these signals mean programs that were started as usual: what has a handler is not ignored after an exec.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)

# Time limits per example would measure how busy the machine is. CI runs the same examples every time, so that a change
# is judged by itself; elsewhere new ones are tried.
settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("project")

TINY_SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def tiny_config(model_type: str, tied: bool = True, **changes) -> dict:
    """A Hugging Face config of a model with a few thousand parameters and far from uniform outputs."""
    return {"model_type": model_type, **TINY_SIZES, "tie_word_embeddings": tied, **changes}


@pytest.fixture(scope="session")
def groups():
    """Process groups of a job of one rank."""
    import torch

    from ebft_mega.parallel.groups import connect, make_process_groups

    torch.set_num_threads(1)
    groups = make_process_groups(connect())
    # A job of one rank names itself in the environment; programs that tests start must not take that for theirs.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return groups
