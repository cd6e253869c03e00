"""Optimizers: one file each, called as `train.optimizer` calls them."""
