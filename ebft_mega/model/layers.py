"""megatron-core transformer layers with our norm, activation and attention, and fewer key-value heads than ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.model.strided_attention import StridedCoreAttention
from ebft_mega.parallel.collectives import all_gather_single, reduce_scatter_single
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.megatron import (
    SelfAttention,
    TransformerConfig,
    TransformerLayerSubmodules,
    get_gpt_layer_local_spec,
)


def transformer_config(
    architecture: Architecture, dtype: torch.dtype, groups: ProcessGroups, sequence_parallel: bool
) -> TransformerConfig:
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
        # Not only Transformer Engine's: an activation module that the layer's specification names.
        use_te_activation_func=True,
        # Its embedding has another backward pass then.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        # Not the pipeline's: layers would number themselves by it, and a stage knows which layers it holds.
        tensor_model_parallel_size=groups.tensor_parallel_size,
        sequence_parallel=sequence_parallel,
        # Weights always come from `huggingface.load_weights`, from a file or from a seed.
        perform_initialization=False,
        # Allocates on the device in force (meta for a view, the CPU for a frozen copy) instead of on the GPU.
        use_cpu_initialization=True,
        # The default, spelled so that megatron-core does not warn about its own default.
        cuda_graph_scope=[],
    )


def layer_submodules(architecture: Architecture) -> TransformerLayerSubmodules:
    """megatron-core's layer in plain torch, with our norms and attention."""
    submodules = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm).submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention
    attention.module = SharedHeadsSelfAttention
    attention.submodules.core_attention = StridedCoreAttention
    submodules.mlp.submodules.activation_func = GatedSilu
    if architecture.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return submodules


class RMSNorm(nn.RMSNorm):
    """torch's norm with the arguments that a layer gives; megatron-core's own wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        """A norm over the last dimension, in the dtype of the other parameters."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class GatedSilu(nn.Module):
    """The MLP's activation, which keeps for its backward pass only what the projection before it returned.

    megatron-core's own keeps the activated gate and a copy of `up` besides; its fused one compiles itself at run time.
    """

    def __init__(self, config: TransformerConfig):
        """Without parameters."""
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 * I], the gate's values first -> silu(gate) * up, [..., I]."""
        activated: Tensor = _GatedSilu.apply(gate_and_up)
        return activated


class _GatedSilu(torch.autograd.Function):
    """Recompute the activated gate in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        towards_gate, towards_up = result.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradient, out=towards_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=towards_gate)
        return result


class SharedHeadsSelfAttention(SelfAttention):
    """Self-attention that also works with fewer key-value heads than tensor-parallel ranks.

    Then each rank projects its own query heads and an equal part of a key-value head, and the parts are gathered:
    every weight is on exactly one rank. megatron-core would gather the queries of all ranks too, and needs its global
    state for it.
    """

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values of this rank's heads.

        Args:
            hidden_states: [S, B, H].
        Returns:
            Query [S, B, heads of this rank, d]; key and value [S, B, key-value heads of this rank (at least 1), d].
        Communication: with fewer key-value heads than ranks, one all-gather of keys and values (2 * key-value heads
            * d per position) over the tensor-parallel group, and one reduce-scatter in the backward pass.
        """
        group, ranks = self.pg_collection.tp, dist.get_world_size(self.pg_collection.tp)
        heads = self.config.num_query_groups
        if heads >= ranks:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **options)
        mixed, _ = self.linear_qkv(hidden_states)
        dim = self.hidden_size_per_attention_head
        own_queries = self.config.num_attention_heads // ranks * dim
        query, key_value = mixed.split((own_queries, mixed.shape[-1] - own_queries), dim=-1)
        parts = _GatherParts.apply(key_value, group)  # [ranks, S, B, 2 * part]
        # Consecutive ranks share a head; each holds a part of its key and the same part of its value.
        sharers = ranks // heads
        first = dist.get_rank(group) // sharers * sharers
        shared = parts[first : first + sharers].unflatten(-1, (2, dim // sharers))
        key, value = shared.permute(3, 1, 2, 0, 4).flatten(3)  # [S, B, d] each
        query = query.unflatten(-1, (-1, dim))
        key, value = key[:, :, None], value[:, :, None]
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value


class _GatherParts(torch.autograd.Function):
    """All ranks' parts, [ranks, ...]; the gradient of a part is the sum over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        gathered = part.new_empty(ranks * part.shape[0], *part.shape[1:])
        all_gather_single(gathered, part.contiguous(), group)
        return gathered.unflatten(0, (ranks, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        own = torch.empty_like(gradient[0])
        reduce_scatter_single(own, gradient.flatten(0, 1).contiguous(), ctx.group)
        return own, None
