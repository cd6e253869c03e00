"""Strided rollouts: where they start, what they see, how their tokens are drawn, and how they are scored."""
