"""A text never becomes a control token, whatever kind its tokenizer is of."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_control import is_ordinary_text, named_tokens
from ebft_mega.data.tokenizers.tokenizer_model_file import (
    describe_other_kind,
    user_defined_symbols,
    with_control_pieces,
)
from ebft_mega.errors import InputError

MARKERS = ["<|im_start|>", "[INST]", "</s>", "<s>", "<|endoftext|>", "<mask>", "FIM"]
ORDINARY = ["  ", "\n\n", "\u00f5"]
SENTENCES = ["def add(first, second):", "return first + second", "print names in order", "import sys, os and re"]
CHARACTERS = sorted({*"".join([*SENTENCES, *MARKERS]), *"\n \u00f5\u2581"})


def sentencepiece_model(kind: str, byte_fallback: bool) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=340 if byte_fallback else 80,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        remove_extra_whitespaces=False,
        add_dummy_prefix=kind == "unigram",
        user_defined_symbols=["<|im_start|>", "[INST]", "<|endoftext|>", "<mask>", "FIM", *ORDINARY],
        control_symbols=["<ctrl>"],
        minloglevel=2,
    )
    return model.getvalue()


def hugging_face(model: models.Model) -> Backend:
    backend = Backend(model)
    # Half of the markers are special, half are flagged as ordinary added tokens; some are compared after normalising.
    backend.add_special_tokens([AddedToken(marker, normalized=place > 3) for place, marker in enumerate(MARKERS[::2])])
    backend.add_tokens([AddedToken(marker, normalized=place > 1) for place, marker in enumerate(MARKERS[1::2])])
    backend.add_tokens(ORDINARY)
    return backend


def byte_level(use_regex: bool, ignore_merges: bool) -> Backend:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The markers are words of the vocabulary, as trainers make them; one of them is also what merges lead to.
    words = [*letters, *MARKERS, "FI"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = hugging_face(models.BPE(vocabulary, [("F", "I"), ("FI", "M")], ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return backend


def word_level() -> Backend:
    words = ["<unk>", *MARKERS, *CHARACTERS, "def", "return"]
    backend = hugging_face(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def word_piece() -> Backend:
    words = ["[UNK]", *MARKERS, *CHARACTERS, *[f"##{character}" for character in CHARACTERS]]
    backend = hugging_face(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def unigram() -> Backend:
    # As in converted T5 models: the markers have the best scores of all.
    pieces = [
        ("<unk>", 0.0),
        *[(marker, 0.0) for marker in MARKERS],
        *[(c, -9.0) for c in CHARACTERS],
        ("return", -4.0),
    ]
    backend = hugging_face(models.Unigram(pieces, 0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


HUGGING_FACE: dict[str, Callable[[], Backend]] = {
    "byte level": lambda: byte_level(use_regex=True, ignore_merges=False),
    "byte level, whole words": lambda: byte_level(use_regex=False, ignore_merges=True),
    "words": word_level,
    "word pieces": word_piece,
    "unigram": unigram,
}
SENTENCEPIECE = {
    "sentencepiece bpe": ("bpe", False),
    "sentencepiece bpe, bytes": ("bpe", True),
    "sentencepiece unigram": ("unigram", False),
    "sentencepiece unigram, bytes": ("unigram", True),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = {}
    for name in (*HUGGING_FACE, *SENTENCEPIECE):
        directory = tmp_path_factory.mktemp("tokenizer")
        if name in HUGGING_FACE:
            HUGGING_FACE[name]().save(str(directory / "tokenizer.json"))
        else:
            (directory / "tokenizer.model").write_bytes(sentencepiece_model(*SENTENCEPIECE[name]))
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "!"}))
        made[name] = load_tokenizer(directory)
    return made


def texts() -> st.SearchStrategy[str]:
    parts = st.sampled_from(
        [*MARKERS, *ORDINARY, "<ctrl>", "<unk>", "\uff1cs\uff1e", "return", " ", "\n", "a", "FI", "M"]
    )
    return st.lists(st.one_of(parts, st.text(max_size=5)), max_size=12).map("".join)


@pytest.mark.parametrize("name", [*HUGGING_FACE, *SENTENCEPIECE])
def test_a_marker_in_a_text_is_ordinary_text(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.eos_id in tokenizer.control_ids
    if name in HUGGING_FACE:
        for marker in MARKERS:
            assert tokenizer.backend.token_to_id(marker) in tokenizer.control_ids  # the test would show nothing else
    else:
        symbols = {tokenizer.processor.piece_to_id(marker) for marker in MARKERS}
        assert symbols <= tokenizer.control_ids
        assert tokenizer.control_ids & set(tokenizer.processor.encode("a".join(MARKERS)))  # the library's own answer
    for marker in MARKERS:
        for text in (marker, f"a {marker} b", f"{marker}{marker}\n", f"first{marker}second"):
            ids = tokenizer.encode(text)
            assert ids
            assert tokenizer.control_ids.isdisjoint(ids)


@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_no_text_becomes_a_control_token(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.control_ids.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", ["byte level", "byte level, whole words", "sentencepiece bpe, bytes"])
def test_markers_come_back_exactly_and_runs_of_spaces_stay_one_token(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    text = "\n\n".join(MARKERS)
    if name in SENTENCEPIECE:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for symbol in ORDINARY:
        if name in SENTENCEPIECE:
            assert tokenizer.encode(symbol) == tokenizer.processor.encode(symbol)
        else:
            assert tokenizer.encode(symbol) == [tokenizer.backend.token_to_id(symbol)]


def test_what_counts_as_text() -> None:
    assert all(map(is_ordinary_text, [" ", "\u2581\u2581", "\n\t", "!", "\u00f5", "7"]))
    assert not any(map(is_ordinary_text, ["", "<a>", "[INST]", "word", "\u0003", "\ue000"]))


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("named", [["<a>", {"content": "<b>"}], {"one": "<a>", "two": {"content": "<b>"}}])
def test_tokens_that_any_version_of_transformers_calls_special_are_named(key: str, named: object) -> None:
    assert list(named_tokens({"eos_token": "</s>", key: named})) == ["</s>", "<a>", "<b>"]


def test_a_tokenizer_that_ends_documents_with_its_unknown_token_refuses_unknown_characters(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("known known") == [1, 1]
    with pytest.raises(InputError, match="the end of a document"):
        tokenizer.encode("known stranger")


def test_a_character_without_any_token_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<e>": 0, "known": 1}, unk_token="<none>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    with pytest.raises(InputError, match="every character"):
        load_tokenizer(tmp_path).encode("stranger")


def test_other_files_named_tokenizer_model_are_told_apart() -> None:
    model = sentencepiece_model("bpe", byte_fallback=False)
    assert describe_other_kind(model) is None
    for size in range(0, len(model) - 1, 997):
        assert describe_other_kind(model[:size]) is not None, size
    for content, found in (
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"", "no whole sentencepiece model"),
        (b"{}", "no sentencepiece model"),
    ):
        assert found in str(describe_other_kind(content))


def test_changed_pieces_keep_all_ids() -> None:
    model = sentencepiece_model("unigram", byte_fallback=True)
    symbols = user_defined_symbols(model)
    before = SentencePieceProcessor(model_proto=model)
    last = before.vocab_size() - 1
    after = SentencePieceProcessor(model_proto=with_control_pieces(model, [*symbols, last]))
    pieces = [[each.id_to_piece(token) for token in range(last + 1)] for each in (before, after)]
    assert pieces[0] == pieces[1]
    assert {token: pieces[0][token] for token in symbols} == symbols
    assert all(after.is_control(token) for token in [*symbols, last])
    assert before.encode("return first") == after.encode("return first")
    assert with_control_pieces(model, []) == model
