"""What an evaluation reads: models, frozen networks and held-out rows, checked together before anything starts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.evaluation_request import UNNAMED, EvaluationGrid, MapChoice
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import fixed_rows
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.planning import model_data
from ebft_mega.planning.data_fit import vocabulary_problems
from ebft_mega.planning.model_files import CheckedModel, check_model
from ebft_mega.types import TokenBatch


@dataclass(frozen=True)
class EvaluationRequest:
    """The model to evaluate, the feature network, and the held-out rows."""

    model: Path
    feature_model: Path  # the frozen feature network; the same for all models that are compared
    data: Path
    rows: int
    skip_rows: int  # rows at the start of the dataset that are left out
    feature_key: str = "--feature-model"  # the option or key that names the feature network


def networks(request: EvaluationRequest, grid: EvaluationGrid) -> list[Path]:
    """The directories of all frozen networks, each once."""
    return list(dict.fromkeys(choice.directory or request.feature_model for choice in grid.maps))


def maps_of(directory: Path, request: EvaluationRequest, grid: EvaluationGrid) -> list[MapChoice]:
    """The feature maps of one of them."""
    return [choice for choice in grid.maps if (choice.directory or request.feature_model) == directory]


def fractions_of(maps: Sequence[MapChoice]) -> tuple[float, ...]:
    """Depths that any of several maps reads."""
    return tuple(sorted({fraction for choice in maps for fraction in tapped_fractions(choice.config)}))


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
    checked, notes = check_models({UNNAMED: request}, EvaluationGrid.of(config))
    return (checked[request.model], checked[request.feature_model]), notes


def check_models(
    requests: Mapping[str, EvaluationRequest], grid: EvaluationGrid
) -> tuple[dict[Path, CheckedModel], list[str]]:
    """Check models, feature networks and the data as the inputs of a training run.

    Args:
        requests: by the model's name; they differ in the model alone.
    Returns:
        The models by their directories, and notes on them.
    Raises:
        InputError: everything that is wrong with them, at once.
    """
    request, config = next(iter(requests.values())), grid.config
    options: dict[Path, tuple[str, tuple[float, ...] | None]] = {}
    for name, each in requests.items():
        options.setdefault(each.model, (f"--model {name}".rstrip(), None))
    for directory in networks(request, grid):
        maps = maps_of(directory, request, grid)
        key = request.feature_key if maps[0].directory is None else f"--feature-map {maps[0].name}: feature_model"
        options.setdefault(directory, (key, fractions_of(maps)))
    problems: list[Problem] = []
    checked: dict[Path, model_data.NamedModel] = {}
    for directory, (option, layers) in options.items():
        try:
            checked[directory] = model_data.NamedModel(option, "", check_model(directory, layers))
        except InputProblems as error:
            problems += [problem.within(option) for problem in error.problems]
    data: list[model_data.NamedData] = []
    try:
        dataset = open_dataset(request.data)
        dataset.close()
        data.append(model_data.NamedData("--data", "", dataset.manifest, dataset.tokenizer_directory))
    except InputProblems as error:
        problems += error.problems
    named_models = tuple(checked.values())
    problems += model_data.window_problems(named_models, "data.sequence_length", "", config.data.sequence_length)
    problems += model_data.data_problems(named_models, data)
    for named in named_models if data else ():
        size, where = named.model.architecture.vocab_size, str(request.data)
        problems += vocabulary_problems("--data", where, data[0].manifest, size, named.key)
    if problems:
        raise InputError(problems)
    notes = [f"{named.key}: {note}" for named in named_models for note in named.model.notes]
    models = {directory: named.model for directory, named in checked.items()}
    return models, [*notes, *model_data.data_notes(named_models, data)]
