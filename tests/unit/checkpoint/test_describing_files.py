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
from ebft_mega.data.tokenizers.tokenizer import copy_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.errors import InputError
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
    assert sorted(problem.key for problem in described.problems) == sorted(JUNK.keys() - {"deep.json"})
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
        "folder.json (a directory)",
        "pipe.json (a FIFO)",
        "'line\\nbreak.json'",
    ):
        assert name in note
    assert "loop.json (links in a circle)" in note and "nowhere.json (No such file" in note
    assert {"tokenizer.model", "tokenizer_config.json", "generation_config.json"} == described.contents.keys()


def test_links_to_blobs_are_followed_as_in_a_cache_of_downloads(model, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123456"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    (repository / "blobs" / ("f" * 40)).write_text(TEMPLATE)
    (snapshot / "additional_chat_templates" / "a.jinja").symlink_to(f"../../../blobs/{'f' * 40}")
    described = written_again(snapshot, tmp_path / "hf")
    assert described.notes == []
    assert described.contents["additional_chat_templates/a.jinja"] == TEMPLATE.encode()
    assert described.has_tokenizer and not any(path.is_symlink() for path in (tmp_path / "hf").rglob("*"))


SECRET = "a secret\n"
LINKED = {  # each would pass for what it is named
    "generation_config.json": '{"secret": 1}',
    "chat_template.json": '{"secret": 1}',
    "chat_template.jinja": SECRET,
    "merges.txt": SECRET,
    "vocab.json": '{"secret": 1}',
    "vocab.txt": "secret\n",
    "other.json": '["secret"]',
    "special_tokens_map.json": '{"eos_token": "secret"}',
    "added_tokens.json": '{"secret": 1}',
    "tokenizer_config.json": '{"eos_token": "</s>", "secret": 1}',
    "additional_chat_templates/a.jinja": SECRET,
}


@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_copied_through_a_link_that_leaves_the_directory(model, tmp_path, folder):
    outside = tmp_path / "outside"
    for name, content in LINKED.items():
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(content)
        if "/" not in name:
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(outside / name)
    if folder:
        (outside / "additional_chat_templates" / "private-name").touch()
        (model / "additional_chat_templates").symlink_to(outside / "additional_chat_templates")
    else:
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "a.jinja").symlink_to(outside / "additional_chat_templates/a.jinja")
    described = written_again(model, tmp_path / "hf")
    assert described.contents.keys() == {"tokenizer.model"}
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file())
    (note,) = described.notes
    assert all(name.split("/")[0] in note for name in LINKED)
    assert "outside of its directory" in note
    assert "private-name" not in note  # nor are the names of a folder elsewhere


NOT_WHAT_THEY_ARE_NAMED = {
    "merges.txt": ["a b\nroot:x:0:0\n", "a b c\n", "a b\n\nc d\n", "a \n", "a\tb\n"],
    "vocab.txt": ["a\nb c\n", "a\n\nb\n", "a\0\n"],
    "vocab.json": ['["a"]', '{"a": "b"}', '{"a": true}', '{"a": -1}', '{"a": 1.5}', '{"a": 1, "a": 2}'],
    "added_tokens.json": ['{"a": null}', "1"],
    "special_tokens_map.json": ['{"eos_token": 1}', '{"eos_token": {"text": 1}}', '{"x": ["a", 1]}'],
    "generation_config.json": ["1", '"text"', "[]", '{"a": NaN}'],
    "tokenizer_config.json": ["[]", "null"],
    "chat_template.jinja": ["a\0b", "\x1b[31m"],
    "other.json": ["1", '"secret"'],
}


@pytest.mark.parametrize("name", NOT_WHAT_THEY_ARE_NAMED)
def test_each_file_is_parsed_as_what_it_is_named(model, name):
    for content in NOT_WHAT_THEY_ARE_NAMED[name]:
        (model / name).write_text(content)
        described = read_describing_files(model)
        assert name not in described.contents, content
        found = [problem.key for problem in described.problems] or [other.split(" (")[0] for other in described.others]
        assert found == [name], content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("merges.txt", "#version: 0.2\n\u0120 t\ni n\n"),
        ("merges.txt", "\u2581 t\r\na\u2028 b\x85\r\n"),
        ("merges.txt", ""),
        ("vocab.txt", "[PAD]\n[UNK]\n##s\n"),
        ("vocab.json", '{"a": 0, "\u0120b": 1}'),
        ("special_tokens_map.json", '{"eos_token": {"content": "a", "special": true}, "pad_token": null, "x": ["b"]}'),
        ("chat_template.jinja", TEMPLATE + "\t\r\n"),
    ],
)
def test_what_real_files_hold_is_accepted(model, name, content):
    (model / name).write_bytes(content.encode())
    assert read_describing_files(model).contents[name] == content.encode()


def test_other_texts_describe_no_model(model):
    (model / "notes.txt").write_text("private")
    described = read_describing_files(model)
    assert "notes.txt" not in described.contents and described.others == ("notes.txt",)


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("has_model", [False, True])
def test_the_datas_tokenizer_is_refused_where_a_link_leaves_it(model, tmp_path, tokenizer_directory, name, has_model):
    dataset = Path(shutil.copytree(tokenizer_directory, tmp_path / "tokenizer"))
    (dataset / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("a secret\n")
    (dataset / name).symlink_to("../secret")
    config = configuration(tmp_path, model)
    if not has_model:
        config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})
    with pytest.raises(InputError, match=r"secret, which is outside of its directory") as caught:
        describing_files(config, dataset)
    assert [problem.where for problem in caught.value.problems] == [str(dataset / name)]


def test_keys_that_name_code_do_not_come_from_the_data_either(model, tmp_path, tokenizer_directory):
    dataset = Path(shutil.copytree(tokenizer_directory, tmp_path / "tokenizer"))
    change_json(dataset / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    (model / "tokenizer.model").unlink()
    described = describing_files(configuration(tmp_path, model), dataset)
    assert b"auto_map" not in described.contents["tokenizer_config.json"]
    assert "auto_map of tokenizer_config.json" in described.notes[0]


def test_sizes_and_numbers_are_bounded(model, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_BYTES", {**module.LONGEST_BYTES, ".txt": 4, ".jinja": MEBIBYTE})
    (model / "merges.txt").write_text("a b\n")
    (model / "vocab.txt").write_text("12345")
    (model / "sparse.jinja").touch()
    os.truncate(model / "sparse.jinja", 2**40)
    described = read_describing_files(model)
    assert "merges.txt" in described.contents
    assert described.others == (
        f"sparse.jinja ({2**40} bytes, more than {MEBIBYTE})",
        "vocab.txt (5 bytes, more than 4)",
    )
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
