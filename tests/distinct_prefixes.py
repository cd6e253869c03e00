"""What is distinct among rollouts, counted one prefix at a time: the reference for `ebft_mega/forest.py`."""

from dataclasses import dataclass

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.types import TokenBatch

Prefix = tuple[int, tuple[int, ...]]  # anchor b * K + k, and tokens


@dataclass(frozen=True)
class DistinctPrefixes:
    """Of one number of tokens, in the order of anchors and of the first rollout that begins so."""

    prefixes: tuple[Prefix, ...]
    # Without those that the policy's pass over the document holds; never none at all, and what continues a node is one.
    nodes: tuple[Prefix, ...]


def prefixes_by_level(
    rollouts: Tensor, batch: TokenBatch, plan: BlockPlan, document_length: int
) -> list[DistinctPrefixes]:
    """Distinct prefixes of 1, 2, ... tokens of rollouts [B, n, K, tokens] that continue a batch.

    Args:
        document_length: positions of each row in the policy's pass.
    """
    levels: list[DistinctPrefixes] = []
    for length in range(1, rollouts.shape[-1] + 1):
        prefixes, nodes = [], []
        for anchor, own in enumerate(rollouts.transpose(1, 2).flatten(0, 1).tolist()):
            row, start = anchor // plan.num_blocks, plan.anchors[anchor % plan.num_blocks]
            end = start + length
            ids = batch.document_ids[row, start - 1 : end].tolist()
            held = end <= document_length and (batch.documents is None or len(set(ids)) == 1)
            for tokens in dict.fromkeys(tuple(rollout[:length]) for rollout in own):
                prefixes.append((anchor, tokens))
                continues_node = bool(levels) and (anchor, tokens[:-1]) in levels[-1].nodes
                if continues_node or not held or tokens != tuple(batch.tokens[row, start:end].tolist()):
                    nodes.append((anchor, tokens))
        levels.append(DistinctPrefixes(tuple(prefixes), tuple(nodes or prefixes[:1])))
    return levels
