"""Rewards from Gram matrices alone."""
