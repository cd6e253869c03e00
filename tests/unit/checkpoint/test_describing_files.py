"""Everything that describes a model comes along with it, its own, and nothing that a loader would stumble over."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint import describing_files as module
from ebft_mega.checkpoint.describing_files import MEBIBYTE, describing_files, read_describing_files
from ebft_mega.config.load import load_config
from ebft_mega.data.text.tokenizer import copy_tokenizer
from ebft_mega.data.text.tokenizer_training import train_tokenizer
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import SafetensorsWeights
from tests.unit.written_checkpoint import list_files, write_checkpoint

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "caf\u00e9?"}]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """A sentencepiece tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    (directory / "a.py").write_text(Path(__file__).read_text())
    train_tokenizer(directory, 400, directory / "tokenizer")
    return directory / "tokenizer"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer_directory):
    """A tiny model with a tokenizer, as transformers and this program's tools write them."""
    directory = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1},
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    copy_tokenizer(tokenizer_directory, directory)
    return directory


@pytest.fixture
def model(tmp_path, saved):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_json(path, **fields):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


def written_again(model, target):
    """The model with what describes it, as the end of a run writes it."""
    architecture = Architecture.from_directory(model)
    weights = SafetensorsWeights(model, architecture)
    described = read_describing_files(model)
    pairs = ((name, weights.tensor(name)) for name in hf_shapes(architecture))
    write_model(target, architecture, pairs, torch.float32, described.contents)
    return described


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional"])
def test_chat_templates_are_the_same_wherever_they_stand(model, tmp_path, place):
    if place == "tokenizer_config.json":
        change_json(model / place, chat_template=TEMPLATE)
    elif place == "chat_template.json":
        change_json(model / place, chat_template=TEMPLATE)
    else:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    named = {}
    if place == "additional":
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0]['content'] }}")
        named = {"chat_template": "short"}
    described = written_again(model, tmp_path / "hf")
    assert described.problems == () and described.others == () and described.notes == []
    own = {path.relative_to(model) for path in model.rglob("*")}
    assert {path.relative_to(tmp_path / "hf") for path in (tmp_path / "hf").rglob("*")} == own
    if place != "chat_template.json":  # for processors
        then, now = (AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "hf"))
        shown = now.apply_chat_template(MESSAGES, tokenize=False, **named)
        assert shown == then.apply_chat_template(MESSAGES, tokenize=False, **named)
        assert shown == ("caf\u00e9?" if named else "[user] caf\u00e9?\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.eos_token_id == 1


JUNK = {
    "special_tokens_map.json": b"[]",
    "generation_config.json": b"{",
    "deep.json": b"[" * 100_000,
    "chat_template.jinja": b"\xff\xfe{{ messages }}",
    "vocab.txt": b"\xe9",
    "spiece.model": b"neither",
    "tokenizer.json": b'{"model": {"type": "BPE"}}',
}


def test_junk_stays_behind_by_its_name(model, tmp_path):
    for name, content in JUNK.items():
        (model / name).write_bytes(content)
    described = written_again(model, tmp_path / "hf")
    assert sorted(problem.key for problem in described.problems) == sorted(JUNK)
    assert not JUNK.keys() & described.contents.keys()
    (note,) = described.notes
    assert all(f"{name} (" in note for name in JUNK)
    AutoTokenizer.from_pretrained(tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_what_is_no_describing_file_is_listed(model, tmp_path):
    others = ("pytorch_model.bin", "modeling_llama.py", "README.md", "adapter_config.json", "state.json", "run.sh")
    for name in (*others, "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (model / name).write_text("{}")
    (model / "original").mkdir()
    (model / "folder.json").mkdir()
    os.mkfifo(model / "pipe.json")
    (model / "loop.json").symlink_to("loop.json")
    (model / "nowhere.json").symlink_to("nothing")
    (model / "line\nbreak.json").write_text("{}")
    described = read_describing_files(model)
    (note,) = described.notes
    for name in (
        *others,
        "original",
        "folder.json (no plain file)",
        "pipe.json (no plain file)",
        "'line\\nbreak.json'",
    ):
        assert name in note
    assert "loop.json (Too many" in note and "nowhere.json (No such file" in note
    assert {"tokenizer.model", "tokenizer_config.json", "generation_config.json"} == described.contents.keys()


def test_links_to_files_are_followed_as_in_a_cache_of_downloads(model, tmp_path):
    (tmp_path / "blob").write_text(TEMPLATE)
    (model / "chat_template.jinja").symlink_to(tmp_path / "blob")
    assert read_describing_files(model).contents["chat_template.jinja"] == TEMPLATE.encode()


def test_sizes_and_numbers_are_bounded(model, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_BYTES", {**module.LONGEST_BYTES, ".txt": 4, ".jinja": MEBIBYTE})
    (model / "short.txt").write_text("1234")
    (model / "long.txt").write_text("12345")
    (model / "sparse.jinja").touch()
    os.truncate(model / "sparse.jinja", 2**40)
    described = read_describing_files(model)
    assert "short.txt" in described.contents
    assert described.others == ("long.txt (longer than 0 MiB)", "sparse.jinja (longer than 1 MiB)")
    monkeypatch.setattr(module, "ALL_BYTES", sum(map(len, described.contents.values())) - 1)
    assert len(read_describing_files(model).contents) == len(described.contents) - 1
    monkeypatch.setattr(module, "MOST_NAMES", 2)
    assert "more than 2 files of model" in read_describing_files(model).others


def test_keys_that_name_code_are_taken_out(model):
    change_json(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, inner={"auto_map": 1, "a": 2}
    )
    described = read_describing_files(model)
    written = json.loads(described.contents["tokenizer_config.json"])
    assert "auto_map" not in written and written["inner"] == {"a": 2} and written["eos_token"] == "</s>"
    assert [problem.key for problem in described.problems] == ["auto_map", "inner.auto_map"]
    assert "auto_map of tokenizer_config.json" in described.notes[0]


def test_a_list_of_tiktoken_is_a_tokenizer_model(model):
    (model / "other.model").write_text("IQ== 0\nIg== 1\n")
    assert "other.model" in read_describing_files(model).contents


def configuration(tmp_path, model):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{init_from: {model}}}\n"
        f"data: {{shards: {tmp_path / 'data'}, sequence_length: 32}}\n"
        "ebft: {stride: 4, context_length: 4, generate_max_len: 4}\n"
        "train: {global_batch_size: 4, micro_batch_size: 2, max_steps: 2, lr: 1e-3, dtype: float32}\n"
    )
    return load_config(path)


def test_the_model_keeps_its_own_and_never_gets_the_datasets(model, tmp_path, tokenizer_directory):
    dataset = Path(shutil.copytree(tokenizer_directory, tmp_path / "tokenizer"))
    change_json(dataset / "tokenizer_config.json", chat_template="the dataset's")
    change_json(model / "tokenizer_config.json", chat_template="the model's")
    described = describing_files(configuration(tmp_path, model), dataset)
    assert json.loads(described.contents["tokenizer_config.json"])["chat_template"] == "the model's"
    # Without a vocabulary of its own it gets the whole tokenizer of the data, and not a mixture.
    (model / "tokenizer.model").unlink()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    described = describing_files(configuration(tmp_path, model), dataset)
    assert json.loads(described.contents["tokenizer_config.json"])["chat_template"] == "the dataset's"
    assert described.contents["chat_template.jinja"] == TEMPLATE.encode()
    assert described.others == ("tokenizer_config.json (there is no vocabulary beside it)",)


def test_of_a_checkpoint_only_listed_files_count(model, tmp_path):
    architecture = Architecture.from_directory(model)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "state.json").write_text("{}")
    copy_tokenizer(model, tmp_path / "small")
    folder = write_checkpoint(
        tmp_path / "checkpoints", architecture, SafetensorsWeights(model, architecture), small_files=tmp_path / "small"
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").write_text(TEMPLATE)
    list_files(folder)
    (folder / "chat_template.jinja").write_text("added later")
    described = read_describing_files(folder)
    names = {"tokenizer.model", "tokenizer_config.json", "additional_chat_templates/a.jinja"}
    assert described.contents.keys() == names and described.notes == []
