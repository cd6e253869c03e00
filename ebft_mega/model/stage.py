"""A contiguous run of a model's layers, made of megatron-core modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebft_mega.model.architecture import Architecture
from ebft_mega.model.attention import StridedCoreAttention, StridedLayout
from ebft_mega.model.rotary import inverse_frequencies, rotary_angles
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.megatron import (
    ColumnParallelLinear,
    TransformerConfig,
    TransformerLayer,
    VocabParallelEmbedding,
    get_gpt_layer_local_spec,
)


@dataclass(frozen=True)
class StageShape:
    """Which part of a model a stage holds."""

    num_layers: int
    has_final_norm: bool
    has_head: bool

    @classmethod
    def whole(cls, architecture: Architecture) -> "StageShape":
        """All layers, the final norm and the language-model head."""
        return cls(architecture.num_hidden_layers, has_final_norm=True, has_head=True)

    @classmethod
    def up_to(cls, depth: int, architecture: Architecture) -> "StageShape":
        """The layers below a depth, without a head; depth L includes the final norm, as in Hugging Face."""
        return cls(depth, has_final_norm=depth == architecture.num_hidden_layers, has_head=False)


def transformer_config(architecture: Architecture, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of the architecture: RMSNorm, gated SiLU MLP, no dropout, no fusions."""
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        # Weights always come from `huggingface.load_weights`, from a file or from a seed.
        perform_initialization=False,
        # Allocates on the device in force (meta for a view, the CPU for a frozen copy) instead of on the GPU.
        use_cpu_initialization=True,
        # The default, spelled so that megatron-core does not warn about its own default.
        cuda_graph_scope=[],
    )


class Stage(nn.Module):
    """Embedding, layers, final norm and head, as far as `shape` has them.

    Hidden states are `[S, B, H]` (megatron-core's order) everywhere inside.
    """

    def __init__(
        self,
        architecture: Architecture,
        shape: StageShape,
        groups: ProcessGroups,
        dtype: torch.dtype,
        activation_checkpointing: bool = False,
    ):
        """Build the modules with undefined weights.

        Args:
            architecture, shape: the model and the part of it to hold.
            groups: tensor- and pipeline-parallel groups for the layers.
            dtype: of the parameters.
            activation_checkpointing: keep only layer inputs and recompute layers in the backward pass.
        """
        super().__init__()
        self.architecture, self.shape = architecture, shape
        self.activation_checkpointing = activation_checkpointing
        config = transformer_config(architecture, dtype)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm)
        spec.submodules.self_attention.submodules.core_attention = StridedCoreAttention
        megatron_groups = groups.megatron()
        vocabulary, hidden = architecture.vocab_size, architecture.hidden_size

        def no_initialisation(weight: Tensor) -> None:
            """Leave the weight as allocated; `load_weights` fills it."""

        self.embedding = VocabParallelEmbedding(
            vocabulary, hidden, init_method=no_initialisation, config=config, tp_group=groups.tensor_parallel
        )
        self.layers = nn.ModuleList(
            TransformerLayer(config, spec.submodules, layer_number=index + 1, pg_collection=megatron_groups)
            for index in range(shape.num_layers)
        )
        self.final_norm = (
            nn.RMSNorm(hidden, eps=architecture.rms_norm_eps, dtype=dtype) if shape.has_final_norm else None
        )
        self.head = (
            ColumnParallelLinear(
                hidden,
                vocabulary,
                config=config,
                init_method=no_initialisation,
                bias=False,
                skip_weight_param_allocation=architecture.tie_word_embeddings,
                tp_group=groups.tensor_parallel,
            )
            if shape.has_head
            else None
        )
        # Norms of megatron-core's torch spec are made in float32 whatever `params_dtype` says.
        self.to(dtype)
        # A plain attribute, not a buffer: the engine casts buffers, and angles must stay float32.
        self.rotary_frequencies = inverse_frequencies(architecture).to(groups.device)

    def forward(self, compute: Callable[["Stage"], Any]) -> Any:
        """Run `compute(self)` as this module's forward, so that an engine's hooks surround it.

        `compute` calls `hidden_states` and `logits`; it returns a tensor or a tuple of tensors.
        """
        return compute(self)

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, layout: StridedLayout, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the layers over one pass.

        Args:
            tokens: int64 [B, S]; positions: int64 [S], rotary positions; layout: what may attend to what.
            taps: depths (blocks from the input, 1-based) whose residual stream is returned too.
        Returns:
            Hidden states [S, B, H] after the final norm if there is one, and one [S, B, H] per tap.
        Communication: tensor-parallel all-reduces inside the layers.
        """
        angles = rotary_angles(self.rotary_frequencies, positions)
        hidden = self.embedding(tokens).transpose(0, 1).contiguous()
        after = {}
        for depth, layer in enumerate(self.layers, start=1):
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of selected rows.

        Args:
            hidden: [rows, H] after the final norm.
        Returns:
            [rows, V] in the dtype of the parameters.
        """
        assert self.head is not None, "this stage has no language-model head"
        tied = self.embedding.weight if self.architecture.tie_word_embeddings else None
        logits, _ = self.head(hidden[:, None, :], weight=tied)
        return logits[:, 0, :]
