"""Attention of one pass over rows with a document and rollouts: who may see whom, and the routes that compute it."""
