"""A cache of the documents read last, so that the rows of a long document do not each read and check it again."""

import os
import threading
from collections import OrderedDict

import numpy as np

from ebft_mega.data.store.dataset import Dataset

DOCUMENT_CACHE_BYTES = 64 * 1024 * 1024


class DocumentCache:
    """Verified documents of one dataset, those that were used last, up to a number of bytes.

    A row needs whole documents, because a checksum covers a whole document. The rows of a long document are spread
    over a window, so a short document is hardly ever found here again, and a long one almost always, unless the long
    documents of the window together exceed the limit.

    Args:
        dataset: where the documents are read.
        limit_bytes: of the cached documents together. A single larger document is cached until another one is read,
            so that it is not read again for each row that follows; 0 disables the cache.
    """

    def __init__(self, dataset: Dataset, limit_bytes: int = DOCUMENT_CACHE_BYTES):
        self._dataset = dataset
        self._limit_bytes = limit_bytes
        self._start_empty()

    def _start_empty(self) -> None:
        self._documents: OrderedDict[int, np.ndarray] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    def tokens(self, number: int) -> np.ndarray:
        """A document as `Dataset.tokens` returns it, read if it is not cached.

        Raises:
            DamagedDataError: the document fails its check; it is not cached.
        """
        if not self._limit_bytes:
            return self._dataset.tokens(number)
        if self._process != os.getpid():
            self._start_empty()  # a thread of the parent may have held the lock when this process was forked
        with self._lock:
            found = self._documents.get(number)
            if found is not None:
                self._documents.move_to_end(number)
                return found
        tokens = self._dataset.tokens(number)
        with self._lock:
            if number not in self._documents:
                self._documents[number] = tokens
                self._num_bytes += tokens.nbytes
            while self._num_bytes > self._limit_bytes and len(self._documents) > 1:
                self._num_bytes -= self._documents.popitem(last=False)[1].nbytes
        return tokens
