"""Near-duplicates: signatures estimate the Jaccard index, bands find what is near, the earliest stays."""

import random
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.selection import near_duplicates as module
from ebft_mega.data.selection.near_duplicates import (
    PLACES,
    SHINGLE_TOKENS,
    bands_for,
    near_across,
    near_duplicates,
    shingles,
    signature,
)


def tokens(text: bytes) -> list[bytes]:
    return re.findall(rb"[A-Za-z0-9_\x80-\xff]+|[^\sA-Za-z0-9_\x80-\xff]", text)


def sets_of(text: bytes) -> set[tuple[bytes, ...]]:
    words = tokens(text)
    return {tuple(words[i : i + SHINGLE_TOKENS]) for i in range(len(words) - SHINGLE_TOKENS + 1)}


def jaccard(first: bytes, second: bytes) -> float:
    one, other = sets_of(first), sets_of(second)
    return len(one & other) / max(1, len(one | other))


def signatures_of(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    signatures = np.stack([signature(text) for text in texts])
    return signatures, signatures.any(axis=1)


def text_of(seed: int, words: int = 400) -> list[str]:
    numbers = random.Random(seed)
    return [f"w{numbers.randrange(3000)}" for _ in range(words)]


def changed(words: list[str], share: float, seed: int) -> list[str]:
    numbers = random.Random(seed)
    return [f"z{numbers.randrange(10**6)}" if numbers.random() < share else word for word in words]


def joined(words: list[str]) -> bytes:
    return " ".join(words).encode()


@given(st.lists(st.sampled_from(["a", "bc", "_x9", "ü", "日本", "+", "(", " ", "\n", "\t", "  "]), max_size=60))
def test_shingles_are_runs_of_five_tokens(parts):
    text = "".join(parts).encode()
    hashes = np.concatenate([np.empty(0, np.uint64), *shingles(text)])
    words = tokens(text)
    runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    # One hash for each, equal for equal ones and no others, whatever white space lies between.
    assert len(hashes) == len(runs)
    assert [hashes[i] == hashes[j] for i in range(len(runs)) for j in range(i)] == [
        runs[i] == runs[j] for i in range(len(runs)) for j in range(i)
    ]
    spaced = b" ".join(words)
    assert np.array_equal(hashes, np.concatenate([np.empty(0, np.uint64), *shingles(spaced)]))


def test_long_texts_have_the_same_shingles_in_parts(monkeypatch):
    text = joined(text_of(0, 3000))
    whole = np.concatenate(list(shingles(text)))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    parts = list(shingles(text))
    assert len(parts) > 100 and np.array_equal(np.concatenate(parts), whole)


def test_the_estimate_is_near_the_jaccard_index():
    errors = []
    for seed in range(60):
        words = text_of(seed, 300 + 20 * seed)
        one, other = joined(words), joined(changed(words, 0.002 * (seed % 12), seed))
        estimate = float((signature(one) == signature(other)).mean())
        errors.append(estimate - jaccard(one, other))
    # The standard deviation of 256 independent places is at most 0.031.
    assert abs(np.mean(errors)) < 0.01 and np.abs(errors).max() < 0.12


def test_the_same_documents_are_left_out_as_by_comparing_all_pairs():
    texts = []
    for seed in range(60):
        words = text_of(seed)
        texts += [joined(changed(words, share, seed + 1000 * place)) for place, share in enumerate((0, 0.003, 0.005))]
    random.Random(0).shuffle(texts)
    for threshold in (0.7, 0.8, 0.9):
        signatures, candidates = signatures_of(texts)
        stays: list[int] = []
        expected = np.zeros(len(texts), bool)
        for number in range(len(texts)):
            estimates = (signatures[stays] == signatures[number]).mean(axis=1) if stays else np.zeros(1)
            expected[number] = estimates.max() >= threshold
            if not expected[number]:
                stays.append(number)
        found = near_duplicates(signatures, candidates, threshold)
        assert 20 < expected.sum() < 130
        assert np.count_nonzero(found != expected) <= 1  # 99 of 100 pairs that are just near share a band


def test_planted_near_duplicates_are_found_and_others_are_not():
    texts, is_near = [], []
    for seed in range(150):
        words = text_of(seed)
        other = changed(words, (0.002, 0.06)[seed % 2], seed)
        texts += [joined(words), joined(other)]
        is_near += [False, jaccard(*texts[-2:]) > 0.8]
    found = near_duplicates(*signatures_of(texts), 0.8)
    clear = [n for n in range(1, 300, 2) if not 0.7 < jaccard(texts[n - 1], texts[n]) < 0.9]
    assert len(clear) > 100
    assert [bool(found[n]) for n in clear] == [is_near[n] for n in clear]
    assert not found[::2].any()


def test_nearness_is_no_chain():
    words = text_of(1, 2000)
    middle = [*words[:-200], *text_of(2, 200)]
    last = [*text_of(3, 200), *middle[200:]]
    a, b, c = joined(words), joined(middle), joined(last)
    assert jaccard(a, b) > 0.8 < jaccard(b, c) and jaccard(a, c) < 0.75
    assert near_duplicates(*signatures_of([a, b, c]), 0.78).tolist() == [False, True, False]
    assert near_duplicates(*signatures_of([b, a, c]), 0.78).tolist() == [False, True, True]


def test_short_documents_are_near_to_nothing():
    texts = [b"", b"a b c d", b"a b c d", b"a b c d e", b"a  b\nc d e"]
    signatures, candidates = signatures_of(texts)
    assert candidates.tolist() == [False, False, False, True, True]
    assert near_duplicates(signatures, candidates, 0.8).tolist() == [False, False, False, False, True]


def test_documents_that_are_left_out_already_lead_to_nobody_being_left_out():
    words = text_of(5)
    signatures, candidates = signatures_of([joined(words), joined(words), joined(words)])
    candidates[0] = False
    assert near_duplicates(signatures, candidates, 0.8).tolist() == [False, False, True]


def test_across_two_sides():
    texts = [joined(text_of(seed)) for seed in (1, 1, 2, 3, 3)]
    held_out = np.array([True, False, True, True, True])
    found = near_across(*signatures_of(texts), held_out, 0.8)
    assert found.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_what_is_at_the_threshold(threshold):
    bands, rows = bands_for(threshold)
    assert bands * rows <= PLACES and 1 - (1 - threshold**rows) ** bands >= 0.99 or rows == 1


def test_a_document_takes_less_than_a_kilobyte():
    signatures, _ = signatures_of([joined(text_of(0, 30))])
    for threshold in (0.1, 0.5, 0.8, 1.0):
        links = module._earlier_in_bands(np.repeat(signatures, 9, axis=0), np.arange(9), threshold)
        # With key, order and comparison of a band while it is sorted.
        assert signatures.nbytes + links.nbytes / 9 + 60 <= 1000


def test_thousands_of_variations_of_one_text_take_no_square_of_time():
    words = text_of(0, 100)
    numbers = np.arange(6_000, dtype=np.uint64)
    signatures = np.repeat(signature(joined(words))[None], len(numbers), axis=0)
    signatures[:, :200] = module._mixed(numbers[:, None] * np.uint64(977) + np.arange(200, dtype=np.uint64))
    began = time.process_time()
    assert not near_duplicates(signatures, np.ones(len(numbers), bool), 0.8).any()
    assert time.process_time() - began < 10
