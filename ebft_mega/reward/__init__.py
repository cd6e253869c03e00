"""What a rollout is worth, from inner products of features alone."""
