"""Tokenizers from their files: loading, checks of what they can do, training."""
