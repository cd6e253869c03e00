"""A contiguous run of a model's layers, made of megatron-core modules, and the model it is a part of."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebft_mega.model.architecture import Architecture
from ebft_mega.model.attention import Layout
from ebft_mega.model.layers import RMSNorm, layer_submodules, transformer_config
from ebft_mega.model.partition import StageShape, padded_vocabulary
from ebft_mega.model.rotary import inverse_frequencies, rotary_angles
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.megatron import (
    ColumnParallelLinear,
    TransformerLayer,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    make_gather_buffer,
)
from ebft_mega.parallel.optimizer import StageRunner
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.vocabulary import VocabularyShard


@dataclass(frozen=True)
class HiddenShape:
    """What hidden states look like where they enter and leave a stage."""

    hidden_size: int
    sequence_shards: int  # tensor-parallel ranks that hold parts of the sequence; 1 without sequence parallelism
    dtype: torch.dtype
    device: torch.device

    def padded(self, length: int) -> int:
        """Positions of a pass of `length`, filled up so that all shards are equal."""
        return -(-length // self.sequence_shards) * self.sequence_shards

    def empty(self, length: int, rows: int) -> Tensor:
        """A buffer for this rank's part of a pass of `length` positions: [S, rows, H]."""
        shape = (self.padded(length) // self.sequence_shards, rows, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Stage(nn.Module):
    """Embedding, layers, final norm and head, as far as `shape` has them; one tensor-parallel rank's slices.

    Hidden states are `[S, B, H]` (megatron-core's order) everywhere inside; under sequence parallelism each
    tensor-parallel rank has a run of S / ranks positions between the layers.
    """

    def __init__(
        self,
        architecture: Architecture,
        shape: StageShape,
        groups: ProcessGroups,
        dtype: torch.dtype,
        activation_checkpointing: bool = False,
        sequence_parallel: bool = False,
    ):
        """Build the modules with undefined weights.

        Args:
            architecture, shape: the model and the part of it to hold.
            groups: the tensor-parallel group for the layers.
            dtype: of the parameters.
            activation_checkpointing: keep only layer inputs and recompute layers in the backward pass.
            sequence_parallel: share the positions between layers among the tensor-parallel ranks.
        """
        super().__init__()
        self.architecture, self.shape, self.groups = architecture, shape, groups
        self.activation_checkpointing = activation_checkpointing
        self.sequence_parallel = sequence_parallel
        if sequence_parallel:
            make_gather_buffer()
        shards = groups.tensor_parallel_size if sequence_parallel else 1
        self.hidden = HiddenShape(architecture.hidden_size, shards, dtype, groups.device)
        config = transformer_config(architecture, dtype, groups, sequence_parallel)
        submodules = layer_submodules(architecture)
        vocabulary = padded_vocabulary(architecture.vocab_size, groups.tensor_parallel_size)

        def no_initialisation(weight: Tensor) -> None:
            """Leave the weight as allocated; `load_weights` fills it."""

        self.embedding = (
            VocabParallelEmbedding(
                vocabulary,
                architecture.hidden_size,
                init_method=no_initialisation,
                reduce_scatter_embeddings=sequence_parallel,
                config=config,
                tp_group=groups.tensor_parallel,
            )
            if shape.has_embedding
            else None
        )
        self.layers = nn.ModuleList(
            TransformerLayer(config, submodules, layer_number=index + 1, pg_collection=groups.megatron())
            for index in range(shape.num_layers)
        )
        self.final_norm = (
            RMSNorm(config, architecture.hidden_size, architecture.rms_norm_eps) if shape.has_final_norm else None
        )
        # The head is given selected rows of the whole sequence, not shards of it.
        head_config = copy.copy(config)
        head_config.sequence_parallel = False
        self.head = (
            ColumnParallelLinear(
                architecture.hidden_size,
                vocabulary,
                config=head_config,
                init_method=no_initialisation,
                bias=False,
                skip_weight_param_allocation=self.head_is_embedding,
                tp_group=groups.tensor_parallel,
            )
            if shape.has_head
            else None
        )
        # A plain attribute, not a buffer: the engine casts buffers, and angles must stay float32.
        self.rotary_frequencies = inverse_frequencies(architecture).to(groups.device)

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head uses this very stage's embedding; a tied head on another stage has a copy of it."""
        return self.architecture.tie_word_embeddings and self.shape.has_embedding

    def forward(self, compute: Callable[["Stage"], Any]) -> Any:
        """Run `compute(self)` as this module's forward, so that an engine's hooks surround it.

        `compute` calls `hidden_states` and `logits`; it returns a tensor or a tuple of tensors.
        """
        return compute(self)

    def hidden_states(
        self, entering: Tensor, positions: Tensor, layout: Layout, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run this stage's layers over one pass.

        Args:
            entering: tokens int64 [B, S] where the stage has the embedding, else the hidden states that the stage
                before returned.
            positions: int64 [S], rotary positions; layout: what may attend to what.
            taps: depths (blocks from the model's input, 1-based), all on this stage, whose residual stream is
                returned too.
        Returns:
            Hidden states [S, B, H] after the final norm if there is one, and one [S, B, H] per tap. With
            sequence parallelism [padded S / ranks, B, H], this rank's positions.
        Communication: tensor-parallel collectives inside the layers.
        """
        length = positions.numel()
        filler = self.hidden.padded(length) - length
        angles = rotary_angles(self.rotary_frequencies, F.pad(positions, (0, filler)))
        if self.embedding is None:
            hidden = entering
        elif self.sequence_parallel:
            hidden = self.embedding(F.pad(entering, (0, filler)))
        else:
            hidden = self.embedding(entering).transpose(0, 1).contiguous()
        after = {}
        for depth, layer in enumerate(self.layers, start=self.shape.first_layer + 1):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, _ = checkpoint(layer, hidden, layout, rotary_pos_emb=angles, use_reentrant=False)
            else:
                hidden, _ = layer(hidden, layout, rotary_pos_emb=angles)
            if depth in taps:
                after[depth] = hidden
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
            if self.architecture.num_hidden_layers in after:
                after[self.architecture.num_hidden_layers] = hidden
        return hidden, tuple(after[depth] for depth in taps)

    def whole_sequence(self, hidden: Tensor, length: int) -> Tensor:
        """Hidden states of all positions on every rank.

        Args:
            hidden: as `hidden_states` returned them; length: S, positions without filler.
        Returns:
            [S, B, H].
        Communication: with sequence parallelism one all-gather of S * B * H values; nothing in the backward pass.
        """
        if self.sequence_parallel:
            # Whatever follows is the same on every rank, so each keeps its own positions' gradient.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tensor_parallel
            )
        return hidden[:length]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of selected rows.

        Args:
            hidden: [rows, H] after the final norm, the same on every tensor-parallel rank.
        Returns:
            [rows, width of this rank's slice of the padded vocabulary] in the dtype of the parameters.
        Communication: none; one all-reduce of the rows' gradient in the backward pass.
        """
        assert self.head is not None, "this stage has no language-model head"
        tied = self.embedding.weight if self.embedding is not None and self.head_is_embedding else None
        logits, _ = self.head(hidden[:, None, :], weight=tied)
        return logits[:, 0, :]

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """What each parameter is to the other ranks of the replica, by name."""
        tied = self.architecture.tie_word_embeddings and self.groups.pipeline_size > 1
        many = self.groups.tensor_parallel_size > 1
        roles = {}
        for name, _ in self.named_parameters():
            is_norm = "norm" in name
            # Heads are split among the ranks, so a norm of heads sees only its rank's; under sequence parallelism
            # every norm sees only its rank's positions.
            is_head_norm = "q_layernorm" in name or "k_layernorm" in name
            is_embedding = name in ("embedding.weight", "head.weight")
            roles[name] = ParameterRole(
                sharded=many and not is_norm,
                partial_gradient=many and is_norm and (is_head_norm or self.sequence_parallel),
                tied=tied and is_embedding,
                copy=tied and name == "head.weight",
            )
        return roles


@dataclass(frozen=True)
class PipelinedModel:
    """A model over the ranks of a replica, as one of them sees it."""

    run: StageRunner  # run(compute) is compute(this rank's stage) with whole parameters
    hidden: HiddenShape
    vocabulary: VocabularyShard
    groups: ProcessGroups

    @classmethod
    def of(cls, stage: Stage, run: StageRunner | None = None) -> "PipelinedModel":
        """The model that a stage is part of.

        Args:
            run: runs a function on the stage; None if the stage's parameters are whole anyway.
        """
        vocabulary = VocabularyShard.of(stage.architecture.vocab_size, stage.groups)
        return cls(run or stage, stage.hidden, vocabulary, stage.groups)


def select_positions(hidden: Tensor, positions: Tensor, shards: int, groups: ProcessGroups) -> Tensor:
    """Some positions of a pass, every tensor-parallel rank with its slice of the hidden dimension.

    Args:
        hidden: as `Stage.hidden_states` returned them, [S / shards, B, H]; without gradient.
        positions: int64 [N], of the whole sequence.
        shards: `HiddenShape.sequence_shards`.
    Returns:
        [N, B, H / tensor-parallel ranks].
    Communication: none, or with sequence parallelism one all-to-all, in which N * B * H values are exchanged from
        slices of the sequence to slices of the hidden dimension.
    """
    ranks, rank = groups.tensor_parallel_size, groups.tensor_parallel_rank
    if shards == 1:
        width = hidden.shape[-1] // ranks
        return hidden[..., rank * width : (rank + 1) * width][positions]
    length = hidden.shape[0]
    owner = positions // length
    here = hidden[positions[owner == rank] - rank * length]  # [own N, B, H]
    sent = here.unflatten(-1, (ranks, -1)).movedim(-2, 0).contiguous()  # [ranks, own N, B, H / ranks]
    received = hidden.new_empty((positions.numel(), *sent.shape[2:]))
    counts = torch.bincount(owner, minlength=ranks).tolist()
    dist.all_to_all_single(
        received,
        sent.flatten(0, 1),
        output_split_sizes=counts,
        input_split_sizes=[counts[rank]] * ranks,
        group=groups.tensor_parallel,
    )
    # Received rank by rank; put back into the order of `positions`.
    selected = torch.empty_like(received)
    selected[owner.argsort(stable=True)] = received
    return selected
