"""Drawing tokens with given noise: exact, and the same however the vocabulary is later sharded."""

import torch
from torch import Tensor

from ebft_mega.rollout.noise import gumbel

NUM_VOCABULARY_BLOCKS = 64


def sample_tokens(logits: Tensor, keys: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token per key by a two-level Gumbel maximum.

    The vocabulary is cut into 64 fixed blocks of consecutive ids. The first level draws a block from the blocks'
    total weights, the second a token within it; the product is exactly the softmax. Both levels need the logits of a
    block only where they are, so a tensor-parallel shard of whole blocks can do its part alone, and few noises are
    needed: 64 + V / 64 a draw.

    Args:
        logits: [..., V].
        keys: int64 [...], from `noise_keys`.
        temperature: divides the logits (cast to float32 first).
        top_p: 1 keeps everything; less keeps the smallest set of most likely tokens with at least this share.
    Returns:
        int64 [...].
    Communication: none.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_p < 1.0:
        scores = keep_nucleus(scores, top_p)
    blocks = vocabulary_blocks(scores)  # [..., 64, ids per block]
    winner = choose_block(blocks, keys)
    inside = blocks.gather(-2, winner[..., None, None].expand(*winner.shape, 1, blocks.shape[-1]))[..., 0, :]
    return winner * blocks.shape[-1] + choose_within(inside, keys)


def vocabulary_blocks(scores: Tensor) -> Tensor:
    """Cut [..., V] into [..., 64, ceil(V / 64)] blocks of consecutive ids, padded with -inf."""
    per_block = -(-scores.shape[-1] // NUM_VOCABULARY_BLOCKS)
    padding = per_block * NUM_VOCABULARY_BLOCKS - scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf) if padding else scores
    return padded.unflatten(-1, (NUM_VOCABULARY_BLOCKS, per_block))


def choose_block(blocks: Tensor, keys: Tensor) -> Tensor:
    """First level: int64 [...], the block with the largest noisy total weight."""
    totals = blocks.logsumexp(dim=-1).to(torch.float64)
    slots = torch.arange(NUM_VOCABULARY_BLOCKS, device=keys.device)
    return (totals + gumbel(keys, slots)).argmax(dim=-1)


def choose_within(scores: Tensor, keys: Tensor) -> Tensor:
    """Second level: int64 [...], place of the drawn token within the winning block's scores [..., ids]."""
    slots = NUM_VOCABULARY_BLOCKS + torch.arange(scores.shape[-1], device=keys.device)
    return (scores.to(torch.float64) + gumbel(keys, slots)).argmax(dim=-1)


def keep_nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Exclude (-inf) what lies outside the nucleus; the token that crosses the threshold, and its ties, stay."""
    probabilities = scores.softmax(dim=-1)
    ordered = probabilities.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    smallest_kept = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < smallest_kept, -torch.inf)
