"""Strided rollouts: generation, sampling noise, scoring under the policy, and duplicates."""
