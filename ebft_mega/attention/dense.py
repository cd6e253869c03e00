"""Attention through scaled_dot_product_attention with an explicit mask: slow, but runs on every device."""

import logging
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.attention.pattern import AttentionPattern

logger = logging.getLogger(__name__)


class DenseAttention:
    """The dense route: one masked attention over all positions; warns of the cost once per pattern."""

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
        """Attend within one pass; see `ebft_mega.attention.routes.AttentionRoute`."""
        query = torch.cat((document_query, own_query.flatten(2, 3)), dim=2)
        key = torch.cat((document_key, own_key.flatten(2, 3)), dim=2)
        value = torch.cat((document_value, own_value.flatten(2, 3)), dim=2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=_mask(pattern, query.device), enable_gqa=True)
        document_out, own_out = out.split((document_query.shape[2], query.shape[2] - document_query.shape[2]), dim=2)
        return document_out, own_out.unflatten(2, own_query.shape[2:4])


@lru_cache(maxsize=2)  # few: a pass's layers follow each other with one pattern, and a mask may be large
def _mask(pattern: AttentionPattern, device: torch.device) -> Tensor:
    # Where documents start changes with every batch, how many rows have a mask of their own does not.
    _warn_of_cost(replace(pattern, document_starts=None), len(pattern.document_starts or (None,)))
    return pattern.mask(device)


@lru_cache(maxsize=256)
def _warn_of_cost(pattern: AttentionPattern, num_masks: int) -> None:
    """Once per pattern: a warning that names what the mask costs."""
    logger.warning(
        "dense attention: %d query-key pairs per row and head where %d are needed (%.1f times), "
        "and a mask of %d bytes; train.attention: two_part or flex compute little more than the needed ones",
        pattern.dense_pairs,
        pattern.num_pairs,
        pattern.dense_pairs / max(pattern.num_pairs, 1),
        pattern.dense_pairs * num_masks,
    )
