"""One check for all data: training sources, held-out data, the data of a separate evaluation."""

import pytest

from ebft_mega.data.store.format import Manifest
from ebft_mega.planning.data_fit import held_out_problems, vocabulary_problems

DIGEST = "0" * 64


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "format": "ebft_mega.dataset",
        "version": 1,
        "dtype": "uint16",
        "vocab_size": 100,
        "eos_id": 1,
        "tokenizer_sha256": DIGEST,
        "documents": 1,
        "tokens": 2,
        "max_token_id": 99,
        "shards": (),
        "index": {"name": "index.npy", "bytes": 0, "sha256": DIGEST},
        "fingerprint": DIGEST,
    }
    return Manifest.model_validate(fields | changes)


@pytest.mark.parametrize(("vocab_size", "refused"), [(100, False), (99, True), (128, False)])
def test_no_token_id_lies_outside_a_models_vocabulary(vocab_size: int, refused: bool) -> None:
    problems = [str(problem) for problem in vocabulary_problems("here", "--data", manifest(), vocab_size, "M")]
    assert len(problems) == refused
    assert all("a vocabulary of 100 tokens (largest token id in it: 99)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"eos_id": 2}, "end with token 2"),
        ({"tokenizer_sha256": "f" * 64}, "sha256 f"),
        ({"vocab_size": 120}, "120"),
    ],
)
def test_held_out_data_and_training_data(change: dict[str, object], words: str | None) -> None:
    problems = list(held_out_problems("here", "evaluation.shards", manifest(**change), "data.shards", manifest()))
    assert [str(words) in str(problem) for problem in problems] == ([True] if words else [])
