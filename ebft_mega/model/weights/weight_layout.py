"""The mapping between a model's Hugging Face tensors and one tensor-parallel rank's parameters.

A parameter is packed from the same box (a range of rows or of columns) of one or more Hugging Face tensors:
megatron-core keeps query, key and value rows together per key-value group, and the MLP's gate above its up projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary

Box = tuple[slice, ...]  # a range in each of a tensor's dimensions; start and stop are given
Parts = tuple[Tensor, ...]  # a box of each source


@dataclass(frozen=True)
class Packing:
    """How one parameter of a stage is made of Hugging Face tensors."""

    sources: tuple[str, ...]  # their names
    dim: int | None  # of the sources, which is shared out over the tensor-parallel ranks; None: whole on each of them
    ranks: int  # tensor-parallel size
    join: Callable[[Parts], Tensor] = lambda parts: parts[0]
    split: Callable[[Tensor], Parts] = lambda parameter: (parameter,)
    vocab_size: int | None = None  # rows of the source, where parameters have zero rows that fill them up

    def box(self, shape: Sequence[int], rank: int) -> Box:
        """The part of a source that goes into a rank's parameter; it may be empty.

        Args:
            shape: of the whole source.
        """
        box = [slice(0, size) for size in shape]
        if self.dim is not None:
            size = shape[self.dim]
            width = (size if self.vocab_size is None else padded_vocabulary(self.vocab_size, self.ranks)) // self.ranks
            box[self.dim] = slice(min(rank * width, size), min((rank + 1) * width, size))
        return tuple(box)

    def pack(self, parts: Parts) -> Tensor:
        """A rank's parameter from its box of each source."""
        if self.vocab_size is None:
            return self.join(parts)
        width = padded_vocabulary(self.vocab_size, self.ranks) // self.ranks
        return F.pad(parts[0], (0, 0, 0, width - len(parts[0])))

    def unpack(self, parameter: Tensor, rank: int) -> Parts:
        """A rank's box of each source from its parameter; views where possible."""
        if self.vocab_size is None:
            return self.split(parameter)
        rows = self.box((self.vocab_size, *parameter.shape[1:]), rank)[0]
        return (parameter[: rows.stop - rows.start],)

    def whole(self, parameters: Sequence[Tensor]) -> Parts:
        """The sources, from the parameters of all ranks in their order."""
        unpacked = [self.unpack(parameter, rank) for rank, parameter in enumerate(parameters)]
        if self.dim is None:
            return unpacked[0]
        return tuple(torch.cat(shares, dim=self.dim) for shares in zip(*unpacked, strict=True))


def packing_of(parameter: str, architecture: Architecture, first_layer: int, ranks: int) -> Packing:
    """The packing of a stage's parameter.

    Args:
        parameter: name in `Stage.named_parameters()`.
        first_layer: index in the model of the stage's first layer.
        ranks: tensor-parallel size.
    """
    if parameter in ("embedding.weight", "head.weight"):
        is_head = parameter == "head.weight" and not architecture.tie_word_embeddings
        source = "lm_head.weight" if is_head else "model.embed_tokens.weight"
        return Packing((source,), 0, ranks, vocab_size=architecture.vocab_size)
    if parameter == "final_norm.weight":
        return Packing(("model.norm.weight",), None, ranks)
    _, layer, rest = parameter.split(".", 2)
    prefix = f"model.layers.{first_layer + int(layer)}."
    norms = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }
    if rest in norms:
        return Packing((prefix + norms[rest],), None, ranks)
    if rest == "self_attention.linear_proj.weight":
        return Packing((prefix + "self_attn.o_proj.weight",), 1, ranks)
    if rest == "mlp.linear_fc2.weight":
        return Packing((prefix + "mlp.down_proj.weight",), 1, ranks)
    if rest == "mlp.linear_fc1.weight":
        rows = architecture.intermediate_size // ranks
        return _stacked((prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"), (rows, rows), ranks)
    kind = rest.removeprefix("self_attention.linear_qkv.")
    sources = tuple(f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv")
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = architecture.num_key_value_heads * architecture.head_dim
    groups = architecture.num_key_value_heads
    if groups < ranks:
        # Query heads, then this rank's part of a key head and of its value head (`layers.SharedHeadsSelfAttention`).
        return _stacked(sources, (query // ranks, key_value // ranks, key_value // ranks), ranks)
    return _grouped(sources, (query // groups, key_value // groups, key_value // groups), groups // ranks, ranks)


def _stacked(sources: tuple[str, ...], rows: tuple[int, ...], ranks: int) -> Packing:
    """Boxes one below the other; a rank has `rows` of each source."""
    return Packing(sources, 0, ranks, torch.cat, lambda parameter: parameter.split(rows))


def _grouped(sources: tuple[str, ...], rows_per_group: tuple[int, ...], groups: int, ranks: int) -> Packing:
    """Query, key and value rows kept together per key-value group, of which a rank has `groups` (megatron-core)."""

    def join(parts: Parts) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(parameter: Tensor) -> Parts:
        parts = parameter.unflatten(0, (groups, -1)).split(rows_per_group, dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    return Packing(sources, 0, ranks, join, split)
