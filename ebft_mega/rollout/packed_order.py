"""Where document positions and nodes of rollouts are in a packed pass, and their rotary positions.

A pass is the document positions of all rows, row by row, then the nodes of token 0, then those of token 1, and so on
(`ebft_mega/forest.py`); that is the order in which decoding generates them, so the concatenated passes of a decode are
the packed pass. The legend of shapes is in `ebft_mega/types.py`.
"""

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest, Level
from ebft_mega.types import RowDocuments, TokenBatch


def anchor_positions(plan: BlockPlan, device: torch.device) -> Tensor:
    """The plan's anchors, int64 [K], made where they are used: a copy from the host would wait for the device."""
    return torch.arange(plan.num_blocks, device=device) * plan.stride + plan.context_length


def anchor_rows(plan: BlockPlan, num_rows: int, document_length: int, device: torch.device) -> Tensor:
    """Places in a pass of the rows that first tokens are drawn from, those before the anchors: int64 [B * K]."""
    return document_rows(anchor_positions(plan, device) - 1, num_rows, document_length)


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


def document_rows(positions: Tensor, num_rows: int, document_length: int) -> Tensor:
    """Places in a pass of some document positions of every row.

    Args:
        positions: int64 [X], in a row.
    Returns:
        int64 [B * X], row by row.
    """
    firsts = torch.arange(num_rows, device=positions.device) * document_length
    return (firsts[:, None] + positions).flatten()


def document_positions(
    num_rows: int, length: int, device: torch.device, documents: RowDocuments | None = None
) -> Tensor:
    """Rotary positions of the first tokens of every row: int64 [B * length]; with document masking each from 0."""
    positions = torch.arange(length, device=device)
    if documents is None:
        return positions.repeat(num_rows)
    return (positions - documents.token_starts[:, :length]).flatten()


def node_positions(plan: BlockPlan, level: Level, documents: RowDocuments | None = None) -> Tensor:
    """Rotary positions of a level's nodes, int64 [N].

    A generated token has the position of the target token it stands for, `anchor + t`; with document masking counted
    from the start of the document that it continues, that of the token before the anchor.
    """
    anchors = anchor_positions(plan, level.first.device)
    if documents is None:
        return anchors[level.node_anchors % plan.num_blocks] + level.index
    continued = anchors - documents.token_starts[:, anchors - 1]  # [B, K]
    return continued.flatten()[level.node_anchors] + level.index


def stem_rows(plan: BlockPlan, level: Level, document_length: int) -> Tensor:
    """Places in a pass of the document positions that a level's stems are, int64 [M - N]."""
    anchors = level.anchors[level.stems]
    positions = anchor_positions(plan, anchors.device)[anchors % plan.num_blocks] + level.index
    return anchors // plan.num_blocks * document_length + positions


def continuations(rows: TokenBatch, plan: BlockPlan, document_length: int) -> Tensor:
    """The document's own tokens from each anchor on: what a rollout that equals them need not compute.

    Args:
        document_length: D, the positions of each row in the policy's pass.
    Returns:
        int64 [B * K, G]; -1 where the pass does not hold the position, or where a masked document has begun since the
        anchor: a rollout continues the one before.
    """
    anchors = anchor_positions(plan, rows.tokens.device)
    positions = anchors[:, None] + torch.arange(plan.generate_length, device=rows.tokens.device)  # [K, G]
    holds = (positions < document_length).expand(len(rows.tokens), -1, -1)
    if rows.documents is not None:
        starts = rows.documents.token_starts
        holds = holds & (starts[:, positions] == starts[:, anchors - 1, None])
    return torch.where(holds, rows.tokens[:, positions], -1).flatten(0, 1)


def packed_sequence(
    tokens: Tensor, forest: Forest | None, plan: BlockPlan, documents: RowDocuments | None = None
) -> tuple[Tensor, Tensor]:
    """A document prefix of every row followed by the nodes of rollouts, with rotary positions.

    Args:
        tokens: int64 [B, D], the first D tokens of each row.
        forest: the first tokens of each rollout; None: none.
        documents: with document masking.
    Returns:
        Tokens int64 [1, S] and positions int64 [S]; S is B * D and all nodes.
    """
    levels = () if forest is None else forest.levels
    nodes = [] if forest is None else [forest.node_tokens(level.index) for level in levels]
    positions = [document_positions(len(tokens), tokens.shape[1], tokens.device, documents)]
    positions += [node_positions(plan, level, documents) for level in levels]
    return torch.cat((tokens.flatten(), *nodes))[None], torch.cat(positions)
