"""Attention over a document and its rollouts: which query sees which key, and the interchangeable implementations."""
