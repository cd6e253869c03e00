"""The order of an epoch: a pure function of (seed, epoch, dataset)."""

import hashlib
from typing import Literal

import numpy as np


def epoch_permutation(
    num_items: int, what: Literal["documents", "rows"], seed: int, epoch: int, fingerprint: str
) -> np.ndarray:
    """Permutation of an epoch's documents or rows.

    Items are sorted by the raw output of a counter-based generator. Raw Philox output is the same in every
    numpy release, which `Generator.permutation` does not promise, so a run resumes in the same order after an
    upgrade.

    Args:
        num_items: documents or rows.
        what: which of the two; they get unrelated permutations.
        seed: the run's seed.
        epoch: epoch number from 0.
        fingerprint: the dataset's fingerprint; another dataset gets unrelated permutations.

    Returns:
        int64 [num_items], the item at each position.
    """
    name = f"{what}\0{seed}\0{epoch}\0{fingerprint}"
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u8")
    return np.argsort(np.random.Philox(key=key).random_raw(num_items), kind="stable")
