"""A naive baseline and this trainer, side by side: the same step, weights, layers and documents, counted and timed."""
