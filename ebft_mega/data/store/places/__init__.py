"""Stores: one file each, called as the scheme of its addresses."""
