"""Hugging Face models in and out: checked on the way in, exported from checkpoints, compared with transformers."""
