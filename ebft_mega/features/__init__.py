"""The frozen feature network, and the inner products of features from which the reward is computed."""
