"""Contract of a store: a place from which data sets and models are read by their address."""

from ebft_mega.extension.entry import Entry


class Store(Entry):
    """The servers of one scheme of addresses."""
