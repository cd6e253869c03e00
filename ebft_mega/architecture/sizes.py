"""Sizes that the running code and the memory formulas share. Torch-free, so that a dry run can read them."""

HEAD_ROWS = 512
"""Rows that one chunk of the language-model head covers: logits of at most this many rows exist at a time."""

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""What a checkpoint holds of each parameter: the float32 weight and AdamW's two moments."""
