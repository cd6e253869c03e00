"""Attention through scaled_dot_product_attention with an explicit mask: slow, but runs on every device."""

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.attention.pattern import AttentionPattern

logger = logging.getLogger(__name__)


class DenseAttention:
    """The dense route: one masked attention over all positions of a row; warns of the cost once per kind of pass."""

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
        documents, nodes, places = [], [], []
        for row, parts in enumerate(_row_parts(pattern, own_query.device)):
            query = torch.cat((document_query[row], own_query.index_select(1, parts.asking)), dim=1)
            key = torch.cat((document_key[row], own_key.index_select(1, parts.nodes)), dim=1)
            value = torch.cat((document_value[row], own_value.index_select(1, parts.nodes)), dim=1)
            out = F.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=parts.mask, enable_gqa=True
            )[0]
            documents.append(out[:, : document_query.shape[2]])
            nodes.append(out[:, document_query.shape[2] :])
            places.append(parts.asking)
        return torch.stack(documents), torch.cat(nodes, dim=1).index_select(1, torch.cat(places).argsort())


@dataclass(frozen=True)
class _RowParts:
    """What of a pass is one row's."""

    nodes: Tensor  # int64, among those of all levels
    asking: Tensor  # int64, among those that ask
    mask: Tensor  # as of `AttentionPattern.mask`


@lru_cache(maxsize=2)  # few: a pass's layers follow each other with one pattern, and a mask may be large
def _row_parts(pattern: AttentionPattern, device: torch.device) -> tuple[_RowParts, ...]:
    _warn_of_cost(pattern)
    return tuple(
        _RowParts(pattern.nodes_of(row).to(device), pattern.nodes_of(row, asking=True).to(device), mask)
        for row, mask in ((row, pattern.mask(row, device)) for row in range(pattern.num_rows))
    )


_warned: set[tuple[int, int, int]] = set()


def _warn_of_cost(pattern: AttentionPattern) -> None:
    """Once per kind of pass, whatever its rollouts: a warning that names what the mask costs."""
    kind = len(pattern.document_queries), len(pattern.levels), pattern.asking
    if kind in _warned:
        return
    _warned.add(kind)
    logger.warning(
        "dense attention: %d query-key pairs per head where %d are needed (%.1f times), and masks of %d bytes; "
        "train.attention: two_part or flex compute little more than the needed ones",
        pattern.dense_pairs,
        pattern.num_pairs,
        pattern.dense_pairs / max(pattern.num_pairs, 1),
        pattern.dense_pairs,
    )
