"""Contracts of the seven kinds of entries: the base class of each, what an entry is given and what it returns."""
