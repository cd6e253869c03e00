"""Attention of rollout queries over a prefix of the document, by torch's flash kernels; one adapter per device.

What all adapters share: queries [B, heads, rows, d] and keys [B, groups, keys, d] with groups dividing heads; outputs
with one log-normaliser per query (float32 or wider), and a backward that takes the *merged* output and log-normaliser
of a softmax of which this prefix is a part (`ebft_mega.attention.softmax_merge`).
"""

from typing import Protocol

import torch
from torch import Tensor

from ebft_mega.attention.softmax_merge import merge, small_backward, small_forward

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_flash = torch.ops.aten._scaled_dot_product_flash_attention
_cuda_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


class PrefixKernel(Protocol):
    """Attention over a prefix whose last few keys, the ragged edge, some of the queries may not see."""

    edge: int  # most keys that a call's ragged edge should have

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over all keys but those hidden.

        Args:
            query: [B, heads, rows, d], rows > 0; key, value: [B, groups, keys, d].
            hidden: bool [rows, width], true where a query must not see one of the last `width` keys; every query
                sees all keys before those, at least one.
        Returns:
            (average [B, heads, rows, d], log-normaliser [B, heads, rows]).
        """

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, from the merged output and log-normaliser."""

    def causal_forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attend causally: as many keys as queries, query i sees keys 0..i."""

    def causal_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value of causal attention."""


class CpuKernel:
    """Torch's CPU flash kernel; the ragged edge as an additive mask.

    It reads the keys of a group for all its heads as they are, and it takes float64. A longer edge saves kernel calls,
    a shorter one hidden pairs.
    """

    edge = 64

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `PrefixKernel`."""
        out, lse = _cpu_flash(query, key, value, 0.0, False, attn_mask=_additive(hidden, query, key))
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PrefixKernel`."""
        mask = _additive(hidden, query, key)
        grads = _cpu_flash_backward(grad, query, key, value, out, lse, 0.0, False, attn_mask=mask)
        return grads[0], grads[1], grads[2]

    def causal_forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `PrefixKernel`."""
        out, lse = _cpu_flash(query, key, value, 0.0, True)
        return out, lse

    def causal_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PrefixKernel`."""
        grads = _cpu_flash_backward(grad, query, key, value, out, lse, 0.0, True)
        return grads[0], grads[1], grads[2]


def _additive(hidden: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """The hidden edge as what is added to all scores, [rows, keys]; None where nothing is hidden."""
    rows, width = hidden.shape
    if not width:
        return None
    mask = query.new_zeros(rows, key.shape[2])
    mask[:, -width:].masked_fill_(hidden, -torch.inf)
    return mask


class Flash(Protocol):
    """A pair of attention functions without a mask: causal (as many keys as queries) or every query sees all keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Output [B, heads, rows, d] and log-normaliser [B, heads, rows]."""

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""


class SplitKernel:
    """A kernel without masks for the keys that all queries see, written-out scores for the ragged edge.

    The heads of a group are folded into the queries, so that keys are read once for all of them.
    """

    edge = 128

    def __init__(self, flash: Flash):
        self.flash = flash

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `PrefixKernel`."""
        heads, rows = query.shape[1:3]
        groups, common = key.shape[1], key.shape[2] - hidden.shape[1]
        query = _fold(query, groups)
        out, lse = self.flash.forward(query, key[:, :, :common], value[:, :, :common], False)
        if hidden.shape[1]:
            edge = small_forward(query, key[:, :, common:], value[:, :, common:], hidden.repeat(heads // groups, 1))
            merged, lse = merge(out, lse, *edge)
            out = merged.to(query.dtype)
        return out.reshape(-1, heads, rows, out.shape[-1]), lse.reshape(-1, heads, rows)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PrefixKernel`."""
        heads, rows = query.shape[1:3]
        groups, common = key.shape[1], key.shape[2] - hidden.shape[1]
        grad, query, out = (_fold(tensor, groups) for tensor in (grad, query, out))
        lse = lse.reshape(lse.shape[0], groups, -1)
        grads = self.flash.backward(grad, query, key[:, :, :common], value[:, :, :common], out, lse, False)
        grad_query, grad_key, grad_value = grads
        if hidden.shape[1]:
            edge_key, edge_value = key[:, :, common:], value[:, :, common:]
            edge = small_backward(grad, query, edge_key, edge_value, out, lse, hidden.repeat(heads // groups, 1))
            grad_query = grad_query + edge[0]
            grad_key, grad_value = (torch.cat((grads[i].to(edge[i].dtype), edge[i]), dim=2) for i in (1, 2))
        return grad_query.reshape(-1, heads, rows, grad_query.shape[-1]), grad_key, grad_value

    def causal_forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `PrefixKernel`."""
        return self.flash.forward(query, key, value, True)

    def causal_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PrefixKernel`."""
        return self.flash.backward(grad, query, key, value, out, lse, True)


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """[B, heads, rows, d] -> [B, groups, heads / groups * rows, d]."""
    return tensor.reshape(tensor.shape[0], groups, -1, tensor.shape[-1])


class CudaFlash:
    """Torch's CUDA flash kernel: float16 or bfloat16, head sizes that are multiples of 8 up to 256.

    Not yet run: written for a machine with a GPU from the operators' schemas and their shape functions.
    """

    @staticmethod
    def takes(dtype: torch.dtype, head_dim: int) -> bool:
        """Whether the kernel computes attention of this dtype and head size."""
        return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        out, lse, *_ = _cuda_flash(query, key, value, 0.0, causal)
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Flash`."""
        no_dropout = (
            torch.zeros(2, dtype=torch.uint64, device=query.device),
            torch.zeros((), dtype=torch.uint64, device=query.device),
        )
        lengths = None, None, query.shape[2], key.shape[2]  # no packed sequences
        grads = _cuda_flash_backward(
            grad.contiguous(), query, key, value, out, lse.contiguous(), *lengths, 0.0, causal, *no_dropout
        )
        return grads[0], grads[1], grads[2]


class WrittenOut:
    """All scores written out, for what no kernel takes: float32 on a GPU, odd head sizes."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        folded = query.unflatten(1, (key.shape[1], -1))
        out, lse = small_forward(folded, key[:, :, None], value[:, :, None], _future(query, causal))
        return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Flash`."""
        per_group = (key.shape[1], -1)
        grad, folded, out, lse = (tensor.unflatten(1, per_group) for tensor in (grad, query, out, lse))
        keys_values = key[:, :, None], value[:, :, None]
        grads = small_backward(grad, folded, *keys_values, out, lse, _future(query, causal))
        return grads[0].flatten(1, 2), grads[1].sum(2), grads[2].sum(2)


def _future(query: Tensor, causal: bool) -> Tensor | None:
    rows = query.shape[2]
    return torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1) if causal else None


class CudaKernel(SplitKernel):
    """Flash where it takes the tensors, written-out scores where it does not."""

    def __init__(self, dtype: torch.dtype, head_dim: int):
        super().__init__(CudaFlash() if CudaFlash.takes(dtype, head_dim) else WrittenOut())


def prefix_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> PrefixKernel:
    """The kernel of a device for tensors of this dtype and head size."""
    return CpuKernel() if device.type == "cpu" else CudaKernel(dtype, head_dim)
