"""A checkpoint as the model of another run: the same weights, checked before they are believed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.errors import BrokenCheckpointError, InputError, InputProblems
from ebft_mega.model.weights.weight_sources import RandomWeights, SafetensorsWeights, identity
from ebft_mega.planning.model_files import check_model
from tests.conftest import tiny_config
from tests.unit.written_checkpoint import list_files, write_checkpoint

ARCHITECTURE = Architecture.from_hf(tiny_config("qwen2", tied=False, num_hidden_layers=2), "test")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoints", ARCHITECTURE, RandomWeights(ARCHITECTURE, 1))


def model_problems(directory):
    """What the check of a model directory finds."""
    try:
        check_model(directory)
    except InputProblems as error:
        return list(error.problems)
    return []


def whole_identity(source):
    return identity({name: source.digest(name) for name in source.digest_names()})


def test_a_checkpoint_is_opened_as_the_weights_that_it_holds(folder):
    architecture = Architecture.from_directory(folder)
    assert model_problems(folder) == []
    source, truth = open_weights(folder, architecture), RandomWeights(ARCHITECTURE, 1)
    for name in hf_shapes(ARCHITECTURE):
        assert torch.equal(source.tensor(name), truth.tensor(name))
    box = (slice(60, 70), slice(3, 9))
    name = "model.embed_tokens.weight"
    assert torch.equal(source.part(name, box), truth.tensor(name)[box])


def test_a_hugging_face_directory_is_opened_as_one(tmp_path):
    truth = RandomWeights(ARCHITECTURE, 1)
    save_file({name: truth.tensor(name) for name in hf_shapes(ARCHITECTURE)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen2", tied=False, num_hidden_layers=2)))
    assert isinstance(open_weights(tmp_path, ARCHITECTURE), SafetensorsWeights)
    assert model_problems(tmp_path) == []


def test_the_identity_is_that_of_the_weights_alone(folder, tmp_path):
    first = whole_identity(open_weights(folder, ARCHITECTURE))
    shutil.copytree(folder, tmp_path / "elsewhere")
    moment = tmp_path / "elsewhere" / "exp_avg" / "rank-00000.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(moment).items()}, moment)
    list_files(tmp_path / "elsewhere")
    assert whole_identity(open_weights(tmp_path / "elsewhere", ARCHITECTURE)) == first
    weights = tmp_path / "elsewhere" / "weights" / "rank-00000.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    list_files(tmp_path / "elsewhere")
    assert whole_identity(open_weights(tmp_path / "elsewhere", ARCHITECTURE)) != first


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_altered_weights_are_refused_by_name_and_hash(folder):
    flip_a_bit(folder / "weights" / "rank-00001.safetensors")
    with pytest.raises(BrokenCheckpointError, match="weights/rank-00001.safetensors: found sha256"):
        open_weights(folder, ARCHITECTURE)
    # Sizes alone say nothing of it; a dry run reads no weights.
    assert model_problems(folder) == []


@pytest.mark.parametrize("name", ["config.json", "tensors.json"])
def test_altered_small_files_are_refused_before_they_are_parsed(folder, name):
    flip_a_bit(folder / name)
    (problem,) = model_problems(folder)
    assert problem.key == name and problem.found.startswith("sha256")
    with pytest.raises(BrokenCheckpointError, match="sha256"):
        open_weights(folder, ARCHITECTURE)


def test_all_that_is_missing_or_cut_off_is_named(folder):
    (folder / "weights" / "rank-00000.safetensors").unlink()
    with (folder / "weights" / "rank-00001.safetensors").open("ab") as file:
        file.write(b"x")
    flip_a_bit(folder / "config.json")
    wanted = ["config.json", "weights/rank-00000.safetensors", "weights/rank-00001.safetensors"]
    assert [problem.key for problem in model_problems(folder)] == wanted
    with pytest.raises(BrokenCheckpointError) as caught:
        open_weights(folder, ARCHITECTURE)
    assert [problem.key for problem in caught.value.problems] == wanted


def test_moments_do_not_matter(folder):
    shutil.rmtree(folder / "exp_avg")
    (folder / "exp_avg_sq" / "rank-00000.safetensors").write_bytes(b"")
    assert model_problems(folder) == []
    open_weights(folder, ARCHITECTURE)


def test_an_index_that_leads_elsewhere_is_refused(folder):
    """Its hash is right, so it is the writer who is wrong, or hostile."""
    path = folder / "tensors.json"
    content = json.loads(path.read_text())
    shards = content["kinds"]["weights"]["model.norm.weight"]["pieces"]
    shards[0]["file"] = "weights/unlisted.safetensors"
    path.write_text(json.dumps(content))
    list_files(folder)
    (problem,) = model_problems(folder)
    assert problem.found == "a shard in weights/unlisted.safetensors"
    shards[0]["file"] = "../../../outside.safetensors"
    path.write_text(json.dumps(content))
    list_files(folder)
    assert model_problems(folder)
    with pytest.raises(InputProblems):
        open_weights(folder, ARCHITECTURE)


def test_another_architecture_is_refused(folder):
    wider = Architecture.from_hf(tiny_config("qwen2", tied=False, intermediate_size=64, num_hidden_layers=2), "test")
    with pytest.raises(BrokenCheckpointError, match="mlp.up_proj.weight: found shape"):
        open_weights(folder, wider)


def test_a_folder_without_its_manifest_is_no_checkpoint(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="weights: found none"):
        open_weights(folder, ARCHITECTURE)
