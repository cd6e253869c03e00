"""`evaluate_models` on two ranks, as replicas, tensor-parallel and in a pipeline, finds what one process finds."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ebft_mega.apps.evaluate_model import evaluate_models
from ebft_mega.apps.evaluation_inputs import EvaluationRequest
from ebft_mega.apps.evaluation_request import EvaluationGrid, MapChoice
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.config.load import load_config
from ebft_mega.errors import ConfigError
from ebft_mega.model.weights.weight_sources import RandomWeights
from tests.distributed.ranks import run_ranks
from tests.unit.conftest import MODEL_FIELDS, write_dataset, write_tokenizer

LAYOUTS = {
    "replicas": (),
    "tensor": ("parallel.tensor_parallel_size=2",),
    "pipeline": ("parallel.pipeline_parallel_size=2",),
}
CONFIG = """
output_dir: unused
seed: 3
model: {init_from: %s}
data: {shards: %s, sequence_length: 24, document_masking: true}
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, temperature: 0.8,
       embed_method: mean_pooling}
train: {global_batch_size: 8, micro_batch_size: 1, max_steps: 1, dtype: float32}
"""


def evaluate_all(root: Path, layouts: tuple[str, ...] | None) -> dict[str, bool]:
    """Evaluate two models at every layout; whether this rank was given the files.

    Args:
        layouts: None: one process, whatever the configuration says.
    """
    is_first = {}
    for name in layouts or ("alone",):
        config = load_config(root / "run.yaml", LAYOUTS["tensor"] if layouts is None else LAYOUTS[name])
        last = load_config(root / "run.yaml", ("ebft.embed_method=last_token", "ebft.feature_layers=[0.5]"))
        requests = {
            model: EvaluationRequest(root / model, root / "a", root / "held_out", rows=3, skip_rows=1) for model in "ab"
        }
        maps = (MapChoice("last", last, root / "b"),)
        grid = EvaluationGrid.of(config, (1.2,), (2,), None, maps)
        is_first[name] = evaluate_models(requests, grid, root / "out" / name) is not None
    return is_first


@pytest.fixture(scope="module")
def files(tmp_path_factory, groups):
    """What one process and the first of two ranks have written, by layout, then by model."""
    root = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate("ab"):
        write_tokenizer(root / name, '{"model": {}}')
        fields = {**MODEL_FIELDS, "initializer_range": 0.4}
        (root / name / "config.json").write_text(json.dumps(fields))
        architecture = Architecture.from_hf(fields, "test")
        weights = RandomWeights(architecture, seed)
        tensors = {tensor: weights.tensor(tensor) for tensor in hf_shapes(architecture)}
        save_file(tensors, root / name / "model.safetensors")
    write_dataset(root / "held_out", root / "a", [40, 70, 61, 9])
    (root / "run.yaml").write_text(CONFIG % (root / "a", root / "held_out"))
    assert evaluate_all(root, None) == {"alone": True}
    for rank, is_first in enumerate(run_ranks(2, evaluate_all, root, tuple(LAYOUTS))):
        assert is_first == dict.fromkeys(LAYOUTS, rank == 0)
    return {
        name: {model: json.loads((root / "out" / name / model / "evaluation.json").read_text()) for model in "ab"}
        for name in ("alone", *LAYOUTS)
    }


def numbers(found, place=""):
    """All numbers of a file, by their places."""
    if isinstance(found, dict):
        return {key: value for name, each in found.items() for key, value in numbers(each, f"{place}/{name}").items()}
    if isinstance(found, list):
        return {
            key: value for index, each in enumerate(found) for key, value in numbers(each, f"{place}/{index}").items()
        }
    return {place: found}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_ranks_equal_those_of_one(files, layout):
    for model in "ab":
        alone, found = numbers(files["alone"][model]), numbers(files[layout][model])
        assert list(alone) == list(found) and len(alone) > 500
        for place, value in alone.items():
            if isinstance(value, float) and "duplicate" not in place:
                assert found[place] == pytest.approx(value, abs=1e-5), place
            else:  # rollouts are the same
                assert found[place] == value, place


def test_models_differ_and_share_rows(files):
    a, b = (files["alone"][model] for model in "ab")
    assert a["row_groups"] == b["row_groups"] and a["model"] != b["model"] and a["eval/ce_loss"] != b["eval/ce_loss"]
    conditions = [(each["temperature"], each["completion_length"], each["features"]) for each in a["conditions"]]
    assert conditions == [(t, g, name) for t in (0.8, 1.2) for g in (2, 4) for name in ("last", "trained")]
    own = a["conditions"][conditions.index((0.8, 4, "trained"))]
    assert a["by_completion_length"] == {
        str(length): a["conditions"][conditions.index((0.8, length, "trained"))]["means"] for length in (2, 4)
    }
    assert own["means"] == {key: a[key] for key in own["means"]} and len(own["means"]) == 5
    assert own["per_row"] == {key: a["per_row"][key] for key in own["per_row"]}
    last = a["conditions"][conditions.index((0.8, 4, "last"))]
    assert last["means"]["eval/duplicate_share"] == own["means"]["eval/duplicate_share"]
    assert last["means"]["eval/raw_cosine"] != own["means"]["eval/raw_cosine"]


def test_a_layout_that_the_models_do_not_fit_is_refused(files, tmp_path, monkeypatch):
    root = Path(files["alone"]["a"]["model"]).parent
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = load_config(root / "run.yaml", ("parallel.tensor_parallel_size=3",))
    requests = {"": EvaluationRequest(root / "a", root / "a", root / "held_out", rows=3, skip_rows=0)}
    with pytest.raises(ConfigError, match="parallel.tensor_parallel_size: found 3"):
        evaluate_models(requests, EvaluationGrid.of(config), tmp_path)
