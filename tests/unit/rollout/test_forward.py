"""What a rollout keeps for the gradient pass, and that the pass computes nothing twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.stage_module import runner
from ebft_mega.rollout import generate
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.types import TokenBatch
from tests.conftest import tiny_config
from tests.distinct_prefixes import prefixes_by_level

PLAN = BlockPlan(24, 4, 4, 4, 3)
SAMPLING = SamplingSettings(seed=7, temperature=0.4, top_p=1.0)  # so low that many begin alike
ROWS = 2


@pytest.fixture(params=[True, False], ids=["with targets", "rollouts alone"])
def setting(request, groups):
    """A policy that counts the rows of every call of a layer, a batch, and whether targets are learned."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, seed=1))
    calls: list[tuple[int, int]] = []
    for index, layer in enumerate(stage.layers):
        layer.register_forward_hook(lambda _, inputs, __, i=index: calls.append((i, inputs[0].shape[0])))
    tokens = torch.randint(0, 131, (ROWS, 24), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, torch.zeros_like(tokens), torch.arange(ROWS))
    return SimpleNamespace(stage=stage, batch=batch, calls=calls, targets=request.param)


def sample(s, reuse):
    policy = PipelinedModel.of(s.stage, runner(s.stage, recording=reuse == "activations"))
    (sampled,) = generate_rollouts(policy, [s.batch], PLAN, SAMPLING, 0, reuse, with_targets=s.targets)
    return sampled


def passes_of(s, sampled) -> list[int]:
    """Positions of each pass: all rows' documents, then what is distinct among the rollouts of each anchor."""
    document = PLAN.sequence_length - 1 if s.targets else PLAN.anchors[-1]
    levels = prefixes_by_level(sampled.rollout.tokens[..., :-1], s.batch, PLAN, document)
    return [ROWS * document, *(len(level.nodes) for level in levels)]


def gradients(s, sampled):
    """Log-probabilities and the gradient of a weighted sum of them, by parameter."""
    request = ScoreRequest(s.batch.tokens, sampled.rollout.forest, s.targets, SAMPLING.temperature)
    scores = score(s.stage, request, PLAN, saved=sampled.saved)
    loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in scores)
    s.stage.zero_grad()
    loss.backward()
    return [part.detach() for part in scores], {name: value.grad for name, value in s.stage.named_parameters()}


