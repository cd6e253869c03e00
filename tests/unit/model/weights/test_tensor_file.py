"""Files of the tensor-by-tensor writer are what the safetensors library reads, and its hash is that of the file."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ebft_mega.model.weights.tensor_file import DTYPE_NAMES, TensorFileWriter, TensorSpec
from tests.memory import peak_tensor_bytes

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.builds(TensorSpec, st.sampled_from(list(DTYPE_NAMES)), SHAPES),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_the_library_reads_what_was_written(tmp_path_factory, specs, metadata):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    writer = TensorFileWriter(path, specs, metadata)
    tensors = {name: torch.randn(spec.shape).to(spec.dtype) for name, spec in specs.items()}
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    written = writer.close()
    assert written.bytes == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    writer = TensorFileWriter(tmp_path / "x", {"t": TensorSpec(torch.float32, (4, 3))})
    writer.write("t", whole.T)
    writer.close()
    assert torch.equal(load_file(tmp_path / "x")["t"], whole.T)


def test_only_what_was_announced_comes(tmp_path):
    spec = TensorSpec(torch.float32, (2,))
    writer = TensorFileWriter(tmp_path / "x", {"a": spec, "b": spec})
    with pytest.raises(ValueError, match="b comes where a was announced"):
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match=r"a is torch.float32 \(3,\)"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="a is torch.bfloat16"):
        writer.write("a", torch.zeros(2, dtype=torch.bfloat16))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="b has not come"):
        writer.close()
    writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match="a comes where None was announced"):
        writer.write("a", torch.zeros(2))
    writer.close()


def test_writing_copies_nothing(tmp_path):
    tensor = torch.zeros(1 << 20)
    writer = TensorFileWriter(tmp_path / "x", {"t": TensorSpec(torch.float32, (1 << 20,))})
    _, peak = peak_tensor_bytes(lambda: writer.write("t", tensor))
    writer.close()
    assert peak < tensor.nbytes / 8
