"""Sizes that the running code and the memory formulas share. Torch-free, so that a dry run can read them."""

HEAD_ROWS = 512
"""Rows that one chunk of the language-model head covers: logits of at most this many rows exist at a time."""