@pytest.mark.parametrize("reuse", ["checkpoints", "activations"])
def test_gradients_equal_those_of_a_separate_forward_pass(setting, reuse):
    s = setting
    scores, found = gradients(s, sample(s, reuse))
    expected_scores, expected = gradients(s, sample(s, "off"))
    for own, other in zip(scores, expected_scores, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_bfloat16_gradients_are_as_far_from_the_true_ones_as_those_of_a_separate_pass(groups):
    """Of the same sampled tokens; the weights are bfloat16 numbers, so that float64 shows what rounding does."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    tokens = torch.randint(0, 131, (ROWS, 24), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, torch.zeros_like(tokens), torch.arange(ROWS))
    settings = []
    for dtype in (torch.bfloat16, torch.float64):
        stage = Stage(architecture, StageShape.whole(architecture), groups, dtype)
        load_weights(stage, RandomWeights(architecture, seed=1))
        settings.append(SimpleNamespace(stage=stage, batch=batch, targets=True))
    low, exact = settings
    exact.stage.load_state_dict(
        {name: value.double() for name, value in low.stage.state_dict().items() if value is not None}
    )
    for reuse in ("checkpoints", "activations"):
        sampled = sample(low, reuse)
        _, found = gradients(low, sampled)
        _, apart = gradients(low, replace(sampled, saved=None))
        _, true = gradients(exact, replace(sampled, saved=None))
        scale = sum(value.norm() ** 2 for value in true.values()) ** 0.5
        own, other = (
            sum((gradient[name].double() - value).norm() ** 2 for name, value in true.items()) ** 0.5 / scale
            for gradient in (found, apart)
        )
        assert 1e-3 < own < 1.2 * other, (reuse, own, other)


def test_layers_run_once_forward_and_once_more_for_checkpoints_alone(setting):
    s, layers = setting, len(setting.stage.layers)
    sampled = sample(s, "activations")
    passes = passes_of(s, sampled)
    decode = [(layer, length) for length in passes for layer in range(layers)]
    assert s.calls == decode
    gradients(s, sampled)
    assert s.calls == decode

    s.calls.clear()
    sampled = sample(s, "checkpoints")
    gradients(s, sampled)
    assert s.calls == decode + [(layer, sum(passes)) for layer in reversed(range(layers))]


def test_what_is_saved_is_one_copy_of_every_layer_s_input_and_is_let_go(setting):
    s = setting
    sampled = sample(s, "checkpoints")
    inputs = sampled.saved.inputs
    length = sum(passes_of(s, sampled))
    assert inputs.shape() == (length, 1, s.stage.architecture.hidden_size)
    saved = (tensor for of_layer in inputs._inputs for tensor in of_layer)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in saved}
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert total == (len(s.stage.layers) + 1) * length * s.stage.architecture.hidden_size * 4
    gradients(s, sampled)
    assert not any(inputs._inputs)


@pytest.mark.parametrize("rows_at_once", [1, 10, 24])
def test_chunks_of_blocks_draw_and_score_the_same_tokens(setting, monkeypatch, rows_at_once):
    """One block at a time, one or two of them (six rows each), or all anchors but not all rollouts."""
    s = setting
    whole = sample(s, "checkpoints")
    monkeypatch.setattr(generate, "HEAD_ROWS", rows_at_once)
    parts = sample(s, "checkpoints")
    assert torch.equal(parts.rollout.tokens, whole.rollout.tokens)
    for own, other in zip(parts.saved.scores, whole.saved.scores, strict=True):
        torch.testing.assert_close(own.logprobs, other.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(own.normalizers, other.normalizers, atol=1e-5, rtol=0)


def test_nothing_is_saved_unless_it_is_asked_for(setting):
    assert sample(setting, "off").saved is None


@pytest.mark.parametrize("reuse", ["checkpoints", "activations"])
def test_a_released_forward_pass_holds_nothing(setting, reuse):
    saved = sample(setting, reuse).saved
    assert [field for field, value in vars(saved).items() if value]
    saved.release()
    assert not [field for field, value in vars(saved).items() if value]


def test_saved_log_probabilities_are_those_of_the_sampled_tokens(setting):
    """A separate forward pass finds them, too; without it nothing but the targets goes through the head again."""
    s = setting
    rows = []
    s.stage.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    sampled = sample(s, "checkpoints")
    document = PLAN.sequence_length - 1 if s.targets else PLAN.anchors[-1]
    levels = prefixes_by_level(sampled.rollout.tokens[..., :-1], s.batch, PLAN, document)
    assert rows == [ROWS * PLAN.num_blocks, *(len(level.prefixes) for level in levels)]
    assert [part.logprobs.shape for part in sampled.saved.scores] == [(length, PLAN.num_samples) for length in rows]


def test_the_head_is_called_equally_often_whatever_is_merged(setting, monkeypatch):
    """With parameters that are gathered for each call, replicas with other rollouts must not wait for each other."""
    monkeypatch.setattr(generate, "HEAD_ROWS", 8)
    calls = []
    setting.stage.head.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[0]))

    def calls_at(temperature, merges) -> list[int]:
        calls.clear()
        policy = PipelinedModel.of(setting.stage, runner(setting.stage))
        sampling = replace(SAMPLING, temperature=temperature, merge_equal_prefixes=merges)
        generate_rollouts(policy, [setting.batch], PLAN, sampling, 0)
        return list(calls)

    few, some, all_different = calls_at(0.01, True), calls_at(0.4, True), calls_at(1.0, False)
    assert sum(few) < sum(some) < sum(all_different)
    assert len(few) == len(some) == len(all_different)
