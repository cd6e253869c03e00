"""Check a model's stored tensors against its architecture: missing, misshapen and surplus ones. No torch.

A surplus tensor is accepted only where leaving it out cannot change a result, which its values show.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import EMBEDDING_NAME, HEAD_NAME, hf_shapes
from ebft_mega.errors import Problem
from ebft_mega.model.weights.stored_values import READABLE_DTYPES, are_frequencies, equal_values, is_zero
from ebft_mega.model.weights.weight_files import StoredTensor

# Rotary frequencies, which follow from the configuration; old versions of transformers stored them.
_FORMER_BUFFER = ".rotary_emb.inv_freq"
_BIAS = ".bias"


@dataclass(frozen=True)
class TensorFit:
    """What is wrong with the tensors of a directory, and what is left out of them."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def with_own_head(
    architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture as the files have it: a tied head that differs from the embedding is one of its own.

    transformers 5 keeps such a head apart, whatever `tie_word_embeddings` says.

    Returns:
        The architecture, untied where the values differ, and a note on that.
    """
    if not architecture.tie_word_embeddings or not _head_differs(stored):
        return architecture, ()
    note = (
        f"{HEAD_NAME} differs from {EMBEDDING_NAME} though tie_word_embeddings is true: it is trained as a head of "
        "its own, as transformers 5 reads it, and tie_word_embeddings is false in what is written."
    )
    return replace(architecture, tie_word_embeddings=False), (note,)


def _head_differs(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether there is a head of the embedding's shape with other values."""
    head, embedding = stored.get(HEAD_NAME), stored.get(EMBEDDING_NAME)
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    return _can_be_read(head) and _can_be_read(embedding) and not equal_values(head, embedding)


def _can_be_read(tensor: StoredTensor) -> bool:
    return tensor.dtype in READABLE_DTYPES


def check_fit(
    directory: Path, stored: Mapping[str, StoredTensor], architecture: Architecture, num_layers: int | None = None
) -> TensorFit:
    """Compare stored tensors with those of a model, by name, shape and dtype, and surplus ones by their values.

    Args:
        stored: all tensors of the directory, as `stored_tensors` lists them.
        architecture: of the model; a head that differs from a tied embedding is refused (see `with_own_head`).
        num_layers: need only the embedding and the lowest layers, and no head; None: the whole model.
    Raises:
        OSError: a file cannot be read.
    """
    problems, notes = list(_unfitting(directory, stored, hf_shapes(architecture, num_layers))), []
    known = hf_shapes(architecture)
    for name, tensor in stored.items():
        if name in known:
            continue
        expected = _expected_surplus(name, stored, architecture)
        if expected is not None:
            problems.append(Problem(str(tensor.file), name, "a tensor", expected))
        elif name != HEAD_NAME:
            notes.append(name)
    text = f"left out, because they change nothing: {', '.join(notes)}."
    return TensorFit(tuple(problems), (text,) * bool(notes))


def _unfitting(
    directory: Path, stored: Mapping[str, StoredTensor], needed: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    """Tensors that are missing, misshapen, or of a dtype that is no weight's."""
    for name, shape in needed.items():
        if name not in stored:
            yield Problem(str(directory), name, "no such tensor", f"shape {shape}")
            continue
        where, tensor = str(stored[name].file), stored[name]
        if tensor.shape != shape:
            yield Problem(where, name, f"shape {tensor.shape}", f"shape {shape}")
        if not _can_be_read(tensor):
            yield Problem(where, name, f"dtype {tensor.dtype}", f"one of {', '.join(READABLE_DTYPES)}")


def _expected_surplus(name: str, stored: Mapping[str, StoredTensor], architecture: Architecture) -> str | None:
    """What would be valid in place of a tensor that is not part of the model; None: leaving it out changes nothing."""
    tensor, shape = stored[name], (architecture.vocab_size, architecture.hidden_size)
    readable = _can_be_read(tensor)
    if name == HEAD_NAME:  # the model is tied
        is_same = readable and tensor.shape == shape and not _head_differs(stored)
        return None if is_same else f"the values of {EMBEDDING_NAME}, shape {shape}, or no such tensor"
    if name.endswith(_FORMER_BUFFER):
        is_same = readable and are_frequencies(tensor, architecture.rotary.frequencies(architecture.head_dim))
        return None if is_same else "the rotary frequencies that config.json leads to, or no such tensor"
    if name.endswith(_BIAS) and f"{name.removesuffix(_BIAS)}.weight" in hf_shapes(architecture):
        is_same = readable and is_zero(tensor)
        return None if is_same else f"zeros, or no such tensor: a {architecture.model_type} model has no bias there"
    hint = _hint(name, architecture)
    return f"none of this name in a {architecture.model_type} model{hint}"


def _hint(name: str, architecture: Architecture) -> str:
    """Why a tensor of a familiar name is surplus."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal():
        layers = architecture.num_hidden_layers
        return f" of {layers} layers (num_hidden_layers)" if int(parts[2]) >= layers else ""
    return " (its names begin with model.)" if f"model.{name}" in hf_shapes(architecture) else ""
