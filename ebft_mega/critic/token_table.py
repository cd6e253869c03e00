"""Vectors of tokens: the principal components of the initial policy's input embeddings."""

import torch
from torch import Tensor

ROWS_AT_ONCE = 16384


def token_table(embeddings: Tensor, rank: int) -> Tensor:
    """A short vector of every token.

    Args:
        embeddings: [V, H], any float dtype.
        rank: r; of a smaller hidden size all of it is used.
    Returns:
        float32 [V, min(r, H)]: the principal components of the centred embeddings, largest first, scaled to an overall
        standard deviation of one. The largest entry of each component's direction is positive, so that only rounding
        differs between machines.
    Communication: none.
    Memory: two float64 matrices of H x H, and a few thousand rows in float64.
    """
    vocabulary, hidden = embeddings.shape
    total = torch.zeros(hidden, dtype=torch.float64)
    squares = torch.zeros(hidden, hidden, dtype=torch.float64)
    for rows in embeddings.split(ROWS_AT_ONCE):
        part = rows.to(torch.float64)
        total += part.sum(dim=0)
        squares += part.T @ part
    mean = total / vocabulary
    _, directions = torch.linalg.eigh(squares / vocabulary - torch.outer(mean, mean))  # ascending
    directions = directions[:, -min(rank, hidden) :].flip(dims=(1,))
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    table = torch.cat([(rows.to(torch.float64) - mean) @ directions for rows in embeddings.split(ROWS_AT_ONCE)])
    deviation = table.std(correction=0)  # of embeddings that are all alike: every vector is zero
    return (table / torch.where(deviation > 0, deviation, 1.0)).to(torch.float32)
