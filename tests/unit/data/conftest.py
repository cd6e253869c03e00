"""Tiny tokenizers and datasets, made once for all data tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer

SOURCE_LINES = [
    "def add(first, second):",
    "    return first + second",
    "class Counter:",
    "    def __init__(self, start=0):",
    "        self.value = start",
    "for name in sorted(names):",
    "    print(f'{name}: {len(name)}')",
    "# a comment with caf\u00e9 and \u6f22",
    "import collections, itertools",
    "value = {'key': [1, 2, 34], 'other': None}",
]


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Thirty documents of very different lengths, by relative path."""
    contents = {}
    for number in range(30):
        lines = [SOURCE_LINES[(number * 7 + line * 3) % len(SOURCE_LINES)] for line in range(1 + number * number % 23)]
        contents[f"package{number % 4}/module_{number:02d}.py"] = f"# {number}\n" + "\n".join(lines) + "\n"
    return contents


def write_texts(directory: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return directory


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), texts)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory, text_directory: Path) -> Path:
    """A sentencepiece tokenizer of 340 tokens."""
    directory = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    train_tokenizer(text_directory, 340, directory)
    return directory


@pytest.fixture(scope="session")
def hugging_face_directory(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    """A byte-level BPE with a special token and a marker that is flagged as an ordinary added token."""
    directory = tmp_path_factory.mktemp("hugging_face")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts.values(), trainer)
    backend.add_tokens(["<|fim_prefix|>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return directory


@pytest.fixture(scope="session")
def dataset_directory(
    tmp_path_factory: pytest.TempPathFactory, text_directory: Path, tokenizer_directory: Path
) -> Path:
    """The thirty documents in several shards; shared, so tests that damage it copy it first."""
    directory = tmp_path_factory.mktemp("shared") / "dataset"
    build_dataset(text_directory, load_tokenizer(tokenizer_directory), directory, BuildOptions(shard_bytes=12_000))
    return directory


@pytest.fixture
def dataset(dataset_directory: Path) -> Dataset:
    return open_dataset(dataset_directory)


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer_directory: Path) -> Callable[..., Path]:
    """Build a dataset from texts by name."""

    def make(texts: dict[str, str], name: str = "dataset", overwrite: bool = False, **options: object) -> Path:
        source = write_texts(tmp_path / f"{name}-texts", texts)
        tokenizer = load_tokenizer(tokenizer_directory)
        build_dataset(source, tokenizer, tmp_path / name, BuildOptions(**options), overwrite=overwrite)
        return tmp_path / name

    return make
