"""Contract of a text format: how a file of documents is recognised, divided and read."""

from ebft_mega.extension.entry import Entry


class TextFormat(Entry):
    """A kind of file that `tools/build_shards.py` reads."""
