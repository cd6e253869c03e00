import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.selection.deduplication import first_occurrences


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_the_first_of_equal_documents_stays(numbers: list[int]) -> None:
    digests = np.frombuffer(b"".join(hashlib.sha256(bytes([n])).digest() for n in numbers), np.uint8).reshape(-1, 32)
    expected = [number not in numbers[:place] for place, number in enumerate(numbers)]
    assert first_occurrences(digests).tolist() == expected


def test_every_byte_of_a_digest_counts() -> None:
    digests = np.zeros((33, 32), np.uint8)
    digests[np.arange(32), np.arange(32)] = 1
    assert first_occurrences(digests).all()
    assert first_occurrences(np.concatenate([digests, digests])).tolist() == [True] * 33 + [False] * 33
