"""One run from its configuration to its final model: where it starts, what it is built of, how it ends."""
