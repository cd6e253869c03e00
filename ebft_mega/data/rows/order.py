"""The random order in which a source is read: pure functions of seed, epoch and dataset; nothing is stored per row.

Every random choice is raw output of a counter-based generator (Philox) whose key is the hash of a name. Raw
output is the same in every numpy release, which `Generator.permutation` does not promise, so a run resumes in
the same order after an upgrade; and any part of the order can be computed without the parts before it.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from ebft_mega.data.store.format import WINDOW_DOCUMENTS

FEISTEL_ROUNDS = 8  # even: both halves of a value are replaced equally often


def random_words(count: int, *name: object) -> np.ndarray:
    """Random words that belong to a name.

    Args:
        count: how many.
        name: what they are for; another name gets unrelated words.

    Returns:
        uint64 [count].
    """
    digest = hashlib.sha256("\0".join(map(str, name)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8")).random_raw(count)


def permutation(num_items: int, *name: object) -> np.ndarray:
    """Permutation of a few items: they are sorted by random words.

    Args:
        num_items: how many; each takes 16 bytes of memory while the permutation is made.
        name: what is permuted, with seed, epoch and fingerprint.

    Returns:
        int64 [num_items], the item at each position.
    """
    return np.argsort(random_words(num_items, *name), kind="stable")


class FeistelPermutation:
    """A permutation of many items, evaluated one by one in memory of the square root of their number.

    A Feistel network over the values of the smallest power of two that holds all items: in every round one half of a
    value's bits is changed by a table look-up of the other half, which can be undone, so values are permuted. A
    value that is no item goes through again until it is one (cycle walking; two passes on average at most), so the
    items are permuted among themselves, whatever their number. The tables are raw random words.

    Args:
        num_items: at least 1.
        name: what is permuted, with seed, epoch and fingerprint.
    """

    def __init__(self, num_items: int, *name: object):
        if num_items < 1:
            raise ValueError(f"a permutation of {num_items} items")
        bits = (num_items - 1).bit_length()
        self._num_items = num_items
        self._low_bits = bits // 2
        num_low, num_high = 1 << self._low_bits, 1 << (bits - self._low_bits)
        words = random_words(FEISTEL_ROUNDS // 2 * (num_low + num_high), *name).reshape(FEISTEL_ROUNDS // 2, -1)
        to_high, to_low = words[:, :num_low] & np.uint64(num_high - 1), words[:, num_low:] & np.uint64(num_low - 1)
        self._tables = list(zip(to_high.tolist(), to_low.tolist(), strict=True))

    def __len__(self) -> int:
        return self._num_items

    def item_at(self, position: int) -> int:
        """The item at a position, 0 <= position < len(self)."""
        if not 0 <= position < self._num_items:
            raise IndexError(f"position {position} of {self._num_items}")
        low_bits = self._low_bits
        mask = (1 << low_bits) - 1
        value = position
        while True:
            high, low = value >> low_bits, value & mask
            for to_high, to_low in self._tables:
                high ^= to_high[low]
                low ^= to_low[high]
            value = high << low_bits | low
            if value < self._num_items:
                return value


@dataclass(frozen=True)
class EpochWindows:
    """An epoch cut into windows, the groups of whole shards whose documents are shuffled together."""

    shards: np.ndarray  # int64 [shards], the epoch's order
    first: np.ndarray  # int64 [windows + 1], window w holds shards[first[w] : first[w + 1]]

    def __len__(self) -> int:
        return len(self.first) - 1

    def shards_of(self, window: int) -> np.ndarray:
        """Shards of a window, int64, in the epoch's order."""
        return self.shards[self.first[window] : self.first[window + 1]]


def epoch_windows(
    shard_documents: np.ndarray,
    seed: int | None,
    epoch: int,
    fingerprint: str,
    window_documents: int = WINDOW_DOCUMENTS,
) -> EpochWindows:
    """Permute the shards of an epoch and group neighbours until a group is large enough to be shuffled.

    A window closes as soon as it holds `window_documents` documents, so it holds less than that and one shard; only
    the last one of an epoch may hold fewer. A dataset that is smaller is one window: its documents are fully
    permuted.

    Args:
        shard_documents: integers [shards], documents of each shard, in the manifest's order.
        seed: the run's seed; None keeps the manifest's order.
        epoch: epoch number from 0.
        fingerprint: the dataset's fingerprint.
        window_documents: documents that close a window.
    """
    num_shards = len(shard_documents)
    shards = np.arange(num_shards) if seed is None else permutation(num_shards, "shards", seed, epoch, fingerprint)
    documents_before = np.concatenate(([0], np.cumsum(shard_documents[shards], dtype=np.int64)))
    first = [0]
    while first[-1] < num_shards:
        full = documents_before[first[-1]] + window_documents
        first.append(min(int(np.searchsorted(documents_before, full)), num_shards))
    return EpochWindows(shards, np.array(first))
