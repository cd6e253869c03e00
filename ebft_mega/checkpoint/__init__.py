"""Complete checkpoints: what is in one, how it comes to count, and how a run goes on from it."""
