"""Deduplication of documents by the hash of their text: the first of equal ones stays."""

import numpy as np

DIGEST_BYTES = 32


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """Mark the first of each group of equal digests.

    Memory: about 90 bytes per document while it sorts.

    Args:
        digests: uint8 [documents, 32], sha256 of each text in the order of the inputs.

    Returns:
        bool [documents].
    """
    order, differs = _sorted(digests)
    first = np.zeros(len(order), bool)
    first[order[differs]] = True
    return first


def first_with_text(digests: np.ndarray) -> np.ndarray:
    """For each document the number of the first one that has its text.

    Memory: about 100 bytes per document while it sorts.

    Args:
        digests: uint8 [documents, 32], sha256 of each text in the order of the inputs.

    Returns:
        int64 [documents].
    """
    order, differs = _sorted(digests)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[differs][np.cumsum(differs) - 1]
    return firsts


def _sorted(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents in the order of their digests, and which of them differ from the one before."""
    words = np.ascontiguousarray(digests).view("<u8")
    # The sort is stable: within equal digests, the order of the documents stays.
    order = np.lexsort(words.T)
    ordered = words[order]
    differs = np.ones(len(words), bool)
    np.any(ordered[1:] != ordered[:-1], axis=1, out=differs[1:])
    return order, differs
