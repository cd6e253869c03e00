"""Drawing tokens from logits with addressed noise: the Gumbel-max trick in two levels.

The vocabulary is cut into 64 fixed blocks of consecutive ids. First a block is drawn by its total
probability, then a token inside it: the distribution is exactly the softmax, but noise is made for
64 + V / 64 numbers, not for V. The blocks do not depend on the parallel layout: a tensor-parallel rank can
score its own blocks, and (score, block, token) of its best one is all that the ranks have to compare.
"""

import torch
from torch import Tensor

from ebft_mega.rollout.noise import gumbel

NUM_VOCABULARY_BLOCKS = 64


def sample_tokens(logits: Tensor, keys: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token for every key.

    Args:
        logits: [..., V] of the true vocabulary (no padding), any float dtype; leading dimensions broadcast to
            those of `keys`: samples that share logits need no copies of them (pass a dimension of size 1).
        keys: int64 [...], of `noise_keys`.
        temperature: > 0.
        top_p: in (0, 1]; below 1 only the nucleus is drawn from.
    Returns:
        int64, shape of `keys`, in [0, V).
    Raises:
        ValueError: for a temperature or top_p out of range.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), rollouts; float32 and the order of the authors' code.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    scaled = at_temperature(logits, temperature)
    if top_p < 1:
        scaled = keep_nucleus(scaled, top_p)
    block = block_scores(scaled, keys).argmax(dim=-1)
    return token_in_block(scaled, keys, block)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 (float64 stays float64).

    Args:
        logits: [..., V].
    Returns:
        [..., V].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype) / temperature


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Set all logits outside the nucleus to minus infinity.

    The nucleus is the fewest most probable tokens that reach a probability of `top_p` together, the one that
    crosses it included. Tokens exactly as probable as the last of them stay too: which of equals comes first
    would depend on the sort.

    Args:
        logits: [..., V], already at temperature.
        top_p: in (0, 1).
    Returns:
        [..., V].
    Source: nucleus sampling (arXiv 1904.09751).
    """
    ordered = logits.sort(dim=-1, descending=True).values
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The first token is always kept, even when rounding leaves `before` slightly off zero.
    size = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = ordered.gather(-1, size - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def block_scores(logits: Tensor, keys: Tensor) -> Tensor:
    """Noisy log-probability (up to a constant) of each vocabulary block; the largest wins.

    Args:
        logits: [..., V] at temperature, excluded tokens minus infinity; leading dimensions broadcast to
            `keys`.
        keys: int64 [...].
    Returns:
        float64 [..., 64]; minus infinity for a block without tokens.
    Communication: none.
    """
    width = _block_width(logits.shape[-1])
    num_full = logits.shape[-1] // width
    full, last = logits.split((num_full * width, logits.shape[-1] - num_full * width), dim=-1)
    masses = logits.new_full((*logits.shape[:-1], NUM_VOCABULARY_BLOCKS), -torch.inf)
    masses[..., :num_full] = full.unflatten(-1, (num_full, width)).logsumexp(dim=-1)
    if last.shape[-1]:
        masses[..., num_full] = last.logsumexp(dim=-1)
    return masses + gumbel(keys, torch.arange(NUM_VOCABULARY_BLOCKS, device=keys.device))


def token_in_block(logits: Tensor, keys: Tensor, block: Tensor) -> Tensor:
    """Draw a token of one vocabulary block.

    Args:
        logits: [..., V] at temperature, excluded tokens minus infinity; leading dimensions broadcast to
            `keys`.
        keys: int64 [...].
        block: int64, shape of `keys`, a block that has a token with a finite logit.
    Returns:
        int64, shape of `keys`.
    Communication: none.
    """
    vocabulary = logits.shape[-1]
    width = _block_width(vocabulary)
    offsets = torch.arange(width, device=keys.device)
    ids = block[..., None] * width + offsets  # the last block may reach past the vocabulary
    own = logits.expand(*keys.shape, vocabulary).gather(-1, ids.clamp(max=vocabulary - 1))
    own = own.masked_fill(ids >= vocabulary, -torch.inf)
    # Slots after the blocks' own: the two levels need independent noise.
    choice = (own + gumbel(keys, NUM_VOCABULARY_BLOCKS + offsets)).argmax(dim=-1)
    return block * width + choice


def _block_width(vocabulary: int) -> int:
    """Tokens in a vocabulary block, the last ones maybe fewer."""
    return -(-vocabulary // NUM_VOCABULARY_BLOCKS)
