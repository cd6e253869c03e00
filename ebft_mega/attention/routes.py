"""Choose the attention implementation (`train.attention`: two_part, flex or dense) of a run; their interface."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from ebft_mega.attention.dense import DenseAttention
from ebft_mega.attention.flex import MIN_HEAD_DIM, FlexAttention, flex_is_available
from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.two_part import TwoPartAttention

RouteName = Literal["auto", "two_part", "flex", "dense"]


class AttentionRoute(Protocol):
    """One way to compute the attention of a pass; all give the same values and gradients."""

    def attend(
        self,
        pattern: AttentionPattern,
        document_query: Tensor,
        own_query: Tensor,
        document_key: Tensor,
        document_value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention, scaled by 1 / sqrt(d), of the queries over the keys that the pattern lets them see.

        The softmax is computed in float32 or wider. Inputs may be non-contiguous views. Without gradients
        nothing is saved for a backward pass; with them, no scores are.

        Args:
            pattern: which query sees which key.
            document_query: [B, heads, Nd, d]; own_query: [heads, Nq, d], the asking nodes of all rows, level by level;
                Nd or Nq may be 0.
            document_key, document_value: [B, groups, D, d], groups dividing heads; head h asks group
                h // (heads / groups).
            own_key, own_value: [groups, Nk, d], of the nodes of all levels.
        Returns:
            (documents' outputs [B, heads, Nd, d], nodes' outputs [heads, Nq, d]).
        Communication: none.
        """


def make_route(
    name: RouteName, device: torch.device, *, own_capacity: int, head_dim: int, is_repeatable: bool = False
) -> AttentionRoute:
    """The route of a run.

    `auto` is two_part on a CPU; on CUDA flex, because one kernel call serves every pass, or two_part where Triton
    is missing, heads are too small for it or bits have to repeat; elsewhere dense, the only one that needs nothing but
    torch's public functions. Which of flex and two_part is faster on a GPU has not been measured.

    Args:
        name: `train.attention`.
        device: where the tensors lie.
        own_capacity: most levels of nodes in any pass, G.
        head_dim: values of a head.
        is_repeatable: only kernels of which torch promises the same bits every time.
    Raises:
        ValueError: flex where it has no backward pass, for heads that it does not take or where bits have to repeat, or
            two_part where none of its kernels runs.
    """
    if name == "auto":
        if flex_is_available(device) and head_dim >= MIN_HEAD_DIM and not is_repeatable:
            name = "flex"
        else:
            name = "two_part" if device.type in ("cpu", "cuda") else "dense"
    if name == "flex":
        if is_repeatable:
            raise ValueError("deterministic is true, and torch does not promise the same bits of its compiled kernel")
        if not flex_is_available(device):
            raise ValueError(f"flex attention needs CUDA and Triton: it has no backward pass on {device.type}")
        if head_dim < MIN_HEAD_DIM:
            raise ValueError(f"flex attention takes heads of {MIN_HEAD_DIM} values or more, not of {head_dim}")
        return FlexAttention(own_capacity)
    if name == "two_part":
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"two-part attention has kernels for cpu and cuda, not for {device.type}")
        return TwoPartAttention()
    return DenseAttention()
