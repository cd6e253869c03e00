"""Checkpoints: what is in one, how it is written and committed, and how a run resumes from it."""
