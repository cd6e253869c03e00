"""From rewards to advantages, and from log-probabilities to the loss."""
