"""Whatever the model, the machine and the data: what is written fits and loads, or it is said what is missing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ebft_mega.apps.starter import starter_fit
from ebft_mega.apps.starter.machine import Machine
from ebft_mega.apps.starter.starter_fit import Supply
from ebft_mega.apps.starter.starter_text import Inputs
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.load import load_config
from ebft_mega.errors import InputError
from ebft_mega.planning import auto
from ebft_mega.planning.run_plan import plan_of_sizes

PLACES = Path("/models/a: #b"), Path("/data/" + "long name " * 12 + "x"), Path("/data/$HOME")
FIELDS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        "vocab_size": st.sampled_from([3, 257, 50257, 151937]),
        "num_hidden_layers": st.sampled_from([1, 2, 7, 28, 126]),
        "num_key_value_heads": st.sampled_from([1, 3, 4, 7, 8]),
        "intermediate_size": st.sampled_from([48, 999, 11008]),
        "max_position_embeddings": st.sampled_from([32, 100, 2048, 1 << 40]),
        "tie_word_embeddings": st.booleans(),
    }
)
HEADS = st.tuples(st.sampled_from([1, 2, 5, 7]), st.sampled_from([8, 80, 128]))  # for each key-value head; their width
GPUS = st.sampled_from([1, 3, 7, 8, 12, 64, 1000])
GIGABYTES = st.sampled_from([0.001, 8, 80, 1e6])
TOKENS = st.sampled_from([1, 640, 10_240, 10**6, 10**11])


def architecture_of(fields, heads):
    each, width = heads
    count = each * fields["num_key_value_heads"]
    shape = {"num_attention_heads": count, "head_dim": width, "hidden_size": count * width}
    try:
        return Architecture.from_hf(fields | shape, "config.json")
    except InputError:
        return None


def inputs_of(architecture, machine):
    model, data, held_out = PLACES
    return Inputs(
        name="my",
        config=Path("my.yaml"),
        model=model,
        architecture={},
        parameters=architecture.num_parameters,
        data=data,
        data_tokens=1,
        held_out=held_out,
        machine=machine.words,
        gpu_gigabytes=machine.gpu_gigabytes,
    )


def fitted(architecture, machine, tokens, held_out, monkeypatch):
    """Fit without files: of the inputs only the sizes are looked at."""
    monkeypatch.setattr(starter_fit, "check_run", lambda config, size: plan_of_sizes(config, size, architecture))
    supply = Supply(SimpleNamespace(tokens=tokens), SimpleNamespace(tokens=held_out))
    return starter_fit.fit(inputs_of(architecture, machine), architecture, supply, machine)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=FIELDS, heads=HEADS, gpus=GPUS, gigabytes=GIGABYTES, tokens=TOKENS, held_out=TOKENS)
def test_what_is_written_fits_or_it_is_said_what_is_missing(
    tmp_path_factory, fields, heads, gpus, gigabytes, tokens, held_out
):
    architecture = architecture_of(fields, heads)
    assume(architecture is not None)
    machine = Machine(gpus, round(gigabytes * 1e9), is_cpu=False)
    with pytest.MonkeyPatch.context() as patched:
        try:
            text = fitted(architecture, machine, tokens, held_out, patched).text
        except InputError as error:
            assert {problem.where for problem in error.problems} <= {"--data", "--held-out", "--gpu-memory"}
            return
    path = tmp_path_factory.mktemp("my") / "my.yaml"
    path.write_text(text, encoding="utf-8")
    config = load_config(path)
    assert (config.model.init_from, config.data.shards, config.evaluation.shards) == PLACES
    found = auto.fit(config, plan_of_sizes(config, gpus, architecture), machine.memory_bytes)
    assert found.fits and found.choices.reuse_rollout == config.learn.reuse_rollout
    step = config.train.global_batch_size * config.data.sequence_length
    assert config.train.max_steps * step <= tokens
    assert config.evaluation.rows * config.data.sequence_length <= held_out


def test_data_for_few_replicas_is_enough_where_slices_make_them_few(monkeypatch):
    fields = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 32}
    architecture = Architecture.from_hf(fields, "config.json")
    machine = Machine(64, 10**9, is_cpu=False)
    layouts = []
    for tokens in (64 * 32, 16 * 32):
        found = fitted(architecture, machine, tokens, 32, monkeypatch)
        layouts.append(found.plan.parallel.data_parallel)
    assert layouts == [64, 16]
    with pytest.raises(InputError, match=r"--data: tokens: found 511; expected at least 512"):
        fitted(architecture, machine, 511, 32, monkeypatch)


def test_a_processor_is_not_told_of_gpus(monkeypatch):
    fields = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 32}
    machine = Machine(1, 1000, is_cpu=True)
    with pytest.raises(InputError) as refused:
        fitted(Architecture.from_hf(fields, "config.json"), machine, 10**6, 10**4, monkeypatch)
    assert [problem.where for problem in refused.value.problems] == ["--model"]
