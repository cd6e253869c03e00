import json
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.text_limits import TextLimits
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.data.tokenizers.tokenizer import copy_tokenizer, load_tokenizer, parse_definition, tokenizer_sha256
from ebft_mega.data.tokenizers.tokenizer_training import RoundTripError, split_into_chunks, train_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.process_signals import StopNow

HARD_TEXTS = [
    "",
    " ",
    "  two leading spaces, two trailing  ",
    "\n\n\t\tdef f():\r\n\treturn '\\t'\r",
    "a\0b\0",
    "<s></s><unk><pad><0x0A><|endoftext|><|fim_prefix|>[MASK]",
    "\u2581meta\u2581\u2581space \u2581",
    "\u2585\ufffd\ufeff\u200b\u2028\x85\x0b\x0c",
    "caf\u00e9 cafe\u0301 \u6f22\u5b57 \U0001f600\u200d\U0001f525 \U0010ffff",
    "x" * 5000 + "\n" * 50 + " " * 1000,
]


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def directory(request: pytest.FixtureRequest, tokenizer_directory: Path, hugging_face_directory: Path) -> Path:
    return {"sentencepiece": tokenizer_directory, "hugging_face": hugging_face_directory}[request.param]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_round_trip_without_special_ids(directory: Path, text: str) -> None:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.gives_back(ids, text) and not tokenizer.gives_back(ids, text + " ")
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@settings(max_examples=150)
@given(text=st.text())
def test_any_text_round_trips(tokenizer_directory: Path, hugging_face_directory: Path, text: str) -> None:
    for directory in (tokenizer_directory, hugging_face_directory):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_in_text_never_become_their_ids(hugging_face_directory: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_directory)
    marker = json.loads((hugging_face_directory / "tokenizer.json").read_text())["added_tokens"][-1]
    assert (marker["content"], marker["special"]) == ("<|fim_prefix|>", False)
    assert marker["id"] not in tokenizer.encode("a<|fim_prefix|>b")
    assert tokenizer.decode([marker["id"]]) == "<|fim_prefix|>"
    assert tokenizer.vocab_size == marker["id"] + 1


