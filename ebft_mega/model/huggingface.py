"""Weights in Hugging Face's names and shapes, read tensor by tensor into a stage and written back out.

A stage's parameter is packed from one or more Hugging Face tensors: megatron-core keeps query, key and value
rows together per key-value group, and the MLP's gate above its up projection.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ebft_mega.data.tokenizer import copy_tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.model.architecture import Architecture
from ebft_mega.model.stage import Stage

SHARD_BYTES = 4 * 2**30


class WeightSource(Protocol):
    """Where a model's weights come from, one tensor at a time."""

    def tensor(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name, on the CPU."""
        ...


class SafetensorsWeights:
    """Weights of a Hugging Face directory; each call reads one tensor from its file."""

    def __init__(self, directory: Path, architecture: Architecture, num_layers: int | None = None):
        """Check that every tensor is there with its shape.

        Args:
            directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
            num_layers: check (and need) only the lowest layers, and no head; None: the whole model.
        Raises:
            InputError: missing or unreadable files, missing tensors, wrong shapes, all at once.
        """
        self.directory = directory
        self.files = _tensor_files(directory)
        problems = []
        for name, shape in hf_shapes(architecture, num_layers).items():
            if name not in self.files:
                problems.append(Problem(str(directory), name, "no such tensor", f"shape {shape}"))
                continue
            found = self._shape(name)
            if found != shape:
                problems.append(Problem(str(self.files[name]), name, f"shape {found}", f"shape {shape}"))
        if problems:
            raise InputError(problems)

    def _shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor in a model directory."""
    index_path = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    try:
        if index_path.exists():
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            return {name: directory / Path(file).name for name, file in weight_map.items()}
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except FileNotFoundError:
        problem = Problem(str(directory), "model.safetensors", "no such file", "safetensors weights")
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        problem = Problem(str(directory), "safetensors", f"unreadable: {error}", "safetensors weights")
    raise InputError([problem])


@dataclass(frozen=True)
class RandomWeights:
    """Initial weights that are a pure function of (seed, tensor name), so no layout changes them.

    Matrices are normal with Hugging Face's `initializer_range`, norms are one, biases zero.
    """

    architecture: Architecture
    seed: int

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor, float32."""
        shape = hf_shapes(self.architecture)[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        std = float(self.architecture.hf_config.get("initializer_range", 0.02))
        return torch.randn(shape, generator=generator) * std


def hf_shapes(architecture: Architecture, num_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model under its Hugging Face name.

    Args:
        num_layers: only the embedding and this many layers (a feature network); None: the whole model.
    """
    a = architecture
    query, key_value = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers if num_layers is None else num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (a.hidden_size,)
        shapes[prefix + "post_attention_layernorm.weight"] = (a.hidden_size,)
        for name, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, a.hidden_size)
            if a.qkv_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (rows,)
        if a.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (a.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (a.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (a.hidden_size, query)
        shapes[prefix + "mlp.gate_proj.weight"] = (a.intermediate_size, a.hidden_size)
        shapes[prefix + "mlp.up_proj.weight"] = (a.intermediate_size, a.hidden_size)
        shapes[prefix + "mlp.down_proj.weight"] = (a.hidden_size, a.intermediate_size)
    if num_layers is None or num_layers == a.num_hidden_layers:
        shapes["model.norm.weight"] = (a.hidden_size,)
    if num_layers is None and not a.tie_word_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


@dataclass(frozen=True)
class Packing:
    """How one parameter of a stage is made of Hugging Face tensors."""

    sources: tuple[str, ...]
    pack: Callable[[tuple[Tensor, ...]], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, ...]]


def _only(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


def _as_one(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def packing_of(parameter: str, architecture: Architecture) -> Packing:
    """The packing of a stage's parameter.

    Args:
        parameter: name in `Stage.named_parameters()`.
    """
    top_level = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if parameter in top_level:
        return Packing((top_level[parameter],), _only, _as_one)
    _, layer, rest = parameter.split(".", 2)
    prefix = f"model.layers.{layer}."
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    if rest in plain:
        return Packing((prefix + plain[rest],), _only, _as_one)
    if rest == "mlp.linear_fc1.weight":
        gate_and_up = (prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight")
        return Packing(gate_and_up, torch.cat, lambda tensor: tuple(tensor.chunk(2)))
    kind = rest.removeprefix("self_attention.linear_qkv.")
    sources = tuple(f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv")
    groups, dim = architecture.num_key_value_heads, architecture.head_dim
    queries_per_group = architecture.num_attention_heads // groups

    def pack(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def unpack(tensor: Tensor) -> tuple[Tensor, ...]:
        parts = tensor.unflatten(0, (groups, -1)).split((queries_per_group * dim, dim, dim), dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    return Packing(sources, pack, unpack)


def load_weights(
    stage: Stage,
    source: WeightSource,
    gathered: Callable[[nn.Parameter], AbstractContextManager[Any]] = lambda _: nullcontext(),
    is_reader: bool = True,
) -> None:
    """Fill a stage's parameters from a source, one parameter at a time.

    Args:
        gathered: context in which a partitioned parameter is whole; what rank 0 of its group wrote is kept.
        is_reader: whether this rank reads the source (rank 0 of the partition's group, or everyone).
    Communication: that of `gathered`.
    """
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            packing = packing_of(name, stage.architecture)
            with gathered(parameter):
                if is_reader:
                    tensors = tuple(source.tensor(hf_name) for hf_name in packing.sources)
                    parameter.data.copy_(packing.pack(tensors))


def hf_tensors(parameters: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Full parameters of a stage as Hugging Face tensors, one after another."""
    for name, parameter in parameters:
        packing = packing_of(name, architecture)
        yield from zip(packing.sources, packing.unpack(parameter), strict=True)


def write_model(
    directory: Path,
    architecture: Architecture,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face model directory, at most one shard of tensors in memory.

    The files are written under a temporary name beside `directory` and renamed when they are complete.

    Args:
        tensors: Hugging Face names with full tensors.
        dtype: of the written weights.
        tokenizer: directory of the tokenizer to put beside the weights.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(pending, partial / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if pending and sum(t.numel() * dtype.itemsize for t in pending.values()) + size > shard_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu", dtype).contiguous().clone()
        total += size
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (partial / f"shard-{index}.safetensors").rename(partial / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (partial / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    config = {**architecture.hf_config, "torch_dtype": str(dtype).removeprefix("torch.")}
    config["architectures"] = [
        {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[architecture.model_type]
    ]
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
