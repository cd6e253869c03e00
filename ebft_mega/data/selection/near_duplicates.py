"""Near-duplicates by MinHash: of documents that are nearly the same, the earliest stays.

A document is the set of its shingles: every 5 tokens that follow each other, where a token is a run of letters, digits,
underscores and bytes outside ASCII, or one other character that is no white space. How near two documents are is the
Jaccard index of their sets (in both, of in either), estimated by the share of equal places in their signatures.

A signature is a one-permutation MinHash (Li, Owen, Zhang: One permutation hashing, 2012) of 256 places, with optimal
densification (Shrivastava, 2017): the hashes of all shingles are sorted once, whatever the number of places. All of it
is arithmetic on arrays of whole numbers that no library's release changes, so that the same inputs leave out the same
documents at any time.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

SHINGLE_TOKENS = 5
PLACES = 256
ACROSS_THRESHOLD = 0.8  # at which near-duplicates in the two datasets of a split are counted

_MOST_BANDS = 64
_WANTED_RECALL = 0.99  # of pairs at the threshold, by the bands
_MOST_COMPARED = 64  # earlier documents in each band of a document
_CHUNK_BYTES = 1 << 16
_NOTHING = np.uint64(2**64 - 1)  # where no shingle is
# Of splitmix64, as is what `_mixed` does.
_FACTOR, _MIX = 0x9E3779B97F4A7C15, (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit numbers (splitmix64's last step); each gives another one."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


_IS_WORD = np.array([chr(byte).isalnum() or byte == ord("_") or byte >= 128 for byte in range(256)])
_IS_SPACE = np.array([chr(byte).isspace() and byte < 128 for byte in range(256)])
_BYTE_VALUES = np.where(_IS_SPACE, np.uint64(0), _mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_FACTOR)))


@lru_cache(maxsize=1)
def _probes() -> np.ndarray:
    """For each place all places in an order of its own: uint8 [PLACES, PLACES]."""
    numbers = np.arange(PLACES * PLACES, dtype=np.uint64).reshape(PLACES, PLACES)
    return np.argsort(_mixed(numbers + np.uint64(_FACTOR)), axis=1, kind="stable").astype(np.uint8)


@lru_cache(maxsize=2)
def _powers(base: int) -> np.ndarray:
    """base**0, base**1, ... modulo 2**64, for each byte of a chunk."""
    powers = np.full(_CHUNK_BYTES, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _tokens(content: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Hashes of the tokens of a chunk, which begin at some of its bytes: uint64 [tokens]."""
    # White space counts nothing, so a token may extend over what follows it.
    values = _BYTE_VALUES[content] * _powers(_FACTOR)[: len(content)]
    return _mixed(np.add.reduceat(values, begins) * _powers(pow(_FACTOR, -1, 1 << 64))[begins])


def shingles(text: bytes) -> Iterator[np.ndarray]:
    """Hashes of a text's shingles, in their order and with repetitions; 64 KiB of the text at a time.

    A token that is longer than that is cut into several.

    Args:
        text: UTF-8.

    Yields:
        uint64 [shingles].
    """
    content = np.frombuffer(text, np.uint8)
    carried = np.empty(0, np.uint64)  # tokens whose shingles are not complete
    begin = 0
    while begin < len(content):
        chunk = content[begin : begin + _CHUNK_BYTES]
        word, starts = _IS_WORD[chunk], ~_IS_SPACE[chunk]
        starts[1:] &= ~(word[1:] & word[:-1])  # within a word no token begins
        begins = np.flatnonzero(starts)
        end = len(chunk)
        if begin + end < len(content) and len(begins) and begins[-1]:
            end = int(begins[-1])  # the last token may continue in the next chunk
            begins = begins[:-1]
        begin += end
        if not len(begins):
            continue
        tokens = np.concatenate([carried, _tokens(chunk[:end], begins)])
        count = max(0, len(tokens) - SHINGLE_TOKENS + 1)
        carried = tokens[count:]
        hashes = np.zeros(count, np.uint64)
        for place in range(SHINGLE_TOKENS if count else 0):
            hashes = _mixed(hashes * np.uint64(_FACTOR) + tokens[place : place + count])
        yield hashes


