"""Shares of distinct rows: one sampling gives those of fewer samples and tokens, too."""

import json

import pytest
import torch

from ebft_mega.apps import distinct_rows
from ebft_mega.apps.distinct_rows import Choices, measure_distinct_rows, table_lines, with_geometry
from ebft_mega.apps.evaluation_inputs import EvaluationRequest
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.config.load import load_config
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.errors import InputError
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.types import TokenBatch


@pytest.fixture
def config(inputs):
    ebft = {"stride": 4, "context_length": 4, "generate_max_len": 4, "n_samples_per_prompt": 4, "temperature": 0.5}
    return load_config(inputs.write(ebft=ebft, train__dtype="float32"))


@pytest.fixture
def policy(inputs, groups):
    """A model whose samples branch late enough."""
    architecture = Architecture.from_hf({**inputs.model_fields, "initializer_range": 0.5}, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, 1))
    return PipelinedModel.of(stage.requires_grad_(False))


@pytest.mark.parametrize("masking", [False, True])
def test_fewer_samples_and_tokens_are_those_of_a_sampling_of_their_own(config, policy, masking):
    """Rows whose own tokens come back, so that some rollouts continue as their documents do."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_masking": masking})})
    tokens = torch.tensor([[3, 5], [7, 7]]).repeat(1, 16)
    rows = TokenBatch(tokens, (torch.arange(32) // 11).expand(2, -1), torch.arange(2))
    rows = rows.with_document_masking() if masking else rows
    choices = Choices((1, 2, 5), (1, 2, 4), (0.5,))
    together: dict = {}
    distinct_rows._count(policy, rows, with_geometry(config, 5, 4, 4), choices, 0.5, together)
    assert set(together) == {(n, length) for n in choices.samples for length in choices.lengths}
    for samples, length in together:
        own: dict = {}
        alone = with_geometry(config, samples, length, 4)
        cut = TokenBatch(
            rows.tokens[:, : alone.data.sequence_length],
            rows.document_ids[:, : alone.data.sequence_length],
            rows.row_indices,
        )
        cut = cut.with_document_masking() if masking else cut
        distinct_rows._count(policy, cut, alone, Choices((samples,), (length,), (0.5,)), 0.5, own)
        assert own[samples, length] == together[samples, length]
    shares = [together[n, 4][0].shares(with_geometry(config, n, 4, 4).block_plan) for n in choices.samples]
    assert 0 < shares[2].policy < shares[1].policy < 1 and shares[2].policy <= shares[2].head < 1


def test_a_table_and_a_file(config, inputs, tmp_path, groups, capsys):
    model = inputs.root / "model"
    request = EvaluationRequest(model, model, inputs.root / "held_out", rows=3, skip_rows=0)
    choices = Choices.of(config, [4, 2, 2], None, [0.5, 1.0])
    assert choices == Choices((2, 4), (4,), (0.5, 1.0))
    path = measure_distinct_rows(request, choices, config, tmp_path / "out")
    content = json.loads(path.read_text())
    assert (content["rows"], content["sequence_length"], content["blocks"]) == (3, 32, 7)
    assert [(line["temperature"], line["n"], line["G"]) for line in content["found"]] == [
        (0.5, 2, 4),
        (0.5, 4, 4),
        (1.0, 2, 4),
        (1.0, 4, 4),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("temperature 0.5: 3 rows in ") and printed[-4:] == table_lines(content["found"])[1:]
    architecture = Architecture.from_directory(model)
    shape = StepShape.of(with_geometry(config, 4, 4, 4), architecture, architecture)
    needed = sum(phase.flops.total for phase in cost_of_step(shape, "activations").phases.values())
    for line in content["found"]:
        assert 0 < line["policy"] <= line["features"] <= 1
        assert line["flops_per_row"] <= line["flops_per_row_without_merging"]
    assert content["found"][-1]["flops_per_row_without_merging"] == needed
    # What it prints for the dry run is what the dry run takes.
    *_, features, policy, head = printed[-1].split()
    assert float(features) == pytest.approx(content["found"][-1]["features"], abs=1e-4)
    assert float(policy) <= float(features) and float(policy) <= float(head)


def test_one_token_has_no_share_of_the_policy():
    line = {"temperature": 1.0, "n": 4, "G": 1, "policy": None, "head": None, "features": 0.25}
    text = table_lines([{**line, "flops_per_row": 1e9, "flops_per_row_without_merging": 4e9}])[1]
    assert text.split() == ["1", "1", "4", "0.250", "1", "0.250", "0.2500"]


def test_rows_are_cut_to_whole_blocks_of_the_longest_rollouts(config):
    anchors = {with_geometry(config, 2, length, 7).block_plan.anchors for length in (1, 3, 7)}
    assert anchors == {(4, 8, 12, 16, 20, 24)}  # of 32 tokens one is left over
    with pytest.raises(InputError, match="found rows of 32; expected of 33"):
        with_geometry(config, 2, 4, 29)
