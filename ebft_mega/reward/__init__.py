"""Rewards of rollouts from the inner products of their features."""
