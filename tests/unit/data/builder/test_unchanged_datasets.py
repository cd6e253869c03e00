"""Datasets without new options keep every byte, and so the fingerprints on which runs resume."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import BUILD_RECORD_NAME
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer

TEXTS = {
    "a.py": "def add(first, second):\n    return first + second\n",
    "b/c.md": "caf\u00e9 \u6f22\r\n\tend\u2581 </s> <|endoftext|> [INST] \u2028",
    "b/d.txt": "  two  spaces  \n\n\n",
    "b/e.txt": "",
    "z.py": "def add(first, second):\n    return first + second\n",
}
# Computed by the builder before it counted what it leaves out; fingerprint and sha256 over all files but build.json.
EXPECTED = {
    ("hugging_face", "texts"): "a48f39c1e8dc28e6e933123d874e593191e26248c00cdddb80a180cd967d6caa "
    "4d9bb524a86d3ec541d83bfb914f4976a636adad1a594889c6d7e1e689bf91a4",
    ("hugging_face", "records"): "ad57d04710d1721946368602749fa274597e356433735c0a2c26a3868c9b0b03 "
    "31d48fc4c5dbd49e852920bf325741ec164cab010d6149fa3716081f9147a1de",
    ("sentencepiece", "texts"): "18bc0c8a6c20b9d4ccf12a9ee940891614af1019ae0baba5e26e4d692194ce32 "
    "5b94caf25723e8a4abaac66245bc87674c55dc5a7727668b64a17e478a901d85",
    ("sentencepiece", "records"): "ed811e719d7d38e9364b8ae4048ec18187f45c5aa0ecbc37fc2fcc8db87ddbca "
    "de131635063aaeef4946b0cebede05e5633ee004cbdd93ebe8f601152cf04af9",
}


def byte_level_tokenizer(directory: Path) -> Path:
    """A byte-level BPE written out here, so that it never depends on how a library trains one."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    vocab = {"<|endoftext|>": 0} | {letters[byte]: byte + 1 for byte in range(256)} | {"re": 257, "\u0120\u0120": 258}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "<|endoftext|>", "special": True} | added,
            {"id": 259, "content": "<|fim_prefix|>", "special": False} | added,
            {"id": 260, "content": "\n\n", "special": False} | added,
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": ["r e", "\u0120 \u0120"],
        },
    }
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return directory


def write_texts(directory: Path) -> list[Path]:
    for name, text in TEXTS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(text.encode())
    return [directory]


def write_records(directory: Path) -> list[Path]:
    directory.mkdir()
    lines = [json.dumps({"content": text, "licence": "MIT", "path": name}) for name, text in TEXTS.items()]
    (directory / "dump.jsonl").write_text("\n".join(lines) + "\n\n")
    with tarfile.open(directory / "texts.tar", "w") as tar:
        for name, content in {"k1.txt": b"one\n", "k1.json": b'{"licence": "Zlib"}', "k2.txt": b"two\n"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return [directory / "dump.jsonl", directory / "texts.tar"]


def digest_of(directory: Path) -> str:
    """The fingerprint, and a hash over the names and bytes of all files but the record for people."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != BUILD_RECORD_NAME:
            total.update(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return f"{json.loads((directory / 'dataset.json').read_text())['fingerprint']} {total.hexdigest()}"


@pytest.mark.parametrize(("kind", "inputs"), EXPECTED)
def test_datasets_keep_every_byte(tmp_path: Path, tokenizer_directory: Path, kind: str, inputs: str) -> None:
    # The sentencepiece model is trained by the pinned version: another one may train another model.
    directory = tokenizer_directory if kind == "sentencepiece" else byte_level_tokenizer(tmp_path / "tokenizer")
    options = BuildOptions()
    if inputs == "records":
        options = BuildOptions(text_key="content", licence_key="licence", keep_keys=["path"], work_unit_bytes=150)
    sources = (write_texts if inputs == "texts" else write_records)(tmp_path / "source")
    build_dataset(sources, load_tokenizer(directory), tmp_path / "out", options)
    assert digest_of(tmp_path / "out") == EXPECTED[kind, inputs]
