"""Whatever a text holds, it is only read: as one line of a message, and as text of a page."""

import html
import json
import pickle

import pytest

from ebft_mega.config.yaml_source import read_yaml, write_yaml
from ebft_mega.errors import (
    CheckpointError,
    DamagedDataError,
    EbftError,
    InputError,
    Problem,
    SkipBudgetError,
)
from ebft_mega.io.durable import write_json
from ebft_mega.shown_text import escaped, shown, shown_html, without_secrets
from tests.unit.hostile import TEXTS, dangers

hostile = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


@hostile
def test_shown_is_one_harmless_line(text):
    line = shown(text)
    assert dangers(line) == set() and len(line.splitlines()) == 1
    assert shown(line) == line


@hostile
def test_only_what_is_meant_stays(text):
    assert dangers(escaped(text, meant="\n\t"), "\n\t") == set()
    assert escaped(text, meant="\n\t").count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語\u3000テキスト", "עברית", "हिन्दी", "emoji 🙂", "a\\b", r"\u001b", "a b"]
)
def test_letters_of_all_scripts_stay_readable(text):
    assert shown(text) == text


def test_escapes_are_those_of_json():
    every = "".join(character for character in map(chr, range(0xD800)) if character not in '"\\')
    assert json.loads(f'"{escaped(every)}"') == every
    assert escaped("\x1b\x7f\x9b\n\r\t\u202e\U000e0041\udcff") == r"\u001b\u007f\u009b\n\r\t\u202e\U000e0041\udcff"


@pytest.mark.parametrize("character", ["x", "\n", "\x1b", "\u202e", "日"])
@pytest.mark.parametrize("length", [0, 1, 5, 39, 40, 41, 200, 5000])
def test_a_line_has_a_greatest_length_and_says_what_it_lacks(character, length):
    line = shown(character * length, longest=40)
    assert len(line) <= 40 and shown(line, longest=40) == line
    escape = escaped(character)
    if length * len(escape) <= 40:
        assert line == escape * length
    else:
        head, _, rest = line.partition("… (")
        left_out = int(rest.removesuffix(" more characters)"))
        assert head == escape * (length - left_out)


def test_a_long_text_is_not_escaped_whole():
    assert len(shown("\x1b" * 50_000_000)) <= 200  # a second per ten million otherwise


@hostile
def test_html_shows_the_text_itself(text):
    shown_as = shown_html(text)
    assert not set(shown_as) & set("<>\"'") and dangers(shown_as, "\n\t") == set()
    assert html.unescape(shown_as) == escaped(text, meant="\n\t")


@hostile
@pytest.mark.parametrize("field", ["where", "key", "found", "expected", "suggestion"])
def test_a_problem_is_one_harmless_line(text, field):
    problem = Problem(
        **{"where": "a.yaml:1", "key": "k", "found": "f", "expected": "e", "suggestion": "s"} | {field: text}
    )
    assert dangers(str(problem)) == set()
    assert len(str(InputError([problem, problem])).splitlines()) == 2


def test_a_problem_is_not_longer_than_anybody_reads():
    text = str(Problem("a.yaml:1", "key", repr("x" * 10**7), "y" * 10**7, "z" * 10**7))
    assert len(text) < 7000 and text.count("more characters") == 3


@hostile
@pytest.mark.parametrize("kind", [EbftError, CheckpointError, SkipBudgetError])
def test_an_error_is_one_harmless_line(text, kind):
    error = kind(f"step 1: {text}")
    assert dangers(str(error)) == set() and str(error).startswith("step 1: ")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@hostile
def test_damaged_data_is_one_harmless_line(text):
    assert dangers(str(DamagedDataError(text, 1, text, text, 2))) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:s3cret@host/a", "https://***@host/a"),
        ("https://s3cret@host:8443", "https://***@host:8443"),
        ("http://a@b:s3cret@host", "http://***@host"),
        ("https://host/a?signature=s3cret&until=1#x", "https://host/a?***"),
        ("{'a': 'https://u:s3cret@h?k=s3cret', 'b': 1}", "{'a': 'https://***@h?***', 'b': 1}"),
        ("--set=data.shards=https://u:s3cret@h/x y", "--set=data.shards=https://***@h/x y"),
        ("https://host/mail@example", "https://host/mail@example"),
        ("why? a@b", "why? a@b"),
    ],
)
def test_secrets_of_addresses_are_not_shown(text, expected):
    assert without_secrets(text) == shown(text) == expected
    assert without_secrets(expected) == expected


@pytest.mark.parametrize("padding", range(150, 210, 5))
def test_a_secret_is_masked_before_the_text_is_cut(padding):
    assert "s3" not in shown("x" * padding + " https://user:s3cret-s3cret-s3cret@host/a?s3cret")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["://", "a://a", "://a?", "://@", "?", "@"])
def test_masking_takes_no_longer_for_hostile_texts(part):
    without_secrets(part * 200_000)


@hostile
def test_a_written_configuration_is_letters_and_is_read_back_alike(text):
    written = write_yaml({"key": text, "letters": "日本語"})
    assert dangers(written, "\n") == set()
    read = read_yaml(written, "a.yaml", 100)
    assert not read.problems and read.value == {"key": text, "letters": "日本語"}


@hostile
def test_written_json_is_ascii(tmp_path, text):
    write_json(tmp_path / "a.json", {text: text})
    content = (tmp_path / "a.json").read_bytes()
    assert content.isascii() and dangers(content.decode(), "\n\x7f") == set() and json.loads(content) == {text: text}
