"""The transformer of the policy and of the feature network: layers, attention, head, weights."""
