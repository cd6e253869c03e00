"""Evaluate a Hugging Face model directory on held-out rows, in one process and without an optimizer."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.written_evaluation import write_evaluation
from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import make_route
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import fixed_rows
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.evaluation.held_out import Evaluation, EvaluationSettings, evaluate, merge
from ebft_mega.features import factory
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.features.pool_check import check_pooling
from ebft_mega.io.progress_bar import track
from ebft_mega.io.standard_streams import print_line
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.planning import model_data
from ebft_mega.planning.data_fit import vocabulary_problems
from ebft_mega.planning.model_files import CheckedModel, check_model
from ebft_mega.types import DTYPES, TokenBatch


@dataclass(frozen=True)
class EvaluationRequest:
    """The model to evaluate, the feature network, and the held-out rows."""

    model: Path
    feature_model: Path  # the frozen feature network; the same for all models that are compared
    data: Path
    rows: int
    skip_rows: int  # rows at the start of the dataset that are left out
    feature_key: str = "--feature-model"  # the option or key that names the feature network


def evaluate_directory(request: EvaluationRequest, config: RunConfig, output: Path) -> Path:
    """Evaluate a model and write `evaluation.json`: the `eval/*` means, and values per row for paired comparisons.

    Where something is not finite, the file says null and how many blocks and rows were left out.

    Args:
        config: geometry, sampling and feature settings, as in training.
        output: directory for the file; made if needed.
    Raises:
        InputError: files are missing or do not fit together.
    """
    check_pooling(config)
    groups = make_process_groups(connect())
    models, notes = check_inputs(request, config)
    for note in notes:
        print_line(f"note: {note}", sys.stdout)
    policy = open_policy(request.model, models[0].architecture, config, groups)
    model = PipelinedModel.of(policy)
    network = _feature_network(models[1], config, policy)
    settings = EvaluationSettings.of(config)

    rows = held_out_rows(request, config)
    batches = rows.to(groups.device).split(settings.micro_batch_size)
    parts: list[Evaluation] = [
        evaluate(model, network, batch, settings) for batch in track(batches, len(batches), "evaluation")
    ]
    evaluation = merge(parts)
    content = {
        "model": str(request.model),
        "feature_model": str(request.feature_model),
        "data": str(request.data),
        "sequence_length": config.data.sequence_length,
        "rows": request.rows,
        "skipped_rows": request.skip_rows,
        "temperature": config.ebft.temperature,
        "document_masking": config.data.document_masking,
        **evaluation.means,
        "per_row": evaluation.per_row,
        "row_groups": main_documents(rows),
    }
    return write_evaluation(output / "evaluation.json", content)


def open_policy(directory: Path, architecture: Architecture, config: RunConfig, groups: ProcessGroups) -> Stage:
    """A model of a directory, whole and without gradients, on this process's device."""
    route = make_route(
        config.train.attention,
        groups.device,
        own_capacity=config.ebft.generate_max_len,
        head_dim=architecture.head_dim,
    )
    dtype = DTYPES[config.train.dtype]
    policy = Stage(architecture, StageShape.whole(architecture), groups, dtype, attention=route)
    load_weights(policy, open_weights(directory, architecture))
    return policy.to(groups.device).requires_grad_(False).eval()


def held_out_rows(request: EvaluationRequest, config: RunConfig) -> TokenBatch:
    """The rows that are evaluated, with document masking if the configuration says so."""
    dataset = open_dataset(request.data)
    everything = fixed_rows(dataset, config.data.sequence_length, request.skip_rows + request.rows)
    rows = TokenBatch(
        everything.tokens[request.skip_rows :],
        everything.document_ids[request.skip_rows :],
        everything.row_indices[request.skip_rows :],
    )
    return rows.with_document_masking() if config.data.document_masking else rows


def main_documents(rows: TokenBatch) -> list[str]:
    """The document with the most tokens in each row, as the row's group: rows of one document are not independent."""
    return [str(Counter(ids.tolist()).most_common(1)[0][0]) for ids in rows.document_ids]


def check_inputs(request: EvaluationRequest, config: RunConfig) -> tuple[tuple[CheckedModel, CheckedModel], list[str]]:
    """Check the model, the feature network and the data as the inputs of a training run.

    Returns:
        The model and the feature network, and notes on them.
    Raises:
        InputError: everything that is wrong with them, at once.
    """
    problems: list[Problem] = []
    checked: list[model_data.NamedModel] = []
    options: list[tuple[str, Path, tuple[float, ...] | None]] = [("--model", request.model, None)]
    if request.feature_model != request.model:
        options.append((request.feature_key, request.feature_model, tapped_fractions(config)))
    for option, directory, layers in options:
        try:
            checked.append(model_data.NamedModel(option, "", check_model(directory, layers)))
        except InputProblems as error:
            problems += [problem.within(option) for problem in error.problems]
    data: list[model_data.NamedData] = []
    try:
        dataset = open_dataset(request.data)
        dataset.close()
        data.append(model_data.NamedData("--data", "", dataset.manifest, dataset.tokenizer_directory))
    except InputProblems as error:
        problems += error.problems
    problems += model_data.window_problems(checked, "data.sequence_length", "", config.data.sequence_length)
    problems += model_data.data_problems(checked, data)
    for named in checked if data else ():
        size, where = named.model.architecture.vocab_size, str(request.data)
        problems += vocabulary_problems("--data", where, data[0].manifest, size, named.key)
    if problems:
        raise InputError(problems)
    notes = [f"{named.key}: {note}" for named in checked for note in named.model.notes]
    return (checked[0].model, checked[-1].model), [*notes, *model_data.data_notes(checked, data)]


def _feature_network(model: CheckedModel, config: RunConfig, policy: Stage) -> FeatureNetwork:
    """The frozen network, which attends as the policy does."""
    architecture, directory, fractions = model.architecture, model.directory, tapped_fractions(config)
    assert directory is not None, "check_inputs has opened it"
    deepest = tapped_layers(fractions, architecture.num_hidden_layers)[-1]
    source, dtype = open_weights(directory, architecture, deepest), DTYPES[config.train.dtype]
    settings = factory.FeatureSettings(fractions, FeatureRecipe.of(config), dtype, attention=policy.attention)
    return factory.build_feature_network(architecture, source, settings, policy.groups)
