"""Checkpoints as Hugging Face models: transformers computes the same, and importing them again changes no bit."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM

from ebft_mega.apps.convert.exporting import checkpoint_folder, export_checkpoint
from ebft_mega.apps.convert.importing import import_model
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import BrokenCheckpointError, InputError
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from tests.conftest import tiny_config
from tests.unit.apps.convert.test_import import KINDS
from tests.unit.planted import Bomb
from tests.unit.written_checkpoint import VariedWeights, write_checkpoint


def checkpoint(tmp_path, kind="llama", tied=True, **options):
    architecture = Architecture.from_hf(tiny_config(kind, tied, initializer_range=0.1), "test")
    source = VariedWeights(architecture, 1)
    return architecture, source, write_checkpoint(tmp_path / "checkpoints", architecture, source, **options)


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_transformers_computes_what_the_trained_model_does(tmp_path, groups, kind, tied):
    architecture, source, folder = checkpoint(tmp_path, kind, tied)
    export_checkpoint(folder, tmp_path / "hf", "float32", shard_bytes=20_000)
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (not tied)
    tokens = torch.arange(40)[None] * 3 % architecture.vocab_size
    with torch.no_grad():
        layout = StridedLayout(1, (), 40, (), 0, stage.attention)
        logits = stage.logits(stage.hidden_states(tokens, torch.arange(40), layout)[:, 0])
        expected = model(tokens).logits[0]
    assert expected.abs().max() > 1.0
    assert (logits - expected).abs().max() <= 1e-5


def test_an_import_of_the_export_is_bit_equal(tmp_path):
    architecture, source, folder = checkpoint(tmp_path, "qwen2", tied=False)
    export_checkpoint(folder, tmp_path / "hf", "float32", shard_bytes=20_000)
    import_model(tmp_path / "hf", tmp_path / "imported", None, 10**9)
    found = load_file(tmp_path / "imported" / "model.safetensors")
    assert found.keys() == hf_shapes(architecture).keys()
    assert all(torch.equal(found[name], source.tensor(name)) for name in found)
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "imported" / "config.json").read_text()


def test_the_dtype_is_the_one_asked_for(tmp_path):
    _, source, folder = checkpoint(tmp_path)
    for dtype in ("bfloat16", "float16"):
        export_checkpoint(folder, tmp_path / dtype, dtype, 10**9)
        found = load_file(tmp_path / dtype / "model.safetensors")
        assert all(torch.equal(found[name], source.tensor(name).to(getattr(torch, dtype))) for name in found)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path):
    architecture, _, old = checkpoint(tmp_path)
    new = write_checkpoint(tmp_path / "checkpoints", architecture, RandomWeights(architecture, 2), step=12)
    (tmp_path / "checkpoints" / "step-00000020.tmp").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", new):
        assert checkpoint_folder(path) == new
    assert checkpoint_folder(old) == old
    for path in (tmp_path / "nowhere", tmp_path / "checkpoints" / "step-00000020.tmp"):
        with pytest.raises(InputError, match="--checkpoint"):
            checkpoint_folder(path)


@pytest.mark.parametrize("place", ["checkpoints/step-00000001", "model", "link"])
def test_neither_a_checkpoint_nor_the_source_is_replaced(tmp_path, place):
    _, _, folder = checkpoint(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    if place != "checkpoints/step-00000001":  # a run within a model's directory
        export_checkpoint(folder, tmp_path / "model", "float32", 10**9)
        (tmp_path / "checkpoints").rename(tmp_path / "model" / "checkpoints")
        folder = tmp_path / "model" / "checkpoints" / folder.name
    output = folder if place.startswith("checkpoints") else tmp_path / place
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=r"--output: .*; expected a directory of the model's own"):
        export_checkpoint(folder, output, "float32", 10**9, overwrite=True)
    assert sorted(folder.rglob("*")) == before
    if place != "checkpoints/step-00000001":
        with pytest.raises(InputError, match="--output: .*: found the place of"):
            import_model(tmp_path / "model", output, None, 10**9, overwrite=True)


def test_a_step_without_a_manifest_is_broken(tmp_path):
    _, _, folder = checkpoint(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(BrokenCheckpointError, match="manifest.json"):
        export_checkpoint(folder, tmp_path / "hf", "float32", 10**9)


@pytest.mark.parametrize("name", ["weights/rank-00001.safetensors", "config.json", "tensors.json"])
def test_an_altered_file_is_refused_before_anything_is_written(tmp_path, name):
    _, _, folder = checkpoint(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=f"{name}: found sha256"):
        export_checkpoint(folder, tmp_path / "hf", "float32", 10**9)
    assert not (tmp_path / "hf").exists()


def test_small_files_come_along_and_strangers_do_not(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "generation_config.json").write_text('{"temperature": 0.5}')
    (small / "tokenizer.json").write_text(Tokenizer(BPE()).to_str())
    _, _, folder = checkpoint(tmp_path, small_files=small)
    mark = tmp_path / "exploded"
    (folder / "tokenizer.model").write_text("added later")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    export_checkpoint(folder, tmp_path / "hf", "float32", 10**9)
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert not mark.exists()


def test_a_model_that_has_gone_astray_is_not_exported(tmp_path):
    architecture, source, _ = checkpoint(tmp_path)

    class Astray(RandomWeights):
        def tensor(self, name):
            drawn = super().tensor(name)
            return drawn / 0 if name == "model.norm.weight" else drawn

    folder = write_checkpoint(tmp_path / "other", architecture, Astray(architecture, 1))
    with pytest.raises(InputError, match="model.norm.weight: found values that are infinite or no numbers"):
        export_checkpoint(folder, tmp_path / "hf", "float32", 10**9)
    assert not (tmp_path / "hf").exists()


def test_the_optimizers_state_may_be_gone(tmp_path):
    _, _, folder = checkpoint(tmp_path)
    for kind in ("exp_avg", "exp_avg_sq"):
        for path in (folder / kind).iterdir():
            path.write_bytes(b"")
    export_checkpoint(folder, tmp_path / "hf", "float32", 10**9)
    assert (tmp_path / "hf" / "model.safetensors").exists()
