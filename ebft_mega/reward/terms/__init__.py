"""Reward terms: one file each, called as `ebft.reward_terms` calls them."""
