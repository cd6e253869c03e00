"""Measuring a model on held-out rows."""
