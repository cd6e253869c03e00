"""Advantage estimators: one file each, called as `ebft.advantage_estimator` calls them."""
