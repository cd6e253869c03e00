"""Weights in Hugging Face's names and shapes, read tensor by tensor into a stage and written back out."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ebft_mega.data.tokenizer import copy_tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.model.architecture import Architecture
from ebft_mega.model.packing import Box, packing_of
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.groups import ProcessGroups

SHARD_BYTES = 4 * 2**30


class WeightSource(Protocol):
    """Where a model's weights come from, one tensor at a time."""

    def tensor(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name, on the CPU."""
        ...

    def part(self, name: str, box: Box) -> Tensor:
        """A part of it; no more than that is read where the source can do so."""
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

    def part(self, name: str, box: Box) -> Tensor:
        """Read a part of one tensor."""
        with safe_open(self.files[name], "pt") as file:
            part: Tensor = file.get_slice(name)[box]
            return part


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

    def part(self, name: str, box: Box) -> Tensor:
        """Draw one tensor and take a part of it."""
        return self.tensor(name)[box]


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
    groups, shapes = stage.groups, hf_shapes(stage.architecture)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            packing = packing_of(name, stage.architecture, stage.shape.first_layer, groups.tensor_parallel_size)
            with gathered(parameter):
                if is_reader:
                    boxes = (
                        (hf_name, packing.box(shapes[hf_name], groups.tensor_parallel_rank))
                        for hf_name in packing.sources
                    )
                    parameter.data.copy_(packing.pack(tuple(source.part(*box) for box in boxes)))


def hf_tensors(parameters: Iterable[tuple[str, Tensor]], stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """The whole model as Hugging Face tensors, one after another, the same on every rank.

    Args:
        parameters: name and this rank's slice of every parameter of the stage, in the stage's order.
        stage: this rank's stage (its parameters are not looked at, only what they are).
    Communication: per parameter one all-gather over the tensor-parallel group if it is sliced, then one broadcast
        along the pipeline; every rank has to exhaust the iterator.
    """
    groups, ranks = stage.groups, stage.groups.tensor_parallel_size
    roles = stage.parameter_roles()
    for turn in range(groups.pipeline_size):
        if turn == groups.pipeline_rank:
            for name, parameter in parameters:
                if roles[name].copy:
                    continue
                packing = packing_of(name, stage.architecture, stage.shape.first_layer, ranks)
                slices = tuple(torch.empty_like(parameter) for _ in range(ranks))
                if roles[name].sharded:
                    dist.all_gather(list(slices), parameter.contiguous(), group=groups.tensor_parallel)
                else:
                    slices = (parameter,) * ranks
                for pair in zip(packing.sources, packing.whole(slices), strict=True):
                    _announce(pair, groups)
                    yield pair
            _announce(None, groups)
        else:
            while (heard := _hear(turn, groups)) is not None:
                yield heard


def _announce(pair: tuple[str, Tensor] | None, groups: ProcessGroups) -> None:
    """Give the other stages a named tensor of this one, or tell them that there is no more."""
    if groups.pipeline_size == 1:
        return
    header = [None if pair is None else (pair[0], pair[1].shape, pair[1].dtype)]
    group, own = groups.pipeline_parallel, groups.pipeline_rank
    dist.broadcast_object_list(header, group=group, group_src=own, device=groups.device)
    if pair is not None:
        dist.broadcast(pair[1].contiguous(), group=group, group_src=own)


def _hear(stage: int, groups: ProcessGroups) -> tuple[str, Tensor] | None:
    """What a stage announces next."""
    header: list[tuple[str, torch.Size, torch.dtype] | None] = [None]
    dist.broadcast_object_list(header, group=groups.pipeline_parallel, group_src=stage, device=groups.device)
    if header[0] is None:
        return None
    name, shape, dtype = header[0]
    tensor = torch.empty(shape, dtype=dtype, device=groups.device)
    dist.broadcast(tensor, group=groups.pipeline_parallel, group_src=stage)
    return name, tensor


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
