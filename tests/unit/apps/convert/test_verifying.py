"""Logits compared with transformers': equal models pass, every kind of difference shows."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebft_mega.apps.convert import verifying
from ebft_mega.apps.convert.verifying import compare_logits
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.describing_files import read_describing_files
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import RandomWeights
from tests.conftest import tiny_config
from tests.unit.apps.convert.test_import import KINDS, change
from tests.unit.planted import Bomb
from tests.unit.written_checkpoint import VariedWeights, write_checkpoint

TEXT = Path(__file__).read_text()
VOCABULARY = 400


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """One whose vocabulary fits the tiny models, and a text."""
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "text").mkdir()
    (root / "text" / "a.py").write_text(TEXT)
    train_tokenizer(root / "text", VOCABULARY, root / "tokenizer")
    return root


@pytest.fixture
def text(tokenizer):
    return tokenizer / "text" / "a.py"


def model(directory, tokenizer, kind="llama", tied=True, **fields):
    architecture = Architecture.from_hf(
        tiny_config(kind, tied, vocab_size=VOCABULARY, initializer_range=0.1, **fields), "test"
    )
    source = VariedWeights(architecture, 1)
    pairs = ((name, source.tensor(name)) for name in hf_shapes(architecture))
    write_model(directory, architecture, pairs, torch.float32, read_describing_files(tokenizer / "tokenizer").contents)
    return architecture, source


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_equal_models_agree(tmp_path, groups, tokenizer, text, kind, tied):
    model(tmp_path / "hf", tokenizer, kind, tied)
    result = compare_logits(tmp_path / "hf", None, text, 100, groups)
    assert result.positions == 100 and result.vocab_size == VOCABULARY
    assert result.largest_logit > 1.0 and result.max_difference <= 1e-5


def test_one_changed_weight_shows(tmp_path, groups, tokenizer, text):
    model(tmp_path / "hf", tokenizer)
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][3, 5] += 1.0
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert compare_logits(tmp_path / "hf", tmp_path / "other", text, 100, groups).max_difference > 1e-2


def test_both_readers_keep_a_head_apart_that_differs_from_a_tied_embedding(tmp_path, groups, tokenizer, text):
    model(tmp_path / "hf", tokenizer)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = 3 * torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    result = compare_logits(tmp_path / "hf", None, text, 100, groups)
    assert result.max_difference <= 1e-4 and result.largest_logit > 1
    assert "note: lm_head.weight differs" in str(result)


def test_a_checkpoint_is_compared_with_its_export(tmp_path, groups, tokenizer, text):
    architecture, source = model(tmp_path / "hf", tokenizer, "qwen3", tied=False)
    folder = write_checkpoint(tmp_path / "checkpoints", architecture, source)
    with pytest.raises(InputError, match="--reference"):
        compare_logits(folder, None, text, 100, groups)
    assert compare_logits(folder, tmp_path / "hf", text, 100, groups).max_difference <= 1e-5


def rewrite(directory, name, dtype):
    """Copy a model directory with its weights in another dtype."""
    shutil.copytree(directory, directory.parent / name)
    tensors = {tensor: value.to(dtype) for tensor, value in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory.parent / name / "model.safetensors", metadata={"format": "pt"})
    return directory.parent / name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_compared_as_the_coarser_file_has_them(tmp_path, groups, tokenizer, text, dtype):
    """A checkpoint and its export, and an import and what it was made of."""
    architecture, source = model(tmp_path / "hf", tokenizer, "qwen3", tied=False)
    folder = write_checkpoint(tmp_path / "checkpoints", architecture, source)
    export = rewrite(tmp_path / "hf", "export", dtype)
    words = f"rounded to {str(dtype).removeprefix('torch.')} before they are compared, as {export} has them"
    for ours, theirs, wider in ((folder, export, folder), (export, tmp_path / "hf", tmp_path / "hf")):
        result = compare_logits(ours, theirs, text, 100, groups)
        assert result.max_difference <= 1e-5, "rounded on one side alone it is above 1e-2"
        (note,) = [note for note in result.notes if "rounded" in note]
        assert note == f"{len(hf_shapes(architecture))} tensors of {wider} are {words}"
    assert not compare_logits(export, export, text, 100, groups).notes


def test_rounding_hides_no_other_difference(tmp_path, groups, tokenizer, text):
    architecture, source = model(tmp_path / "hf", tokenizer, "qwen3", tied=False)
    folder = write_checkpoint(tmp_path / "checkpoints", architecture, source)
    export = rewrite(tmp_path / "hf", "export", torch.bfloat16)
    tensors = load_file(export / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    assert compare_logits(folder, export, text, 100, groups).max_difference > 1e-2


@pytest.mark.parametrize("limit", [{"max_position_embeddings": 50}, {"sliding_window": 50}])
def test_no_more_positions_than_the_model_can_attend_to(tmp_path, groups, tokenizer, text, limit):
    model(tmp_path / "hf", tokenizer, "mistral", **limit)
    result = compare_logits(tmp_path / "hf", None, text, 200, groups)
    assert result.positions == 50 and result.max_difference <= 1e-5


def test_transformers_sees_nothing_that_it_could_execute(tmp_path, groups, tokenizer, text, monkeypatch):
    model(tmp_path / "hf", tokenizer)
    loader, seen = verifying.AutoModelForCausalLM, []
    load = loader.from_pretrained

    def watched(directory, **options):
        seen.append(({path.name for path in Path(directory).iterdir()}, options))
        return load(directory, **options)

    monkeypatch.setattr(loader, "from_pretrained", watched)
    mark = tmp_path / "exploded"
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (tmp_path / "hf" / name).write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "hf" / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {"x": "y"}}')
    (tmp_path / "hf" / "modeling.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    result = compare_logits(tmp_path / "hf", None, text, 20, groups)
    assert result.max_difference <= 1e-5 and "adapter_config.json is not read" in str(result)
    ((names, options),) = seen
    assert names == {"config.json", "model.safetensors"}
    assert options["use_safetensors"] and options["local_files_only"] and not options["trust_remote_code"]
    change(tmp_path / "hf", "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(InputError, match="auto_map"):
        compare_logits(tmp_path / "hf", None, text, 20, groups)
    assert not mark.exists()


def test_what_cannot_be_compared_is_refused(tmp_path, groups, tokenizer, text):
    model(tmp_path / "hf", tokenizer)
    with pytest.raises(InputError, match="--text"):
        compare_logits(tmp_path / "hf", None, tmp_path / "nowhere", 10, groups)
    (tmp_path / "empty").write_text("")
    with pytest.raises(InputError, match="no tokens"):
        compare_logits(tmp_path / "hf", None, tmp_path / "empty", 10, groups)
    for name in ("model", "other"):
        with pytest.raises(InputError, match="no directory"):
            compare_logits(tmp_path / "hf", tmp_path / name, text, 10, groups)
    smaller = Architecture.from_hf(tiny_config("llama", vocab_size=399), "test")
    source = RandomWeights(smaller, 1)
    write_model(
        tmp_path / "small", smaller, ((name, source.tensor(name)) for name in hf_shapes(smaller)), torch.float32
    )
    with pytest.raises(InputError, match="vocab_size"):
        compare_logits(tmp_path / "hf", tmp_path / "small", text, 10, groups)
    assert load_tokenizer(tmp_path / "hf").vocab_size == VOCABULARY
