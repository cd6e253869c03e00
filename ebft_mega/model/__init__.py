"""The policy and the feature network: architecture, layers, weights."""
