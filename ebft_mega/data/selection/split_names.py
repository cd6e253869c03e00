"""Tell by their names which files hold the train, validation or test split of a dataset."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

# What datasets of Hugging Face's hub call them.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_LETTERS = re.compile(r"[a-z]+")


def split_of(name: str) -> str | None:
    """The split that a file's name says, or else the nearest of its folders; None where none does.

    Args:
        name: relative to the input.
    """
    for part in reversed(PurePosixPath(name).parts):
        for word in _LETTERS.findall(part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def count_splits(names: Iterable[str]) -> dict[str, int]:
    """Files of each split, in the order train, validation, test."""
    counts = Counter(split for name in names if (split := split_of(name)) is not None)
    return {split: counts[split] for split in _WORDS if split in counts}
