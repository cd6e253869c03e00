"""Hugging Face weights in and out: files, names, and which slice of which tensor a parameter is."""
