"""One check of a model directory: whatever it is, it is accepted or refused in words, and nothing waits or escapes."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.errors import InputProblems
from ebft_mega.planning.model_files import check_model
from tests.unit.conftest import MODEL_FIELDS, write_weights


@pytest.fixture
def directory(tmp_path):
    write_weights(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL_FIELDS))
    return tmp_path / "model"


def problems_of(directory, *arguments) -> list[str]:
    with pytest.raises(InputProblems) as caught:
        check_model(directory, *arguments)
    assert caught.value.exit_code == 2
    return [f"{problem.key}: {problem.found}" for problem in caught.value.problems]


def test_a_good_directory(directory):
    model = check_model(directory)
    assert model.architecture == Architecture.from_directory(directory)
    assert (model.directory, model.end_tokens, model.notes) == (directory, (), ())


@pytest.mark.parametrize("kind", ["nothing", "a file", "a FIFO", "a link to itself", "a dangling link"])
def test_paths_that_are_no_directory(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "a file":
        path.write_text("x")
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    (problem,) = problems_of(path)
    words = {"a file": "a file", "a FIFO": "a FIFO", "a link to itself": "Too many levels of symbolic links"}
    assert problem == f"model: {words.get(kind, f'no directory {path}')}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["a directory", "a FIFO", "a link to itself"])
def test_files_that_are_none_are_not_opened(directory, name, kind):
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    (problem,) = problems_of(directory)
    words = {"a link to itself": ": "} | dict.fromkeys(("a directory", "a FIFO"), f"{name}: {kind}")
    assert problem.startswith(f"{name}: ") and words[kind] in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf{}", "config.json: a byte order mark"),
        (json.dumps(MODEL_FIELDS).encode("utf-16"), "config.json: byte 0, which is not UTF-8"),
        (json.dumps(MODEL_FIELDS).encode()[:-1] + b', "hidden_size": 16}', "config.json: the key 'hidden_size' more"),
        (json.dumps(MODEL_FIELDS | {"x": float("nan")}).encode(), "config.json: NaN, which is not JSON"),
        (b"[" * 100_000, "config.json: "),
        (b"[]", "config.json: a JSON list"),
        (b"", "config.json: Expecting value"),
        (json.dumps(MODEL_FIELDS | {"num_hidden_layers": "4"}).encode(), "num_hidden_layers: '4'"),
        (json.dumps(MODEL_FIELDS | {"num_hidden_layers": 4.0}).encode(), "num_hidden_layers: 4.0"),
        (json.dumps(MODEL_FIELDS | {"num_hidden_layers": True}).encode(), "num_hidden_layers: True"),
        (json.dumps(MODEL_FIELDS | {"num_hidden_layers": 10**12}).encode(), "num_hidden_layers: 1000000000000"),
    ],
)
def test_configurations_that_cannot_be_read(directory, content, words):
    (directory / "config.json").write_bytes(content)
    (problem,) = problems_of(directory)
    assert problem.startswith(words)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"junk", b"\xff", b"[1]", b'{"a": 1, "a": 2}'])
def test_describing_files_that_are_none(directory, name, content):
    (directory / name).write_bytes(content)
    (problem,) = problems_of(directory)
    assert problem.startswith(f"{name}: ")
    (directory / name).write_text('{"deep": {"auto_map": {"AutoTokenizer": ["x.Y", null]}}}')
    assert problems_of(directory) == ['deep.auto_map: {"AutoTokenizer": ["x.Y", null]}']


def moved(directory, name):
    """Put a file of a model elsewhere, and a link in its place."""
    outside = directory.parent / "outside"
    outside.mkdir(exist_ok=True)
    target = (directory / name).rename(outside / name)
    (directory / name).symlink_to(target)
    return target


def safe_names(path):
    with safe_open(path, "pt") as file:
        return list(file.keys())


READ_NAMES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.json", "tokenizer.model"),
)


@pytest.mark.parametrize("name", READ_NAMES)
def test_what_a_run_reads_of_a_model_is_in_its_directory(directory, name):
    if name != "config.json":
        (directory / name).write_text("{}")
    target = moved(directory, name)
    assert problems_of(directory) == [f"{name}: a link to {target}, which is outside of its directory"]
    # Within the directory a link may lead anywhere.
    (directory / name).unlink()
    target.rename(directory / "other")
    (directory / name).symlink_to("other")
    assert check_model(directory).notes == ()


def test_an_index_elsewhere_is_refused_and_weights_elsewhere_are_a_note(directory):
    target = moved(directory, "model.safetensors")
    (note,) = check_model(directory).notes
    assert note == f"weights are read through links that leave {directory}: model.safetensors -> {target}."
    names = safe_names(target)
    (directory / "model-1.safetensors").symlink_to(target)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    assert len(check_model(directory).notes) == 1
    target = moved(directory, index.name)
    assert f"{index.name}: a link to {target}, which is outside of its directory" in problems_of(directory)


def test_blobs_of_the_hubs_cache_are_no_links_that_leave(directory, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert check_model(snapshot).notes == ()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\..\\b"])
def test_an_index_leads_nowhere_else(directory, name):
    save_file({"a": torch.zeros(2)}, directory.parent / "outside.safetensors")
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = {"weight_map": {"a": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problems_of(directory) == [f"weight_map: {name!r}"]


def test_everything_at_once(directory):
    (directory / "config.json").write_text(json.dumps(MODEL_FIELDS | {"hidden_act": "gelu", "mlp_bias": True}))
    (directory / "model.safetensors").write_bytes(b"x")
    (directory / "tokenizer_config.json").write_text("junk")
    assert [problem.partition(":")[0] for problem in problems_of(directory)] == [
        "hidden_act",
        "mlp_bias",
        "model.safetensors",
        "tokenizer_config.json",
    ]


def change_head(directory, value):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.weight": value}, directory / "model.safetensors")


def test_a_head_of_its_own_unties_the_model_and_is_said(directory):
    change_head(directory, torch.ones(100, 16))
    assert check_model(directory).notes == () and check_model(directory).architecture.tie_word_embeddings
    other = torch.ones(100, 16)
    other[-1, -1] = 2
    change_head(directory, other)
    model = check_model(directory)
    assert not model.architecture.tie_word_embeddings
    assert model.architecture.exported_config("float32")["tie_word_embeddings"] is False
    (note,) = model.notes
    assert note.startswith("lm_head.weight differs from model.embed_tokens.weight") and "head of its own" in note
    # A feature network has no head; the file is the same, and so is what is said of it.
    assert check_model(directory, (0.5,)).notes == model.notes


def test_a_head_that_changes_is_compared_again(directory):
    """What was compared is remembered for as long as the file is the same one."""
    change_head(directory, torch.ones(100, 16))
    assert check_model(directory).architecture.tie_word_embeddings
    change_head(directory, torch.zeros(100, 16))
    assert not check_model(directory).architecture.tie_word_embeddings
    change_head(directory, torch.ones(100, 16))
    assert check_model(directory).architecture.tie_word_embeddings


def test_a_feature_model_needs_its_lowest_layers_alone(directory):
    tensors = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if ".3." not in name}
    save_file(tensors, directory / "model.safetensors")
    assert len(problems_of(directory)) == 9 and len(problems_of(directory, (0.5, 1.0))) == 9
    check_model(directory, (0.25, 0.75))
    save_file({**tensors, "vision.weight": torch.zeros(1)}, directory / "model.safetensors")
    assert problems_of(directory, (0.25, 0.75)) == ["vision.weight: a tensor"]


def test_what_is_not_read_is_said(directory):
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    notes = check_model(directory).notes
    assert [note.partition(":")[0].partition(" is")[0] for note in notes] == [
        "not read, because no index names them",
        "adapter_config.json",
    ]
    assert "consolidated.safetensors" in notes[0]


def test_end_tokens_are_those_of_both_configurations(directory):
    (directory / "config.json").write_text(json.dumps(MODEL_FIELDS | {"eos_token_id": 7}))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert check_model(directory).end_tokens == (7, 9)
