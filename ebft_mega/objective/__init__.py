"""Advantages from rewards, and the loss from advantages and log-probabilities."""
