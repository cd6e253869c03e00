"""Convert rollouts between `[B, n, K, G]` and their order in a packed pass; positions of tokens in that pass.

A pass is the document, then token 0 of every rollout, then token 1 of every rollout, and so on; that is the order in
which decoding generates them, so the concatenated passes of a decode are the packed pass. Among themselves the
rollouts of a row are block-major (block, then sample). The legend of shapes is in `ebft_mega/types.py`.
"""

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.types import RowDocuments, TokenBatch


def to_sequence(rollouts: Tensor) -> Tensor:
    """Flatten rollouts into a pass's sequence.

    Args:
        rollouts: [B, n, K, T].
    Returns:
        [B, T * K * n], token-major.
    """
    return rollouts.permute(0, 3, 2, 1).flatten(1)


def from_sequence(values: Tensor, plan: BlockPlan) -> Tensor:
    """The inverse of `to_sequence`.

    Args:
        values: [B, T * K * n].
    Returns:
        [B, n, K, T].
    """
    return values.unflatten(1, (-1, plan.num_blocks, plan.num_samples)).permute(0, 3, 2, 1)


def anchor_positions(plan: BlockPlan, device: torch.device) -> Tensor:
    """The plan's anchors, int64 [K], made where they are used: a copy from the host would wait for the device."""
    return torch.arange(plan.num_blocks, device=device) * plan.stride + plan.context_length


def counted_blocks(rows: TokenBatch, plan: BlockPlan) -> Tensor:
    """Mask of the blocks that count: not those of filler rows and, with document masking, only those in one document.

    A block is within one document if the boundary between two is neither inside its context [anchor - c, anchor), nor
    at its anchor, nor inside its target [anchor, anchor + G). The others are generated and scored like these, so that
    shapes stay the same in every step (their share is wasted work), but have no weight in anything.

    Returns:
        bool [B, K], on the rows' device.
    Communication: none.
    """
    real = (rows.row_indices >= 0)[:, None].expand(-1, plan.num_blocks)
    if rows.documents is None:
        return real
    anchors = anchor_positions(plan, rows.tokens.device)
    # The last document that starts in or before a target starts at its context at the latest.
    latest = rows.documents.token_starts[:, anchors + plan.generate_length - 1]
    return real & (latest <= anchors - plan.context_length)


def document_positions(length: int, device: torch.device, documents: RowDocuments | None = None) -> Tensor:
    """Rotary positions of the first tokens of a row: int64 [length]; with document masking [length, B], each from 0."""
    positions = torch.arange(length, device=device)
    return positions if documents is None else positions[:, None] - documents.token_starts[:, :length].T


def generated_positions(
    plan: BlockPlan, first: int, count: int, device: torch.device, documents: RowDocuments | None = None
) -> Tensor:
    """Rotary positions of tokens `first .. first + count - 1` of every rollout, token-major.

    A generated token has the position of the target token it stands for, `anchor + t`; with document masking counted
    from the start of the document that it continues, that of the token before the anchor.

    Returns:
        int64 [count * K * n], or with document masking [count * K * n, B].
    """
    # [K, n] without `repeat_interleave`, for the same reason
    anchors = anchor_positions(plan, device)[:, None].expand(-1, plan.num_samples).flatten()
    tokens = torch.arange(first, first + count, device=device)
    if documents is None:
        return (tokens[:, None] + anchors).flatten()
    continued = anchors[:, None] - documents.token_starts[:, anchors - 1].T  # [K * n, B]
    return (tokens[:, None, None] + continued).flatten(0, 1)


def packed_positions(
    plan: BlockPlan,
    document_length: int,
    tokens_per_rollout: int,
    device: torch.device,
    documents: RowDocuments | None = None,
) -> Tensor:
    """Rotary positions of a document prefix and of the first tokens of every rollout: int64 [S] or, masked, [S, B]."""
    document = document_positions(document_length, device, documents)
    return torch.cat((document, generated_positions(plan, 0, tokens_per_rollout, device, documents)))


def packed_sequence(
    tokens: Tensor, rollouts: Tensor, plan: BlockPlan, documents: RowDocuments | None = None
) -> tuple[Tensor, Tensor]:
    """A document prefix followed by rollouts, with rotary positions.

    Args:
        tokens: int64 [B, D], the first D tokens of each row.
        rollouts: int64 [B, n, K, T], the first T tokens of each rollout.
        documents: with document masking.
    Returns:
        Tokens int64 [B, D + T * R] and positions int64 [D + T * R], or with document masking [D + T * R, B].
    """
    positions = packed_positions(plan, tokens.shape[1], rollouts.shape[3], tokens.device, documents)
    return torch.cat((tokens, to_sequence(rollouts)), dim=1), positions