def signature(text: bytes) -> np.ndarray:
    """The signature of a text; zeros for one of fewer than 5 tokens, which is near to nothing but its equals.

    Memory: about 3 MB.

    Args:
        text: UTF-8.

    Returns:
        uint16 [PLACES].
    """
    minima = np.full(PLACES, _NOTHING)
    for hashes in shingles(text):
        hashes.sort()
        buckets = (hashes >> np.uint64(56)).astype(np.int64)
        first = np.ones(len(hashes), bool)
        first[1:] = buckets[1:] != buckets[:-1]
        minima[buckets[first]] = np.minimum(minima[buckets[first]], hashes[first])
    there = minima != _NOTHING
    if not there.any():
        return np.zeros(PLACES, np.uint16)
    if not there.all():
        probes = _probes()[~there]
        minima[~there] = minima[probes[np.arange(len(probes)), there[probes].argmax(axis=1)]]
    # The smallest hashes of a large set begin alike, so they are mixed before they are cut short.
    return (_mixed(minima + np.uint64(_FACTOR)) >> np.uint64(48)).astype(np.uint16)


def bands_for(threshold: float) -> tuple[int, int]:
    """Number of bands and places in each: documents that agree in all places of a band are compared.

    As many places as leave 99 of 100 pairs at the threshold with an equal band; at most 64 bands.
    """
    for rows in range(PLACES // 8, 0, -1):
        bands = min(PLACES // rows, _MOST_BANDS)
        if 1 - (1 - threshold**rows) ** bands >= _WANTED_RECALL:
            return bands, rows
    return _MOST_BANDS, 1


def near_duplicates(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """Mark documents that are near to an earlier one which stays.

    Nearness is no chain: of A, B and C, where B is near to A and C to B but not to A, A and C stay. A document is
    compared with at most 64 earlier ones of each band, the latest, so that a million variations of one text take no
    time that grows with its square.

    Memory: at most 256 bytes for the bands of each document (128 at a threshold of 0.8), beside its signature of 512,
    and 60 more while bands are sorted.

    Args:
        signatures: uint16 [documents, PLACES], in the order of the inputs.
        candidates: bool [documents], those that have a signature and are not left out for another reason.
        threshold: documents are near from this estimate of their Jaccard index, above 0 and at most 1.

    Returns:
        bool [documents].
    """
    documents = np.flatnonzero(candidates)
    near = np.zeros(len(candidates), bool)
    return _judge(signatures, documents, documents, near, near, threshold)


def near_across(signatures: np.ndarray, candidates: np.ndarray, held_out: np.ndarray, threshold: float) -> np.ndarray:
    """Mark held-out documents that are near to one which is not held out. Memory as `near_duplicates`.

    Args:
        signatures, candidates, threshold: see `near_duplicates`.
        held_out: bool [documents].

    Returns:
        bool [documents].
    """
    judged = np.flatnonzero(candidates & held_out)
    documents = np.concatenate([np.flatnonzero(candidates & ~held_out), judged])
    return _judge(signatures, documents, judged, held_out, np.zeros(len(candidates), bool), threshold)


def _judge(
    signatures: np.ndarray,
    documents: np.ndarray,
    judged: np.ndarray,
    passed_over: np.ndarray,
    near: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Compare documents with those before them.

    Args:
        signatures, threshold: see `near_duplicates`.
        documents: numbers of those that are compared, in an order.
        judged: numbers of those that are to be marked, in this order.
        passed_over: bool [documents], those that nothing is compared with. May be `near`, which changes meanwhile.
        near: bool [documents], takes the marks.
    """
    earlier = _earlier_in_bands(signatures, documents, threshold)
    needed = int(np.ceil(threshold * PLACES - 1e-9))
    for document in judged[(earlier[judged] >= 0).any(axis=1)].tolist():
        compared: set[int] = set()
        links = earlier[document].tolist()
        for band, other in enumerate(links):
            if other >= 0 and passed_over[other]:
                # It comes before this one, so its own link leads to one that is not passed over.
                links[band] = other = int(earlier[other, band])
            for _ in range(_MOST_COMPARED):
                if other < 0:
                    break
                compared.add(other)
                other = int(earlier[other, band])
        earlier[document] = links
        if compared:
            others = np.fromiter(compared, np.int64, len(compared))
            equal = np.count_nonzero(signatures[others] == signatures[document], axis=1)
            near[document] = equal.max() >= needed
    return near


def _earlier_in_bands(signatures: np.ndarray, documents: np.ndarray, threshold: float) -> np.ndarray:
    """For each document and band the last one before it with the same band, or -1: int32 [documents, bands]."""
    bands, rows = bands_for(threshold)
    earlier = np.full((len(signatures), bands), -1, np.int32)
    for band in range(bands):
        key = np.zeros(len(documents), np.uint64)
        for values in signatures[documents, band * rows : (band + 1) * rows].T:
            key = _mixed(key * np.uint64(_FACTOR) + values.astype(np.uint64))
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        earlier[documents[order[1:][same]], band] = documents[order[:-1][same]]
    return earlier
