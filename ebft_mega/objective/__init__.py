"""Advantages, log-probabilities and the loss of a step."""