def test_special_ids(tokenizer_directory: Path, hugging_face_directory: Path) -> None:
    assert load_tokenizer(tokenizer_directory).eos_id == 1
    assert load_tokenizer(hugging_face_directory).eos_id == 0
    assert json.loads((tokenizer_directory / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_transformers_reads_a_trained_tokenizer_alike(tokenizer_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    copy_tokenizer(tokenizer_directory, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = load_tokenizer(tokenizer_directory)
    for text in ("def f():\n    return 12\n", "  \ttwo  spaces caf\u00e9\n\n"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id


def test_hash_follows_the_tokenizer_and_not_its_place(directory: Path, tmp_path: Path) -> None:
    copy_tokenizer(directory, tmp_path / "copy")
    assert tokenizer_sha256(tmp_path / "copy") == tokenizer_sha256(directory) == load_tokenizer(directory).sha256
    assert load_tokenizer(tmp_path / "copy").encode("def f()") == load_tokenizer(directory).encode("def f()")
    main_file = next(path for path in (tmp_path / "copy").iterdir() if "config" not in path.name)
    main_file.write_bytes(main_file.read_bytes() + b" ")
    assert tokenizer_sha256(tmp_path / "copy") != tokenizer_sha256(directory)
    assert tokenizer_sha256(tmp_path) is None


def test_hash_imports_no_tokenizer_library(tokenizer_directory: Path) -> None:
    program = (
        "import sys; from ebft_mega.data.tokenizers.tokenizer import tokenizer_sha256\n"
        f"print(tokenizer_sha256({str(tokenizer_directory)!r}))\n"
        "assert not {'torch', 'transformers', 'sentencepiece', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer_sha256(tokenizer_directory)


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path: Path, hugging_face_directory: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    shutil.copyfile(hugging_face_directory / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(InputError, match="eos_token.*<none>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="model"):
        load_tokenizer(tmp_path)


@given(st.text(alphabet=st.sampled_from("ab \n\r\t\u2028"), max_size=300), st.integers(0, 9000))
def test_chunks_join_to_the_text(text: str, padding: int) -> None:
    chunks = list(split_into_chunks(text + "x" * padding + text))
    assert "".join(chunks) == text + "x" * padding + text
    assert all(0 < len(chunk) <= 3500 for chunk in chunks)


def test_training_is_deterministic_and_learns_long_tokens(
    text_directory: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    again = train_tokenizer(text_directory, 340, tmp_path / "again")
    assert again.sha256 == tokenizer_sha256(tokenizer_directory)
    assert again.vocab_size == 340
    text = "    return first + second\n"
    assert len(again.encode(text)) <= len(text) / 2


def test_json_lines_that_a_tokenizer_is_trained_on_are_pointed_out(
    text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(text_directory, tmp_path / "source"))
    (source / "dump.json").write_text('{"text": "one"}\n')
    train_tokenizer(source, 400, tmp_path / "out")
    assert "JSONL or tar files that are read as one text each: 1" in capsys.readouterr().err


def test_training_reads_what_is_chosen(
    text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text"
    shutil.copytree(text_directory, source)
    (source / "vendor").mkdir()
    (source / "vendor" / "latin.py").write_bytes(b"# caf\xe9\n")
    (source / "signs.py").write_text("-+" * 100)
    (source / ".gitignore").write_text("ignored.py\n")
    (source / "ignored.py").write_text("# not read\n" * 50)
    chosen = train_tokenizer(
        source,
        340,
        tmp_path / "chosen",
        files=FileChoice(exclude=("vendor/", "*.rs")),
        uses_gitignore=True,
        limits=TextLimits(min_alphanumeric=0.1),
    )
    assert chosen.sha256 == train_tokenizer(text_directory, 340, tmp_path / "alone").sha256
    said = capsys.readouterr().err
    for words in (
        "files that .gitignore names: 1, folders that --exclude names: 1, hidden files: 1",
        "left out: documents under --min-alphanumeric: 1",
        "note: --exclude '*.rs': nothing matches",
    ):
        assert words in said
    with pytest.raises(InputError, match=r"latin\.py:1: text: found byte 0xe9"):
        train_tokenizer(source, 340, tmp_path / "no")
    latin = ReadOptions(encoding_fallback="latin-1")
    train_tokenizer(source, 340, tmp_path / "latin", read=latin)
    assert "read as what --encoding-fallback says: latin-1: 1" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"are read: --min-document-bytes left out everything \(left out: documents"):
        train_tokenizer(source / "vendor", 340, tmp_path / "no", limits=TextLimits(9), read=latin)


def test_a_vocabulary_beyond_the_text_names_the_largest(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    (source / "a.py").write_text("def a(b):\n    return [b, b + 1, 'word']\n" * 3)
    message = r"--vocab-size: found 512; expected at most 3\d\d: this text gives 3\d\d different tokens"
    with pytest.raises(InputError, match=message) as no:
        train_tokenizer(source, 512, tmp_path / "no")
    largest = int(str(no.value).split("at most ")[1].split(":")[0])
    assert train_tokenizer(source, largest, tmp_path / "out").vocab_size == largest
    (source / "a.py").write_text("a")
    with pytest.raises(InputError, match=r"expected more text \(for 300\): this text gives 2\d\d different tokens"):
        train_tokenizer(source, 300, tmp_path / "no")


def test_training_input_that_cannot_be_used_is_refused(tmp_path: Path, text_directory: Path) -> None:
    with pytest.raises(InputError, match="at least"):
        train_tokenizer(text_directory, 256, tmp_path / "out")
    with pytest.raises(InputError, match="--vocab-size"):
        train_tokenizer(text_directory, 100_000, tmp_path / "out")
    with pytest.raises(InputError, match="no such directory"):
        train_tokenizer(tmp_path / "absent", 400, tmp_path / "out")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "one.py").write_bytes(b"ok\n\xff")
    (bad / "two.py").write_bytes(b"\xfe")
    with pytest.raises(InputError) as caught:
        train_tokenizer(bad, 400, tmp_path / "out")
    assert "one.py:2" in str(caught.value)
    assert "two.py:1" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_choice_that_leaves_nothing_to_train_on_is_named(text_directory: Path, tmp_path: Path) -> None:
    choice = FileChoice(exclude=("*",))
    with pytest.raises(InputError, match=r"--exclude left out everything \(left out: folders that --exclude nam"):
        train_tokenizer(text_directory, 340, tmp_path / "out", files=choice)
    with pytest.raises(InputError, match=r"no file that matches '\*\.rs' \(left out: files with other names: 30\)"):
        train_tokenizer(text_directory, 340, tmp_path / "out", files=FileChoice("*.rs"))
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=f"{file}: found no directory; expected a directory of text files"):
        train_tokenizer(file, 340, tmp_path / "out")


def test_a_text_that_does_not_round_trip_fails_the_training(
    text_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebft_mega.data.tokenizers.tokenizer import SentencePieceTokenizer

    decode = SentencePieceTokenizer.decode
    monkeypatch.setattr(SentencePieceTokenizer, "decode", lambda self, ids: decode(self, ids).replace("# 7\n", "# 8\n"))
    with pytest.raises(RoundTripError, match=r"module_07\.py") as caught:
        train_tokenizer(text_directory, 340, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert "module_08" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strange", [lambda size: size, lambda size: size + 10**12, lambda size: -1])
def test_an_id_without_a_token_becomes_a_replacement_character(directory: Path, strange) -> None:
    """Models have more rows than their tokenizer has tokens: padding, or tokens that were to be added."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("return 12")
    stray = strange(tokenizer.vocab_size)
    assert tokenizer.decode([stray]) == "\ufffd"
    assert tokenizer.decode([*ids, stray, stray]) == "return 12\ufffd\ufffd"
    assert tokenizer.decode([stray, *ids, stray, *tokenizer.encode(" 12"), *ids]) == "\ufffdreturn 12\ufffd 12return 12"


def test_a_hole_in_a_vocabulary_becomes_a_replacement_character(hugging_face_directory: Path, tmp_path: Path) -> None:
    copy_tokenizer(hugging_face_directory, tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    token, hole = max(vocabulary.items(), key=lambda item: item[1])
    vocabulary[token] = hole + 10_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    before = load_tokenizer(hugging_face_directory).decode([hole])
    assert load_tokenizer(tmp_path).decode([hole, hole + 10_000, hole]) == f"\ufffd{before}\ufffd"


def test_a_panic_of_the_library_is_bad_input_and_a_request_to_stop_is_not(monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    def load_that_raises(error):
        def load(text):
            raise error

        monkeypatch.setattr("tokenizers.Tokenizer", types.SimpleNamespace(from_str=load))

    for error in (panic("index out of range"), ValueError("junk")):
        load_that_raises(error)
        with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
            parse_definition("{}")
    for error in (StopNow(signal.SIGTERM), KeyboardInterrupt(), MemoryError()):
        load_that_raises(error)
        with pytest.raises(type(error)):
            parse_definition("{}")


def test_no_text_outside_of_the_input_is_trained_on(
    text_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(text_directory, tmp_path / "source"))
    (tmp_path / "secret.py").write_text("\u03a9\u03a9\u03a9 " * 500)
    (source / "linked.py").symlink_to("../secret.py")
    tokenizer = train_tokenizer(source, 400, tmp_path / "out")
    said = capsys.readouterr().err
    assert "left out: links that leave the input: 1" in said and "are not followed: copy what they lead to" in said
    assert len(tokenizer.encode("\u03a9")) > 1  # its bytes


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 300), max_size=12))
def test_the_bytes_of_any_tokens_are_what_the_library_decodes(byte_level_directory: Path, ids: list[int]) -> None:
    tokenizer = load_tokenizer(byte_level_directory)
    known = [token for token in ids if token in tokenizer.known_ids]
    in_a_row = b"".join(map(tokenizer.token_bytes.__getitem__, known))
    assert in_a_row.decode("utf-8", "replace") == tokenizer.decode(known)
    assert tokenizer.gives_back(known, tokenizer.decode(known))


@pytest.fixture(scope="module")
def byte_level_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes, a few merges and added tokens, of which some are no names of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate([*letters, "de"])}, [("d", "e")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_tokens([AddedToken(text) for text in ("    ", "\n\n", "\u6f22 \u5b57", "<|end|>", "caf\u00e9")])
    directory = tmp_path_factory.mktemp("byte-level")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return directory


def test_a_tokenizer_that_changes_its_text_does_not_give_it_back(byte_level_directory: Path, tmp_path: Path) -> None:
    definition = json.loads((byte_level_directory / "tokenizer.json").read_text())
    changed = shutil.copytree(byte_level_directory, tmp_path / "changed")
    (changed / "tokenizer.json").write_text(json.dumps(definition | {"normalizer": {"type": "Lowercase"}}))
    tokenizer = load_tokenizer(changed)
    assert not tokenizer.gives_back(tokenizer.encode("Def"), "Def") and tokenizer.gives_back(tokenizer.encode("d"), "d")
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = {"type": "Sequence", "decoders": [definition["decoder"], strip]}
    (changed / "tokenizer.json").write_text(json.dumps(definition | {"decoder": steps}))
    tokenizer = load_tokenizer(changed)
    assert tokenizer.token_bytes is None and not tokenizer.gives_back(tokenizer.encode(" d"), " d")
