"""Sample tokens from logits by the Gumbel-max trick in two levels: first a vocabulary block, then a token in it.

The vocabulary is cut into 64 fixed blocks of consecutive ids. First a block is drawn by its total
probability, then a token inside it: the distribution is exactly the softmax, but noise (`rollout/noise.py`) is made for
64 + V / 64 numbers, not for V. The blocks do not depend on the parallel layout: a tensor-parallel rank scores
its own blocks, and (score, token) of its best one is all that the ranks have to compare.

A token is an integer and cannot be NaN. One that was drawn from logits of which any was not finite is marked instead:
what is returned is its complement, a negative number. `without_marks` gives the token, `drawn_from_finite` the mark.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import NUM_VOCABULARY_BLOCKS
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.rollout.noise import gumbel

# The nucleus's threshold is searched for this many bits at a time: 15 candidates per round.
SEARCH_BITS = 4


def sample_tokens(
    logits: Tensor, rows: Tensor, keys: Tensor, temperature: float, top_p: float, own_slice: VocabularySlice
) -> Tensor:
    """Draw one token for every key.

    Args:
        logits: [N, width], this rank's columns, any float dtype.
        rows: int64 [...], which of them each token is drawn from: samples that share logits need no copies of them.
        keys: int64 [...], of `noise_keys`, the same on all ranks.
        temperature: > 0.
        top_p: in (0, 1]; below 1 only the nucleus is drawn from.
    Returns:
        int64, shape of `keys`, in [0, V); the same on all ranks, and the same for every number of ranks. Where a logit
        of the row is not finite on any rank, the complement of such a token, on all ranks the same one.
    Raises:
        ValueError: for a temperature or top_p out of range.
    Communication: with several tensor-parallel ranks one all-gather of 16 bytes per key and rank; for top_p
        below 1 also that of `keep_nucleus`. None for one rank, and never logits.
    Source: EBFT paper (arXiv 2603.12248), rollouts; float32 and the order of the authors' code.
    """
    assert logits.shape[-1] == own_slice.width, "logits of another vocabulary"
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    scaled = own_slice.exclude_padding_(at_temperature(logits, temperature))
    marked = own_slice.has_nan_or_minus_infinity(scaled)
    if top_p < 1:
        scaled = keep_nucleus(scaled, top_p, own_slice)
    score, block = block_scores(scaled, rows, keys, own_slice).max(dim=-1)
    token = token_in_block(scaled, rows, keys, block, own_slice)
    score = score.masked_fill(marked[rows], torch.nan)  # which wins on every rank, as the largest of all numbers
    # One message for both numbers: token ids are exact in float64.
    scores, tokens = own_slice.gather(torch.stack((score, token.to(score.dtype)))).unbind(dim=1)
    best = scores.argmax(dim=0, keepdim=True)
    winner = tokens.gather(0, best)[0].to(torch.int64)
    return torch.where(scores.gather(0, best)[0].isfinite(), winner, ~winner.clamp(0, own_slice.size - 1))


def drawn_from_finite(tokens: Tensor) -> Tensor:
    """Which tokens of `sample_tokens` are not marked: bool, of the same shape."""
    return tokens >= 0


def without_marks(tokens: Tensor) -> Tensor:
    """Tokens of `sample_tokens` as ids in [0, V), marked or not."""
    return torch.where(drawn_from_finite(tokens), tokens, ~tokens)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 (float64 stays float64).

    Args:
        logits: [..., V].
    Returns:
        [..., V], a copy.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype) / temperature


def keep_nucleus(logits: Tensor, top_p: float, own_slice: VocabularySlice) -> Tensor:
    """Set all logits outside the nucleus to minus infinity.

    The nucleus is the fewest most probable tokens that reach a probability of `top_p` together, the one that
    crosses it included. Tokens exactly as probable as the last of them stay too: which of equals comes first
    would depend on the sort. It is a function of the logits alone, not of how they are spread over ranks.

    Args:
        logits: float32 or float64 [..., width], this rank's columns at temperature, padding minus infinity.
        top_p: in (0, 1).
    Returns:
        [..., width].
    Communication: with several tensor-parallel ranks, per row of logits, one all-reduce of a logit, one of 8
        bytes and `bits / 4` of 120 bytes: 972 bytes in 10 calls for float32, 1936 in 18 for float64.
    Memory: at the peak 20 bytes per logit beside the logits (measured), for the sort and its running sums.
    Source: nucleus sampling (arXiv 1904.09751).
    """
    threshold = _nucleus_threshold(logits, top_p, own_slice)
    return logits.masked_fill(logits < threshold, -torch.inf)


def block_scores(logits: Tensor, rows: Tensor, keys: Tensor, own_slice: VocabularySlice) -> Tensor:
    """Noisy log-probability (up to a constant) of each of this rank's vocabulary blocks; the largest of all wins.

    Args:
        logits: [N, width] at temperature, excluded tokens minus infinity.
        rows: int64 [...], which of them; keys: int64 [...].
    Returns:
        float64 [..., blocks]; minus infinity for a block without a finite logit.
    Communication: none.
    """
    # The last block is filled up, so that its sum is taken in the same order as where padding follows it.
    last_block = own_slice.width - (own_slice.num_blocks - 1) * own_slice.block_width
    full, last = logits.split((own_slice.width - last_block, last_block), dim=-1)
    last = F.pad(last, (0, own_slice.block_width - last_block), value=-torch.inf)
    blocks = full.unflatten(-1, (own_slice.num_blocks - 1, own_slice.block_width)), last[..., None, :]
    masses = torch.cat([block.logsumexp(dim=-1) for block in blocks], dim=-1)
    return masses[rows] + gumbel(keys, own_slice.first_block + torch.arange(own_slice.num_blocks, device=keys.device))


def token_in_block(logits: Tensor, rows: Tensor, keys: Tensor, block: Tensor, own_slice: VocabularySlice) -> Tensor:
    """Draw a token of one of this rank's vocabulary blocks.

    Args:
        logits: [N, width] at temperature, excluded tokens minus infinity.
        rows: int64 [...], which of them; keys: int64 [...].
        block: int64, shape of `keys`, counted from this rank's first. For a block without a finite logit the
            result is one of its ids, maybe of no token.
    Returns:
        int64, shape of `keys`, ids in the whole vocabulary.
    Communication: none.
    """
    offsets = torch.arange(own_slice.block_width, device=keys.device)
    columns = block[..., None] * own_slice.block_width + offsets  # the last block may reach past the columns
    own = logits[rows[..., None], columns.clamp(max=own_slice.width - 1)]
    own = own.masked_fill(columns >= own_slice.width, -torch.inf)
    # Slots after the blocks' own: the two levels need independent noise.
    choice = (own + gumbel(keys, NUM_VOCABULARY_BLOCKS + offsets)).argmax(dim=-1)
    return own_slice.first + block * own_slice.block_width + choice


def _nucleus_threshold(logits: Tensor, top_p: float, own_slice: VocabularySlice) -> Tensor:
    """The largest value that tokens with at least this logit reach `top_p` together, [..., 1].

    Probabilities are fixed-point integers: their sums are exact in any order, so that every split of the
    vocabulary finds the same threshold. Resolution: 2^-44 of the most probable token's for 151 936 tokens. In a row
    with NaN or plus infinity no integer has a meaning; what is excluded there are numbers below that, never those.
    """
    largest = own_slice.maximum(logits.amax(dim=-1, keepdim=True))
    ordered = _swap_order(_as_integers(logits.contiguous())).sort(dim=-1).values
    weights = _as_floats(_swap_order(ordered)).to(torch.float64).sub_(largest).exp_()
    weights *= 2.0 ** (62 - own_slice.size.bit_length())  # V of them still fit into 63 bits
    # What integer NaN becomes depends on the processor.
    running = weights.nan_to_num_(nan=0.0).round_().to(torch.int64).cumsum_(dim=-1)
    own_total = running[..., -1:]
    total = own_slice.sum(own_total)
    needed = (total.to(torch.float64) * top_p).ceil_().to(torch.int64).minimum(total)

    def mass_from(candidates: Tensor) -> Tensor:
        """Mass of all tokens, on every rank, whose integer is at least a candidate's."""
        num_below = torch.searchsorted(ordered, candidates.to(ordered.dtype))
        below = running.gather(-1, (num_below - 1).clamp_(min=0)).masked_fill_(num_below == 0, 0)
        return own_slice.sum(own_total - below)

    # The mass falls with the candidate, so the threshold's digits follow one after another from the highest.
    bits = 8 * logits.element_size()
    digits = torch.arange(1, 2**SEARCH_BITS, device=logits.device)
    threshold = torch.full_like(total, -(2 ** (bits - 1)))
    for shift in range(bits - SEARCH_BITS, -1, -SEARCH_BITS):
        is_reached = mass_from(threshold + (digits << shift)) >= needed
        threshold += is_reached.sum(dim=-1, keepdim=True) << shift
    return _as_floats(_swap_order(threshold.to(ordered.dtype)))


def _as_integers(values: Tensor) -> Tensor:
    """The bits of floats."""
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def _as_floats(bits: Tensor) -> Tensor:
    """The floats of those bits."""
    return bits.view(torch.float64 if bits.dtype == torch.int64 else torch.float32)


def _swap_order(bits: Tensor) -> Tensor:
    """Bits of floats to integers in the order of the floats, and back.

    Floats are a sign and a magnitude, so the order of negative ones has to be reversed.
    """
    largest = torch.iinfo(bits.dtype).max
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & largest)
