"""Evaluate a Hugging Face model directory on held-out rows, in one process and without an optimizer."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute, make_route
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import fixed_rows
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.tokenizer import tokenizer_sha256
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.held_out import Evaluation, EvaluationSettings, evaluate, merge
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.io.progress_bar import track
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.types import DTYPES, TokenBatch


@dataclass(frozen=True)
class EvaluationRequest:
    """The model to evaluate, the feature network, and the held-out rows."""

    model: Path
    feature_model: Path  # the frozen feature network; the same for all models that are compared
    data: Path
    rows: int
    skip_rows: int  # rows at the start of the dataset that are left out


def evaluate_directory(request: EvaluationRequest, config: RunConfig, output: Path) -> Path:
    """Evaluate a model and write `evaluation.json`: the `eval/*` means, and values per row for paired comparisons.

    Args:
        config: geometry, sampling and feature settings, as in training.
        output: directory for the file; made if needed.
    Raises:
        InputError: files are missing or do not fit together.
    """
    groups = make_process_groups(connect())
    dtype = DTYPES[config.train.dtype]
    architecture = Architecture.from_directory(request.model)
    dataset = open_dataset(request.data)
    _check_tokenizer(request.model, dataset.manifest.tokenizer_sha256, request.data)
    route = make_route(
        config.train.attention,
        groups.device,
        own_capacity=config.ebft.generate_max_len,
        head_dim=architecture.head_dim,
    )
    policy = Stage(architecture, StageShape.whole(architecture), groups, dtype, attention=route)
    load_weights(policy, open_weights(request.model, architecture))
    policy.to(groups.device).requires_grad_(False).eval()
    model = PipelinedModel.of(policy)
    network = _feature_network(request.feature_model, config, groups, dtype, route)
    settings = EvaluationSettings.of(config)

    length = config.data.sequence_length
    everything = fixed_rows(dataset, length, request.skip_rows + request.rows)
    rows = TokenBatch(
        everything.tokens[request.skip_rows :],
        everything.document_ids[request.skip_rows :],
        everything.row_indices[request.skip_rows :],
    )
    if config.data.document_masking:
        rows = rows.with_document_masking()
    batches = rows.to(groups.device).split(settings.micro_batch_size)
    parts: list[Evaluation] = [
        evaluate(model, network, batch, settings) for batch in track(batches, len(batches), "evaluation")
    ]
    evaluation = merge(parts)
    content = {
        "model": str(request.model),
        "feature_model": str(request.feature_model),
        "data": str(request.data),
        "sequence_length": length,
        "rows": request.rows,
        "skipped_rows": request.skip_rows,
        "temperature": config.ebft.temperature,
        "document_masking": config.data.document_masking,
        **evaluation.means,
        "per_row": evaluation.per_row,
        "row_groups": main_documents(rows),
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "evaluation.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def main_documents(rows: TokenBatch) -> list[str]:
    """The document with the most tokens in each row, as the row's group: rows of one document are not independent."""
    return [str(Counter(ids.tolist()).most_common(1)[0][0]) for ids in rows.document_ids]


def _feature_network(
    directory: Path, config: RunConfig, groups: ProcessGroups, dtype: torch.dtype, route: AttentionRoute
) -> FeatureNetwork:
    architecture, ebft = Architecture.from_directory(directory), config.ebft
    deepest = tapped_layers(ebft.feature_layers, architecture.num_hidden_layers)[-1]
    source = open_weights(directory, architecture, deepest)
    settings = FeatureSettings(ebft.feature_layers, ebft.embed_method, ebft.feature_norm, dtype, attention=route)
    return build_feature_network(architecture, source, settings, groups)


def _check_tokenizer(model: Path, dataset_sha256: str, data: Path) -> None:
    found = tokenizer_sha256(model)
    if found is not None and found != dataset_sha256:
        problem = Problem(str(data), "tokenizer", f"sha256 {dataset_sha256}", f"sha256 {found}, that of {model}")
        raise InputError([problem])
