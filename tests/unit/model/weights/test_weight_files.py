"""What the headers of a model directory may say, and what is refused, before any weight is read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ebft_mega.model.weights.weight_files import INDEX_NAME, stored_tensors


def write_raw(path: Path, header: object, num_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * num_bytes)


def entry(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def found(directory: Path) -> list[str]:
    return [f"{problem.key}: {problem.found}" for problem in stored_tensors(directory)[1]]


def test_headers_say_what_the_library_wrote(tmp_path):
    tensors = {
        "a": torch.zeros(3, 2),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros((), dtype=torch.float16),
        "d": torch.zeros(0, 5, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored, problems = stored_tensors(tmp_path)
    file = tmp_path / "model.safetensors"
    assert problems == []
    assert {name: (tensor.file, tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "a": (file, "F32", (3, 2)),
        "b": (file, "BF16", (4,)),
        "c": (file, "F16", ()),
        "d": (file, "I8", (0, 5)),
    }
    content = file.read_bytes()
    for name, num_bytes in (("a", 24), ("b", 8), ("c", 2)):
        offset = stored[name].offset
        assert content[offset : offset + num_bytes] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "num_bytes", "words"),
    [
        ({"a": entry(0, 8)}, 7, "model.safetensors: 76 bytes"),
        ({"a": entry(0, 8)}, 9, "model.safetensors: 78 bytes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b: bytes 4 to 12"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b: bytes 12 to 20"),
        ({"a": entry(0, 4)}, 4, "a: bytes 0 to 4"),
        ({"a": entry(0, 8, (-2, -1))}, 8, "a: bytes 0 to 8"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', 8, "the key 'a' more than once"),
        ([1, 2], 0, "values of another kind"),
        ({"a": {"dtype": "F32"}}, 0, "no 'data_offsets'"),
        ({"a": entry(0, 8) | {"shape": "2"}}, 8, "no list of whole numbers"),
        ({"a": entry(0, 8) | {"shape": [2.0]}}, 8, "no list of whole numbers"),
        ({"a": entry(0, 8) | {"data_offsets": [0, True]}}, 8, "no list of whole numbers"),
        (b"\xff\xfe{}", 0, "model.safetensors: "),
        (b"[" * 5000 + b"]" * 5000, 0, "model.safetensors: "),
    ],
)
def test_contradictory_headers_are_refused(tmp_path, header, num_bytes, words):
    write_raw(tmp_path / "model.safetensors", header, num_bytes)
    (problem,) = found(tmp_path)
    assert words in problem


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole: no disk
    assert found(tmp_path) == ["model.safetensors: 300000000 bytes"]


def write_two_files(directory: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, directory / "model-1.safetensors")
    save_file({"c": torch.zeros(2)}, directory / "model-2.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


WHOLE = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"b": None}, ["b: in no file"]),
        ({"b": "model-2.safetensors"}, ["b: in model-2.safetensors"]),
        ({"d": "model-2.safetensors"}, ["d: in model-2.safetensors"]),
        ({"d": "../outside.safetensors"}, ["weight_map: '../outside.safetensors'"]),
        ({"d": "pytorch_model.bin"}, ["weight_map: 'pytorch_model.bin'"]),
        ({"d": "model-3.safetensors"}, ["model-3.safetensors: no such file"]),
    ],
)
def test_an_index_names_the_tensors_that_are_there(tmp_path, change, words):
    weight_map = {name: file for name, file in (WHOLE | change).items() if file}
    write_two_files(tmp_path, weight_map)
    assert found(tmp_path) == words


def test_one_tensor_in_two_files(tmp_path):
    write_two_files(tmp_path, WHOLE)
    save_file({"c": torch.zeros(2), "a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    assert found(tmp_path) == ["a: in model-1.safetensors and in model-2.safetensors"]


def test_two_sets_of_weights_are_ambiguous(tmp_path):
    write_two_files(tmp_path, WHOLE)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert found(tmp_path) == [f"weights: model.safetensors beside {INDEX_NAME}"]


def test_files_that_are_not_part_of_the_model_are_not_looked_at(tmp_path):
    """Mistral's own repositories hold a second copy of the weights under other names."""
    write_two_files(tmp_path, WHOLE)
    (tmp_path / "consolidated.safetensors").write_bytes(b"whatever")
    assert found(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "[" * 5000])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    (problem,) = found(tmp_path)
    assert problem.startswith(("weight_map: ", f"{INDEX_NAME}: "))
