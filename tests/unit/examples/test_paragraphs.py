"""The example of a text format against a naive division, cut at every byte."""

import re
from collections import Counter

import pytest

from ebft_mega.data.text.text_files import LONG_DOCUMENTS, ReadOptions
from ebft_mega.extension.text_format import FilePart

TEXT = "\none\ntwo\n\n\nthree\n\nfour, caf\u00e9\n five\n\n\n\nsix"
CONTENT = TEXT.encode()
PARAGRAPHS = [found[0] for found in re.finditer(r"(?:[^\n]+\n?)+", TEXT)]


@pytest.fixture
def read(entry_of_example, tmp_path):
    file = tmp_path / "a.paragraphs"
    file.write_bytes(CONTENT)
    kind = entry_of_example("paragraphs")

    def documents(begin, end, left_out=None, options=None, **limits):
        counts = Counter() if left_out is None else left_out
        part = FilePart(file, "a", ReadOptions(**limits), begin, end, is_cut=True, left_out=counts)
        return list(kind(kind.Options(**(options or {}))).read(part))

    return documents


def test_any_cuts_give_the_paragraphs(read):
    end = len(CONTENT)
    for size in range(1, end + 1):
        ranges = [(begin, min(end, begin + size)) for begin in range(0, end, size)]
        found = [document for begin, stop in ranges for document in read(begin, stop)]
        assert [document.text for document in found] == PARAGRAPHS, size
        for document in found:
            offset = int(document.path.removeprefix("a:"))
            assert CONTENT[offset:].startswith(document.text.encode())


def test_what_is_long_or_short_is_counted(read):
    counts = Counter()
    found = read(0, len(CONTENT), counts, {"min_characters": 5}, max_document_bytes=12)
    assert [document.text for document in found] == ["one\ntwo\n", "three\n"]
    assert counts == {LONG_DOCUMENTS: 1, "paragraphs that are too short": 1}
