"""A tokenizer's files are read where they lie, parsed as what they are named, and copied only then."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers import tokenizer_files
from ebft_mega.data.tokenizers.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_sha256
from ebft_mega.data.tokenizers.tokenizer_files import TOKENIZER_FILES, read_tokenizer_files
from ebft_mega.errors import InputError

Copied = Callable[[Path], object]
JUNK = {
    "merges.txt": (b"root:x:0:0\n", "line 1 is no pair of symbols"),
    "vocab.json": (b'{"a": "b"}', "'a', whose value is no token id"),
    "added_tokens.json": (b"[]", "a JSON list"),
    "special_tokens_map.json": (b'{"eos_token": 1}', "'eos_token', whose value is no token"),
    "tokenizer_config.json": (b"[]", "a JSON list"),
    "tokenizer.json": (b"{}", "a JSON object without a model"),
}


@pytest.fixture
def directory(tokenizer_directory: Path, hugging_face_directory: Path, tmp_path: Path) -> Path:
    """A tokenizer with every file that one may have."""
    directory = Path(shutil.copytree(hugging_face_directory, tmp_path / "tokenizer"))
    shutil.copyfile(tokenizer_directory / "tokenizer.model", directory / "tokenizer.model")
    (directory / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (directory / "added_tokens.json").write_text('{"<|fim_prefix|>": 320}')
    (directory / "vocab.json").write_text('{"a": 0}')
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")
    return directory


def into(tmp_path: Path) -> tuple[Copied, ...]:
    """Everything that reads a tokenizer directory as a whole."""
    return (
        load_tokenizer,
        read_tokenizer_files,
        lambda source: copy_tokenizer(source, tmp_path / "copy"),
    )


def test_all_files_are_copied(directory: Path, tmp_path: Path) -> None:
    (directory / "notes.txt").write_text("private")
    copy_tokenizer(directory, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(TOKENIZER_FILES)
    assert read_tokenizer_files(tmp_path / "copy") == read_tokenizer_files(directory)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_no_file_is_read_through_a_link_that_leaves(directory: Path, tmp_path: Path, name: str) -> None:
    (directory / name).rename(tmp_path / "secret")
    (directory / name).symlink_to("../secret")
    for copied in into(tmp_path):
        with pytest.raises(InputError) as caught:
            copied(directory)
        (problem,) = caught.value.problems
        assert (problem.where, problem.key) == (str(directory / name), name)
        assert problem.found == f"a link to {tmp_path / 'secret'}, which is outside of its directory"
    assert not (tmp_path / "copy").exists()
    if name in ("tokenizer.model", "tokenizer.json"):
        (directory / "tokenizer.model").unlink() if name == "tokenizer.json" else None
        with pytest.raises(InputError, match="outside of its directory"):
            tokenizer_sha256(directory)
    # Within the directory, and in the directory that a link names, it is read.
    (directory / name).unlink()
    (tmp_path / "secret").rename(directory / "other")
    (directory / name).symlink_to("other")
    (tmp_path / "way").symlink_to(directory)
    copy_tokenizer(tmp_path / "way", tmp_path / "copy")
    assert (tmp_path / "copy" / name).is_file() and not (tmp_path / "copy" / name).is_symlink()


@pytest.mark.parametrize("name", JUNK)
def test_a_file_that_is_not_what_it_is_named_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    content, words = JUNK[name]
    (directory / name).write_bytes(content)
    for copied in into(tmp_path):
        with pytest.raises(InputError) as caught:
            copied(directory)
        assert [(problem.key, problem.found) for problem in caught.value.problems] == [(name, words)]
    assert not (tmp_path / "copy").exists()


def test_all_problems_are_said_at_once(directory: Path) -> None:
    for name, (content, _) in JUNK.items():
        (directory / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    assert {problem.key for problem in caught.value.problems} == set(JUNK)


def replaced(put_in: str, string: str | None = None) -> dict[str, Any]:
    """A step that replaces a text, or what an expression matches: here nothing, between any two characters."""
    pattern = {"Regex": ""} if string is None else {"String": string}
    return {"type": "Replace", "pattern": pattern, "content": put_in}


def table(longest: int) -> str:
    """A compiled table of sentencepiece with an index of four bytes."""
    return base64.b64encode(b"\4\0\0\0" + bytes(4) + b"b\0" + b"c" * longest + b"\0").decode()


def steps(key: str, *listed: Any) -> dict[str, Any]:
    return {"type": "Sequence", key: list(listed)}


GROWING = {
    "an expression": {"normalizer": replaced("b" * 100)},
    "a character": {"normalizer": replaced("b" * 100, "a")},
    "a prefix": {"normalizer": {"type": "Prepend", "prepend": "b" * 100}},
    "without its type": {"normalizer": {"pattern": {"String": "a"}, "content": "b" * 100}},
    "twice and twice": {"normalizer": steps("normalizers", *[replaced("aa", "a")] * 40)},
    "in several places": {
        "normalizer": steps("normalizers", replaced("b" * 9, "a")),
        "pre_tokenizer": steps("pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": False}] * 3),
    },
    "steps in steps": {"normalizer": steps("normalizers", *[steps("normalizers", replaced("b" * 9, "b"))] * 2)},
    "bytes of bytes": {"pre_tokenizer": steps("pretokenizers", *[{"type": "ByteLevel"}] * 40)},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table(65)}},
    "what is decoded": {"decoder": steps("decoders", *[replaced("aa", "a")] * 40)},
    "nothing replaced": {"decoder": steps("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 40)},
    "a suffix": {"model": {"type": "BPE", "end_of_word_suffix": "w" * 100}},
}


@pytest.mark.parametrize("name", GROWING)
def test_rules_that_make_much_of_a_short_text_are_refused(directory: Path, tmp_path: Path, name: str) -> None:
    definition = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**definition, **GROWING[name]}))
    for copied in into(tmp_path):
        with pytest.raises(InputError) as caught:
            copied(directory)
        (problem,) = caught.value.problems
        assert (problem.key, problem.found[:12]) == ("tokenizer.json", "rules that c")


PUBLISHED = {
    "llama": {
        "normalizer": steps("normalizers", {"type": "Prepend", "prepend": "\u2581"}, replaced("\u2581", " ")),
        "decoder": steps("decoders", replaced(" ", "\u2581"), {"type": "ByteFallback"}, {"type": "Fuse"}),
    },
    "clip": {
        "normalizer": steps("normalizers", {"type": "NFC"}, replaced(" "), {"type": "Lowercase"}),
        "pre_tokenizer": steps("pretokenizers", {"type": "ByteLevel", "add_prefix_space": False}),
        "model": {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"},
    },
    "xlm": {
        "normalizer": steps(
            "normalizers", {"type": "Precompiled", "precompiled_charsmap": table(36)}, replaced("\u2581")
        ),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
    },
    "empty": {"normalizer": None, "decoder": None, "pre_tokenizer": steps("pretokenizers")},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rules_of_published_tokenizers_are_fine(name: str) -> None:
    definition = {"model": {"type": "BPE"}, **PUBLISHED[name]}
    assert tokenizer_files.check_named_text("tokenizer.json", json.dumps(definition).encode()) == definition


@pytest.mark.parametrize(("characters", "is_refused"), [(64, False), (65, True)])
def test_a_sentencepiece_model_that_makes_much_of_a_short_text_is_refused(
    tmp_path: Path, characters: int, is_refused: bool
) -> None:
    (tmp_path / "rules.tsv").write_text(f"61\t{' '.join(['62'] * characters)}\n")
    with open(tmp_path / "tokenizer.model", "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d"] * 9),
            model_writer=model,
            vocab_size=264,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_tsv=str(tmp_path / "rules.tsv"),
            minloglevel=2,
        )
    for copied in into(tmp_path):
        with pytest.raises(InputError, match="replaces characters by 65 bytes") if is_refused else nullcontext():
            copied(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_pipes_and_endless_files_are_refused_at_once(
    directory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(InputError, match="a FIFO"):
        load_tokenizer(directory)
    (directory / name).unlink()
    (directory / name).write_bytes(bytes(100))
    monkeypatch.setattr(
        tokenizer_files, "LONGEST_BYTES", {Path(name).suffix: 99, ".json": 99, ".txt": 99, ".model": 99}
    )
    with pytest.raises(InputError, match="100 bytes, more than 99"):
        load_tokenizer(directory)


def test_a_model_file_of_another_kind_gives_way_and_is_not_copied(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    copy_tokenizer(directory, tmp_path / "copy")
    assert not (tmp_path / "copy" / "tokenizer.model").exists()
    assert tokenizer_sha256(tmp_path / "copy") == tokenizer_sha256(directory)
    assert load_tokenizer(directory).notes == (
        "tokenizer.model is not used: it is a Git LFS pointer, not the file: git lfs pull; tokenizer.json is used",
    )


@pytest.fixture(scope="module")
def built(text_directory: Path, tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built") / "dataset"
    build_dataset(text_directory, load_tokenizer(tokenizer_directory), directory)
    return directory


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "dataset"))


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "tokenizer_config.json"])
def test_a_dataset_whose_tokenizer_leads_elsewhere_is_refused(dataset: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("a secret\n")
    path = dataset / "tokenizer" / name
    if path.exists():
        path.rename(tmp_path / "secret")
    path.symlink_to("../../secret")
    with pytest.raises(InputError, match=f"{name}: found a link to .*secret, which is outside"):
        open_dataset(dataset)
    path.unlink()
    path.write_text("not what it is named")
    with pytest.raises(InputError, match=str(path)):
        open_dataset(dataset)


@pytest.mark.parametrize("name", ["tokenizer", "dataset.json"])
def test_a_dataset_has_a_tokenizer_and_a_manifest_of_its_own(dataset: Path, tmp_path: Path, name: str) -> None:
    (dataset / name).rename(tmp_path / "moved")
    (dataset / name).symlink_to("../moved")
    with pytest.raises(InputError, match=f"{name}: .*found a link to .*moved, which is outside of its directory"):
        open_dataset(dataset)


def test_shards_of_a_dataset_may_lie_elsewhere(dataset: Path, tmp_path: Path) -> None:
    """The manifest holds their sizes and hashes, and nothing of them is copied."""
    before = open_dataset(dataset).tokens(3).tolist()
    for path in [*dataset.glob("*.tar"), dataset / "index.npy"]:
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    (tmp_path / "way").symlink_to(dataset)
    for place in (dataset, tmp_path / "way"):
        assert open_dataset(place).tokens(3).tolist() == before
