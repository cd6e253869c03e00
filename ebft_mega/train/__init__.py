"""The training step, the loop around it, and what happens between two steps."""
