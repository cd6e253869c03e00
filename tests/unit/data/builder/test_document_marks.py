"""Which tokens end and begin a document, and what a build and a run say of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.store.format import fingerprint
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.verify import verify_dataset
from ebft_mega.data.tokenizers.document_marks import added_begin
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import InputError

ROOT = Path(__file__).resolve().parents[4]
SPELLED = "x = '<|fim_prefix|>' + '<|endoftext|>'\n"
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|fim_prefix|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.fixture
def with_begin(hugging_face_directory: Path, tmp_path: Path) -> Path:
    """The tokenizer, whose configuration names a token for the begin of a document, too."""
    directory = Path(shutil.copytree(hugging_face_directory, tmp_path / "with-begin"))
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|fim_prefix|>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("kind", ["marker", "word", "sentencepiece word"])
def test_a_chosen_end_is_a_control_token_and_its_spelling_stays_text(
    kind: str, hugging_face_directory: Path, tokenizer_directory: Path
) -> None:
    directory = tokenizer_directory if kind == "sentencepiece word" else hugging_face_directory
    usual = load_tokenizer(directory)
    word = "<|fim_prefix|>"
    if kind != "marker":  # one that a text becomes, unless it ends documents
        words = map(usual.spelling, range(259, 320))
        word = next(word for word in words if word.isascii() and word.isalpha() and len(usual.encode(word)) == 1)
    chosen = load_tokenizer(directory, word)
    assert chosen.eos_id != usual.eos_id and chosen.eos_id == load_tokenizer(directory, str(chosen.eos_id)).eos_id
    assert chosen.control_ids == usual.control_ids | {chosen.eos_id} and chosen.identity != usual.identity
    text = f"{word} {SPELLED}{word}"
    ids = chosen.encode(text)
    assert not chosen.control_ids & set(ids) and chosen.decode(ids) == text and chosen.gives_back(ids, text)


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("<|fim_prefx|>", "tokens", "nearest: '<|fim_prefix|>'"),
        ("def f(x)", "tokens", "special tokens: '<|endoftext|>'"),
        ("", "0 tokens", "one token, or an id"),
        ("999999", "the id 999999", "the id of a token, at most"),
        ("9" * 5000, "the id 9999", "the id of a token, at most"),
    ],
)
def test_an_end_that_is_no_token_is_refused_with_the_nearest(
    hugging_face_directory: Path, text: str, found: str, expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(hugging_face_directory, text)
    (problem,) = caught.value.problems
    assert problem.key == "--end-of-document" and found in problem.found and expected in problem.expected


@pytest.mark.parametrize("token", ["<0x41>", "<unk>", "65"])
def test_bytes_and_unknown_characters_end_no_document(tokenizer_directory: Path, token: str) -> None:
    with pytest.raises(InputError, match="--end-of-document"):
        load_tokenizer(tokenizer_directory, token)


@pytest.mark.parametrize("processes", [1, 2])
def test_documents_that_begin_with_a_token_of_their_own(with_begin: Path, tmp_path: Path, processes: int) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    texts = [SPELLED, "second = 2\n", "third\n"]
    for number, text in enumerate(texts):
        (source / f"{number}.py").write_text(text)
    options = BuildOptions(work_unit_bytes=8)
    tokenizer = load_tokenizer(with_begin, None, True)
    made = build_dataset(source, tokenizer, tmp_path / "begun", options, processes=processes)
    usual = build_dataset(source, load_tokenizer(with_begin), tmp_path / "usual", options)
    assert (made.manifest.version, made.manifest.bos_id) == (2, tokenizer.bos_id)
    assert made.manifest.tokens == usual.manifest.tokens + 3
    assert made.record.tokenizer["begin_of_document"] == tokenizer.bos_id and not made.record.not_round_trip
    dataset, without = open_dataset(tmp_path / "begun"), open_dataset(tmp_path / "usual")
    for number, text in enumerate(texts):
        begin, *tokens = dataset.tokens(number).tolist()
        assert begin == tokenizer.bos_id and tokens == without.tokens(number).tolist()
        assert tokenizer.decode(tokens) == text and begin not in tokens
    assert not [finding for report in verify_dataset(dataset) for finding in report.problems]
    # Without it nothing is new: no key, the old version, and so the fingerprint of builds before.
    fields = json.loads((tmp_path / "usual" / "dataset.json").read_text())
    assert "bos_id" not in fields and fields["version"] == 1 and fingerprint(fields) == fields["fingerprint"]
    (note,) = usual.record.notes
    assert "'<|fim_prefix|>'" in note and "--add-bos" in note and not made.record.notes


def test_a_manifest_says_in_its_version_whether_documents_have_a_begin(with_begin: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a = 1"}\n')
    build_dataset(tmp_path / "a.jsonl", load_tokenizer(with_begin, None, True), tmp_path / "begun")
    path = tmp_path / "begun" / "dataset.json"
    fields = json.loads(path.read_text())
    for changes, words in (
        ({"version": 1}, "none in version 1"),
        ({"bos_id": None}, "a token id in version 2"),
        ({"bos_id": fields["vocab_size"]}, "below vocab_size"),
        ({"version": 3}, "newer"),
    ):
        changed = fields | changes
        path.write_text(json.dumps(changed | {"fingerprint": fingerprint(changed)}))
        with pytest.raises(InputError, match=words):
            open_dataset(tmp_path / "begun")


def test_the_tool_prints_the_end_and_refuses_a_begin_that_there_is_not(
    hugging_face_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a = 1"}\n')
    command = [sys.executable, "tools/build_shards.py", "--input", str(tmp_path / "a.jsonl"), "--processes", "1"]
    command += ["--tokenizer", str(hugging_face_directory), "--output", str(tmp_path / "o")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=60)

    refused = run("--add-bos")
    assert refused.returncode == 2 and "no token for the begin of a document" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "o").exists()
    done = run("--end-of-document", "<|fim_prefix|>")
    assert done.returncode == 0 and "end of document: 320 '<|fim_prefix|>'" in done.stderr + done.stdout
    assert json.loads((tmp_path / "o" / "dataset.json").read_text())["eos_id"] == 320


@pytest.mark.parametrize(
    ("config", "definition", "begin"),
    [
        ({}, {}, None),
        ({"bos_token": "<s>"}, None, None),
        ({"bos_token": "<s>", "add_bos_token": True}, None, "<s>"),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, {}, "<s>"),
        ({"add_bos_token": False}, {"post_processor": TEMPLATE}, None),
        ({"add_bos_token": True}, {"post_processor": TEMPLATE}, "<|fim_prefix|>"),
        ({"bos_token": "<s>"}, {"post_processor": {"type": "ByteLevel"}}, None),
        ({}, {"post_processor": TEMPLATE}, "<|fim_prefix|>"),
        ({}, {"post_processor": {"processors": [{"type": "ByteLevel"}, TEMPLATE]}}, "<|fim_prefix|>"),
        ({"tokenizer_class": "LlamaTokenizer"}, None, "<s>"),
        ({"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}, None, "<bos>"),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, None, None),
        ({"tokenizer_class": 7, "bos_token": []}, {"post_processor": {"single": [], "processors": [1]}}, None),
    ],
)
def test_what_a_tokenizer_puts_before_a_text(config: dict[str, object], definition: object, begin: str | None) -> None:
    values = {"tokenizer_config.json": config} | ({} if definition is None else {"tokenizer.json": definition})
    assert added_begin(values) == begin
