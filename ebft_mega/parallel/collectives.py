"""All-gather and reduce-scatter of one tensor per rank, under the name that the installed torch has for them.

torch 2.13 has renamed them; earlier releases know only the older names, which 2.13 warns about at every call.
"""

import torch.distributed as dist
from torch import Tensor


def all_gather_single(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Concatenate the tensors of all ranks along the first dimension.

    Args:
        gathered: written; [ranks * n, ...] for `own` [n, ...], or any shape of as many elements.
        own: contiguous, of the same shape on all ranks.
    Communication: one all-gather.
    """
    collective = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    collective(gathered, own, group=group)


def reduce_scatter_single(own: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
    """Add up the tensors of all ranks, and keep this rank's slice of the sum along the first dimension.

    Args:
        own: written; [n, ...] for `values` [ranks * n, ...].
        values: contiguous, of the same shape on all ranks.
    Communication: one reduce-scatter.
    """
    collective = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    collective(own, values, group=group)
