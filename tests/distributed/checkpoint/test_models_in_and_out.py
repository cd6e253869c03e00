"""The exported model of a sharded run gives the same logits in transformers, and other runs can start from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft_mega.apps.convert.exporting import export_checkpoint
from ebft_mega.apps.convert.verifying import compare_logits
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Setting, checkpoint, lines, make_datasets, run

SHARDED = {"data": 1, "tensor": 2, "pipeline": 2}
MODELS = [(model_type, tied) for model_type in ("llama", "mistral", "qwen2", "qwen3") for tied in (True, False)]
SHORT = ("train.max_steps=2", "checkpoint.interval=2", "evaluation.interval=2")
ALONE = Setting(1, 1, 1)
MANY_BYTES = 2**30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    make_datasets(directory)
    return directory


def next_run(root: Path, name: str, model: Path, *overrides: str) -> list[dict]:
    """Metrics of two steps from a model."""
    start = (f"model.init_from={model}", "model.config=null", *SHORT, *overrides)
    assert run_ranks(1, run, str(root), name, ALONE, start) == [0]
    return lines(root / name)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tied"), MODELS)
def test_export_of_a_sharded_run(root, groups, model_type, tied):
    name = f"{model_type}-{tied}"
    setting = Setting(**SHARDED, model_type=model_type, tied=tied)
    assert run_ranks(4, run, str(root), name, setting, SHORT) == [0] * 4
    folder, exported = checkpoint(root / name, 2), root / f"{name}-exported"
    export_checkpoint(root / name, exported, "float32", MANY_BYTES)
    text = next((root / "text" / "held_out").iterdir())
    comparison = compare_logits(folder, exported, text, max_positions=100, groups=groups)
    assert comparison.max_difference <= 1e-5 and comparison.largest_logit > 0.1
    # The run's own last act wrote the same model.
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (exported, root / name / "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # From the export, from its shards and from the checkpoint itself, training continues alike.
    sharded = root / f"{name}-small-shards"
    export_checkpoint(folder, sharded, "float32", 20_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    runs = [next_run(root, f"{name}-from-{index}", path) for index, path in enumerate((folder, exported, sharded))]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 3


@pytest.mark.slow
def test_feature_network_is_the_initial_model_and_nothing_else(root):
    """A warm start takes a checkpoint's weights; its feature network is that model, or the one that is named."""
    assert run_ranks(1, run, str(root), "base", ALONE, SHORT) == [0]
    start = root / "base-model"
    shutil.copytree(root / "base" / "hf", start)
    own = next_run(root, "from-base", start)
    other = next_run(root, "from-base-other-judge", start, f"ebft.feature_model={checkpoint(root / 'base', 2)}")
    assert own == other  # the same weights, from another place
    step = checkpoint(root / "from-base", 2)
    state = json.loads((step / "state.json").read_text())
    assert state["feature_source"] == str(start) and len(state["feature_network"]) == 64
    longer = ("train.max_steps=3", f"checkpoint.resume={step}")
    moved = root / "moved-model"
    start.rename(moved)
    resumed = next_run(root, "moved", moved, *longer)
    assert resumed[-1]["step"] == 3
    # Another model in the same place is refused.
    shutil.copytree(root / "from-base" / "hf", start)
    with pytest.raises(AssertionError, match="expected the initial model of this run"):
        next_run(root, "changed", start, *longer)


def test_damaged_checkpoint_is_no_start(root):
    assert run_ranks(1, run, str(root), "damaged", ALONE, SHORT) == [0]
    folder = checkpoint(root / "damaged", 2)
    (file,) = (folder / "weights").iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssertionError, match=f"BrokenCheckpointError.*{file.name}.*sha256"):
        next_run(root, "from-damaged", folder)


def test_what_stands_in_the_place_of_the_final_model_is_seen_before_the_run(root):
    (root / "taken" / "hf").mkdir(parents=True)
    (root / "taken" / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(AssertionError, match="ConfigError.*hf: found other files"):
        run_ranks(1, run, str(root), "taken", ALONE, SHORT)
    assert (root / "taken" / "hf" / "notes.txt").read_text() == "mine"
    assert not (root / "taken" / "metrics.jsonl").exists()
