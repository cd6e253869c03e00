"""Constants of the language-model head: 64 vocabulary blocks, and logits of 512 rows at a time. No torch."""

# Sampling draws a block of token ids, then a token in it, whatever the parallel layout (`rollout/sampling.py`). A
# tensor-parallel slice is made of whole blocks, so the tensor-parallel size divides this number.
NUM_VOCABULARY_BLOCKS = 64
# Rows that one chunk of the language-model head covers: logits of at most this many rows exist at a time.
HEAD_ROWS = 512


def padded_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding and the head over all tensor-parallel ranks: whole vocabulary blocks for each of them.

    One rank needs no padding. Padding is never sampled, scored, counted or exported.
    """
    if tensor_parallel == 1:
        return vocab_size
    return NUM_VOCABULARY_BLOCKS * vocabulary_block_width(vocab_size)


def vocabulary_block_width(vocab_size: int) -> int:
    """Tokens in a vocabulary block; the last blocks may have fewer, or none."""
    return -(-vocab_size // NUM_VOCABULARY_BLOCKS)
