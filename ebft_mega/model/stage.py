"""A pipeline stage: consecutive layers of a model as megatron-core modules; the first embeds, the last has the head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.attention.two_part import TwoPartAttention
from ebft_mega.model.head import ScoredTokens, VocabularyHead
from ebft_mega.model.hidden import HiddenShape, select_positions
from ebft_mega.model.layers import RMSNorm, layer_submodules, transformer_config
from ebft_mega.model.rotary import inverse_frequencies, rotary_angles
from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.strided_attention import Layout, ReadRows, StridedLayout
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.megatron import (
    TransformerConfig,
    TransformerLayer,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    make_gather_buffer,
)
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.stage_module import StageRunner, runner
from ebft_mega.parallel.vocabulary import VocabularySlice


class Stage(nn.Module):
    """Embedding, layers, final norm and head, as far as `shape` has them; one tensor-parallel rank's slices.

    Hidden states are `[S, 1, H]` everywhere inside: the rows of a micro-batch share one sequence of S positions
    (megatron-core's order is sequence, batch, hidden). Under sequence parallelism each
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
        attention: AttentionRoute | None = None,
    ):
        """Build the modules with undefined weights.

        Args:
            architecture, shape: the model and the part of it to hold.
            groups: the tensor-parallel group for the layers.
            dtype: of the parameters.
            activation_checkpointing: keep only layer inputs and recompute layers in the backward pass.
            sequence_parallel: share the positions between layers among the tensor-parallel ranks.
            attention: how passes over rollouts attend; None: the two-part route, which works everywhere.
        """
        super().__init__()
        self.attention = attention or TwoPartAttention()
        self.architecture, self.shape, self.groups = architecture, shape, groups
        self.activation_checkpointing = activation_checkpointing
        self.sequence_parallel = sequence_parallel
        if sequence_parallel:
            make_gather_buffer()
        shards = groups.tensor_parallel_size if sequence_parallel else 1
        self.hidden = HiddenShape(architecture.hidden_size, shards, dtype, groups.device)
        config = transformer_config(architecture, dtype, groups, sequence_parallel)
        submodules = layer_submodules(architecture)
        self.embedding = self._build_embedding(config) if shape.has_embedding else None
        self.layers = nn.ModuleList(
            TransformerLayer(config, submodules, layer_number=index + 1, pg_collection=groups.megatron())
            for index in range(shape.num_layers)
        )
        self.final_norm = (
            RMSNorm(config, architecture.hidden_size, architecture.rms_norm_eps) if shape.has_final_norm else None
        )
        self.head = self._build_head(dtype) if shape.has_head else None
        # A plain attribute, not a buffer: the engine casts buffers, and angles must stay float32.
        self.rotary_frequencies = inverse_frequencies(architecture).to(groups.device)

    def _build_embedding(self, config: TransformerConfig) -> VocabParallelEmbedding:
        """This tensor-parallel rank's rows of the padded vocabulary."""
        return VocabParallelEmbedding(
            padded_vocabulary(self.architecture.vocab_size, self.groups.tensor_parallel_size),
            self.architecture.hidden_size,
            init_method=_no_initialisation,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=config,
            tp_group=self.groups.tensor_parallel,
        )

    def _build_head(self, dtype: torch.dtype) -> VocabularyHead:
        """This tensor-parallel rank's rows of the output matrix, or none where they are the embedding's."""
        own_slice = VocabularySlice.of(self.architecture.vocab_size, self.groups)
        return VocabularyHead(own_slice, self.architecture.hidden_size, dtype, is_embedding=self.head_is_embedding)

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head uses this very stage's embedding; a tied head on another stage has a copy of it."""
        return self.architecture.tie_word_embeddings and self.shape.has_embedding

    def forward(self, compute: Callable[["Stage"], Any]) -> Any:
        """Run `compute(self)` as this module's forward, so that an engine's hooks surround it.

        `compute` calls the stage's other methods; it returns a tensor or a tuple of tensors.
        """
        return compute(self)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states that enter the first layer.

        Args:
            tokens: int64 [1, S].
        Returns:
            [S, 1, H]; with sequence parallelism [padded S / ranks, 1, H], this rank's positions.
        Communication: over the tensor-parallel group one all-reduce (a reduce-scatter under sequence parallelism) of
            S * H values.
        """
        assert self.embedding is not None, "only the first stage embeds"
        filler = self.hidden.padded(tokens.shape[1]) - tokens.shape[1]
        if self.sequence_parallel:
            return self.embedding(F.pad(tokens, (0, filler)))
        hidden: Tensor = self.embedding(tokens).transpose(0, 1).contiguous()
        # One row is contiguous with any stride between rows. With an odd one `matmul` multiplies position by position,
        # each with its own copy of a frozen weight.
        return hidden.flatten(0, 1).view(hidden.shape)

    def hidden_states(
        self, entering: Tensor, positions: Tensor, layout: Layout, saved: SavedInputs | None = None
    ) -> Tensor:
        """Run this stage's layers over one pass.

        Args:
            entering: tokens int64 [1, S] where the stage has the embedding, else the hidden states that the stage
                before returned.
            positions: int64 [S], rotary positions; layout: what may attend to what.
            saved: where to put the inputs of the layers.
        Returns:
            [S, 1, H] before the final norm. With sequence parallelism [padded S / ranks, 1, H], this rank's positions.
        Communication: tensor-parallel collectives inside the layers.
        """
        angles = self.angles(positions)
        hidden = entering if self.embedding is None else self.embed(entering)
        for index, layer in enumerate(self.layers):
            if saved is not None:
                saved.add(index, hidden)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, _ = checkpoint(layer, hidden, layout, rotary_pos_emb=angles, use_reentrant=False)
            else:
                hidden, _ = layer(hidden, layout, rotary_pos_emb=angles)
        if saved is not None and self.shape.has_head:
            saved.add(len(self.layers), hidden)
        return hidden

    def tapped_rows(
        self, entering: Tensor, positions: Tensor, layout: StridedLayout, read: ReadRows, taps: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run this stage's layers over one pass of which only some rows of some layers are read.

        In a last layer that is tapped only those rows go through what follows the attention.

        Args:
            entering, positions, layout: as for `hidden_states`.
            taps: depths (blocks from the model's input, 1-based) whose residual stream is read; that of the model's
                last layer after the final norm. Nothing after the deepest one is computed, so it is the last layer of
                its stage.
        Returns:
            Hidden states for the next stage, and for each tap on this stage the N rows of `read` with this
            tensor-parallel rank's slice of the hidden dimension, [N, 1, H / ranks].
        Communication: that of the layers, of `layer_of_read_rows` and of `select_positions`.
        """
        read = replace(read, filler=self.hidden.padded(len(read.positions)) - len(read.positions))
        angles = self.angles(positions)
        hidden = entering if self.embedding is None else self.embed(entering)
        rows = []
        for depth, layer in enumerate(self.layers, start=self.shape.first_layer + 1):
            where = read.positions
            if depth == taps[-1]:
                hidden = self.layer_of_read_rows(layer, hidden, angles, layout.reading(read))
                where = torch.arange(len(where), device=where.device)
            else:
                hidden, _ = layer(hidden, layout, rotary_pos_emb=angles)
            if depth in taps:
                # A stage of a feature network has the final norm only if the model's last layer is tapped.
                is_last = depth == self.architecture.num_hidden_layers
                tapped = self.final_norm(hidden) if is_last and self.final_norm is not None else hidden
                selected = select_positions(tapped, where, self.hidden.sequence_shards, self.groups)
                rows += [selected] * taps.count(depth)  # a depth that two fractions name counts twice
        return hidden, rows

    def angles(self, positions: Tensor, pass_lengths: Sequence[int] | None = None) -> Tensor:
        """Rotary angles of a pass, in the order in which layers see it.

        Args:
            positions: int64 [S]; pass_lengths: as in `HiddenShape.order`, None for a single pass.
        Returns:
            float32 [S and filler, 1, 1, head_dim].
        """
        in_sequence = self.hidden.in_sequence(positions, pass_lengths or (len(positions),))
        return rotary_angles(self.rotary_frequencies, in_sequence)

    def layer_of_read_rows(
        self, layer: TransformerLayer, hidden: Tensor, angles: Tensor, layout: StridedLayout
    ) -> Tensor:
        """A layer of which only some rows are read: only they go through what follows its attention.

        Args:
            hidden: [S, 1, H] (with sequence parallelism this rank's positions); layout: of all, with `read`.
        Returns:
            [N, 1, H], the rows that are read (this rank's of them and of the filler).
        Communication: that of the layer; with sequence parallelism one more all-gather of S * H values.
        """
        assert layout.read is not None, "a layer that is read whole is called as it is"
        attended, _ = layer.self_attention(layer.input_layernorm(hidden), attention_mask=layout, rotary_pos_emb=angles)
        rows = self.whole_sequence(hidden, layout.num_positions)[layout.read.positions]
        if self.sequence_parallel:
            rows = F.pad(rows, (0, 0, 0, 0, 0, layout.read.filler))
            rows = rows.chunk(self.groups.tensor_parallel_size)[self.groups.tensor_parallel_rank]
        hidden = rows + attended
        return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]

    def whole_sequence(self, hidden: Tensor, length: int, order: Tensor | None = None) -> Tensor:
        """Hidden states of all positions on every rank.

        Args:
            hidden: as `hidden_states` returned them; length: S, positions without filler; order: as in
                `StridedLayout`.
        Returns:
            [S, 1, H].
        Communication: with sequence parallelism one all-gather of S * H values; nothing in the backward pass.
        """
        if self.sequence_parallel:
            # Whatever follows is the same on every rank, so each keeps its own positions' gradient.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tensor_parallel
            )
        return hidden[:length] if order is None else hidden[order]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of selected rows, without gradient.

        Args:
            hidden: [rows, H] before the final norm, the same on every tensor-parallel rank.
        Returns:
            [rows, width of this rank's slice of the padded vocabulary] in the dtype of the parameters.
        Communication: none.
        """
        return self._through_head(hidden.detach(), None)

    def logprobs(self, hidden: Tensor, scored: ScoredTokens) -> Tensor:
        """Log-probabilities of tokens chosen from selected rows, with gradient; see `VocabularyHead.forward`.

        Args:
            hidden: [N, H] before the final norm, the same on every tensor-parallel rank.
        Returns:
            float32 [N, m], the same on every tensor-parallel rank.
        """
        return self._through_head(hidden, scored)

    def _through_head(self, hidden: Tensor, scored: ScoredTokens | None) -> Tensor:
        assert self.head is not None and self.final_norm is not None, "this stage has no language-model head"
        tied = self.embedding.weight if self.embedding is not None and self.head_is_embedding else None
        logits: Tensor = self.head(self.final_norm(hidden), tied, scored)
        return logits

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """How each parameter, by name, is distributed over the ranks of the replica."""
        tied = self.architecture.tie_word_embeddings and self.groups.pipeline_size > 1
        many = self.groups.tensor_parallel_size > 1
        roles = {}
        for name, _ in self.named_parameters():
            is_norm = "norm" in name
            # Heads are split among the ranks, so a norm of heads sees only its rank's; under sequence parallelism
            # the other norms of layers see only their rank's positions. The final norm sees all rows that are read.
            is_head_norm = "q_layernorm" in name or "k_layernorm" in name
            sees_part = is_head_norm or (self.sequence_parallel and name != "final_norm.weight")
            is_embedding = name in ("embedding.weight", "head.weight")
            roles[name] = ParameterRole(
                sharded=many and not is_norm,
                partial_gradient=many and is_norm and sees_part,
                tied=tied and is_embedding,
                copy=tied and name == "head.weight",
            )
        return roles


def _no_initialisation(weight: Tensor) -> None:
    """Leave the weight as allocated; `load_weights` fills it."""


@dataclass(frozen=True)
class PipelinedModel:
    """A model over the ranks of a replica, as one of them sees it."""

    run: StageRunner  # run(compute) is compute(this rank's stage) with whole parameters
    hidden: HiddenShape
    vocabulary: VocabularySlice
    groups: ProcessGroups

    @classmethod
    def of(cls, stage: Stage, run: StageRunner | None = None) -> "PipelinedModel":
        """The model that a stage is part of.

        Args:
            run: runs a function on the stage; None: the parameters are not partitioned, and no gradients are recorded.
        """
        vocabulary = VocabularySlice.of(stage.architecture.vocab_size, stage.groups)
        return cls(run or runner(stage), stage.hidden, vocabulary, stage.groups)
