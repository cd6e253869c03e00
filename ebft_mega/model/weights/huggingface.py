"""Weights in Hugging Face's names and shapes, read tensor by tensor into a stage and written back out."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.data.text.tokenizer import copy_tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.durable import flush_to_disk
from ebft_mega.io.output_directory import new_directory
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.model_directory import plan_shards, write_json, write_shards
from ebft_mega.model.weights.weight_files import StoredTensor, stored_tensors
from ebft_mega.model.weights.weight_layout import Box, packing_of
from ebft_mega.parallel.groups import ProcessGroups

SHARD_BYTES = 4 * 2**30
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
READABLE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# Rotary frequencies, which follow from the configuration; old versions of transformers stored them.
_FORMER_BUFFER = ".rotary_emb.inv_freq"


class WeightSource(Protocol):
    """Where a model's weights come from, one tensor at a time."""

    def tensor(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name, on the CPU."""
        ...

    def part(self, name: str, box: Box) -> Tensor:
        """A part of it; no more than that is read where the source can do so."""
        ...


class InitialWeights(WeightSource, Protocol):
    """A source that says what its weights are, wherever they lie."""

    def digest_names(self) -> list[str]:
        """Names of what `digest` hashes: files, or tensors where there are none."""
        ...

    def digest(self, name: str) -> str:
        """The sha256 of one of them, in hexadecimal; it may have to be read."""
        ...


def identity(digests: Mapping[str, str]) -> str:
    """What a model's weights are, in one hash.

    Args:
        digests: of all `InitialWeights.digest_names()`, by name.
    """
    return hashlib.sha256("".join(f"{name}={digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


class SafetensorsWeights:
    """Weights of a Hugging Face directory; each call reads one tensor, or a part of it, from its file."""

    def __init__(self, directory: Path, architecture: Architecture, num_layers: int | None = None):
        """Check that every tensor is there with its shape, in a dtype that can be read, and that nothing else is.

        Args:
            directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
            num_layers: check (and need) only the lowest layers, and no head; None: the whole model.
        Raises:
            InputError: missing, cut off or contradictory files, or else tensors that do not fit, all at once.
        """
        stored, problems = stored_tensors(directory)
        self._shapes = hf_shapes(architecture, num_layers)
        problems = problems or _unfitting(directory, stored, architecture, self._shapes)
        if problems:
            raise InputError(problems)
        self._stored = {name: stored[name] for name in self._shapes}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor as it is stored."""
        return {name: READABLE_DTYPES[stored.dtype] for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self._stored[name].file, "pt") as file:
            return file.get_tensor(name)

    def part(self, name: str, box: Box) -> Tensor:
        """Read a part of one tensor."""
        with safe_open(self._stored[name].file, "pt") as file:
            part: Tensor = file.get_slice(name)[box]
            return part

    def digest_names(self) -> list[str]:
        """The files that hold the tensors."""
        return sorted(self._files)

    def digest(self, name: str) -> str:
        """Hash of a file's contents."""
        with self._files[name].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _files(self) -> dict[str, Path]:
        return {stored.file.name: stored.file for stored in self._stored.values()}


def _unfitting(
    directory: Path, stored: Mapping[str, StoredTensor], architecture: Architecture, needed: Mapping[str, Sequence[int]]
) -> list[Problem]:
    """Tensors that are missing, misshapen, of a dtype that is no weight's, or not part of the model."""
    problems = []
    for name, shape in needed.items():
        if name not in stored:
            problems.append(Problem(str(directory), name, "no such tensor", f"shape {shape}"))
            continue
        where, tensor = str(stored[name].file), stored[name]
        if tensor.shape != shape:
            problems.append(Problem(where, name, f"shape {tensor.shape}", f"shape {shape}"))
        if tensor.dtype not in READABLE_DTYPES:
            problems.append(Problem(where, name, f"dtype {tensor.dtype}", f"one of {', '.join(READABLE_DTYPES)}"))
    known = {*hf_shapes(architecture), "lm_head.weight"}  # some write a tied head all the same
    problems += [
        Problem(str(tensor.file), name, "a tensor", f"none of this name in a {architecture.model_type} model")
        for name, tensor in stored.items()
        if name not in known and not name.endswith(_FORMER_BUFFER)
    ]
    return problems


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

    def digest_names(self) -> list[str]:
        """The tensors."""
        return list(hf_shapes(self.architecture))

    def digest(self, name: str) -> str:
        """Hash of a tensor's float32 values, which are drawn for it."""
        return hashlib.sha256(self.tensor(name).numpy().data).hexdigest()


def hf_shapes(architecture: Architecture, num_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model under its Hugging Face name, in the order in which `hf_tensors` yields them.

    Args:
        num_layers: only the embedding and this many layers (a feature network); None: the whole model.
    """
    a = architecture
    query, key_value = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers if num_layers is None else num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (a.hidden_size,)
        shapes[prefix + "self_attn.o_proj.weight"] = (a.hidden_size, query)
        projections = {"q": query, "k": key_value, "v": key_value}
        shapes |= {f"{prefix}self_attn.{kind}_proj.weight": (rows, a.hidden_size) for kind, rows in projections.items()}
        if a.qkv_bias:
            shapes |= {f"{prefix}self_attn.{kind}_proj.bias": (rows,) for kind, rows in projections.items()}
        if a.qk_norm:
            shapes |= {f"{prefix}self_attn.{kind}_norm.weight": (a.head_dim,) for kind in "qk"}
        shapes[prefix + "post_attention_layernorm.weight"] = (a.hidden_size,)
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
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    generation_config: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = True,
) -> None:
    """Write a Hugging Face model directory, tensor by tensor.

    The files are written under another name beside `directory` and take its place when all of them are on the disk.

    Memory: beside what `tensors` holds by itself, one tensor.

    Args:
        tensors: Hugging Face names with full tensors, in the order of `hf_shapes`; read to the end.
        dtype: of the written weights.
        tokenizer: directory of the tokenizer to put beside the weights.
        generation_config: a `generation_config.json` to put beside them.
        shard_bytes: how many bytes of tensors a file may have.
        overwrite: whether a model that is there already may be replaced.
    Raises:
        InputError: what stands at `directory` may not be replaced: another kind of directory, say.
        ValueError: `tensors` are not those of the architecture.
        OSError: the disk is full or gone. Then, too, what stood at `directory` is unharmed.
    """
    shards = plan_shards(hf_shapes(architecture), dtype, shard_bytes)
    with new_directory(directory, CONFIG_NAME, overwrite) as partial:
        write_shards(partial, shards, tensors)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        if generation_config is not None:
            shutil.copyfile(generation_config, partial / GENERATION_CONFIG_NAME)
        write_json(partial / CONFIG_NAME, architecture.exported_config(str(dtype).removeprefix("torch.")))
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
    flush_to_disk(directory.absolute().parent)
