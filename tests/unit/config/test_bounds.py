"""Configurations that are no honest ones: too large, too deep, no files. Each is refused at once, in one short line."""

import os
import time

import pytest

from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.overrides import MAX_OVERRIDES, replace_overrides
from ebft_mega.config.section_values import MAX_EXPLAINED
from ebft_mega.config.yaml_source import (
    MAX_DEPTH,
    MAX_KEY_CHARACTERS,
    MAX_TEXT_BYTES,
    MAX_VALUES,
    MAX_WRITTEN_VALUES,
    plain_scalar,
    read_yaml,
)
from ebft_mega.errors import ConfigError

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 5}
"""
FULL = MAX_TEXT_BYTES - len(BASE) - 64
SOME = FULL // 8
MOST_SECONDS = 4  # ten times what the slowest of these takes


def problems(path, *overrides):
    """The problems of a file, and that they were found in no time (of this process) and said in few words."""
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert time.process_time() - began < MOST_SECONDS
    lines = [str(problem) for problem in caught.value.problems]
    assert max(map(len, lines)) < 1500 + len(str(path)) and len(lines) < 2000
    return lines


def written(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{BASE}a: [{'1,' * (FULL // 2)}]", f"5: (text): found more than {MAX_VALUES} keys and values"),
        (BASE + "".join(f"k{number}:\n" for number in range(6000)), f"found more than {MAX_VALUES} keys"),
        (BASE + "".join(f"k{number}: 1\n" for number in range(1000)), "found 900 more wrong keys and values"),
        (f"{BASE}data: {{}}\nebft: {{{', '.join(f'strid{n}: 1' for n in range(500))}}}", "found 400 more wrong keys"),
        (BASE + "a: " + "[" * SOME, f"found more than {MAX_DEPTH} levels"),
        (BASE + "a: " + "{" * SOME, f"found more than {MAX_DEPTH} levels"),
        (BASE + "a:\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1, 300)), f"more than {MAX_DEPTH} levels"),
        (BASE + "- " * (SOME // 2), "expected <block end>"),
        (BASE + "? " * (SOME // 2), f"found more than {MAX_DEPTH} levels"),
        (BASE + f"? {'k' * SOME}\n: 1", f"found a key of {SOME} characters; expected at most {MAX_KEY_CHARACTERS}"),
        (BASE + f"? {'k' * (FULL // 2)}\n: [{'1,' * (MAX_VALUES - 50)}]", f"expected at most {MAX_KEY_CHARACTERS}"),
        (BASE + f"seed: {'1' * SOME}", "expected an integer from 0"),
        (BASE + f"seed: {'1_' * (SOME // 2)}x", "expected an integer from 0"),
        (BASE + f"seed: 1e{'9' * SOME}", "expected an integer from 0"),
        (BASE + f'seed: "{"x" * SOME}"', "expected an integer from 0"),
        (BASE + f"seed: !<{'x' * SOME}> 1", "found the tag xxx"),
        (BASE + "seed: |\n" + " x\n" * (SOME // 3), "expected an integer from 0"),
        (BASE + "#x\n" * (SOME // 3) + "seed: x", "expected an integer from 0"),
        (BASE + "%X y\n" * (SOME // 5), "(text): found expected '<document start>'"),
        (f"{'x' * SOME}", "c.yaml:1: (file): found 'xxx"),
        (BASE + "seed: a\0b", "c.yaml:5: (text): found the character U+0000; expected text that YAML allows"),
        (BASE + "seed: \x1b[31m", "c.yaml:5: (text): found the character U+001B; expected text that YAML allows"),
        (BASE.encode() + b"seed: \xff", f"found invalid start byte at byte {len(BASE) + 6}; expected UTF-8"),
        (BASE.encode("utf-16"), "expected UTF-8"),
    ],
)
def test_text_that_is_too_much_is_refused_at_once(tmp_path, text, found):
    lines = problems(written(tmp_path, text))
    assert found in "\n".join(lines)[:200_000]


def test_what_a_run_has_written_may_hold_more():
    """The defaults are added to what the file holds; a reader of such a file has its bound, too."""
    text = f"[{'1,' * MAX_VALUES}]"
    assert read_yaml(text, "a").problems and not read_yaml(text, "a", MAX_WRITTEN_VALUES).problems
    assert read_yaml(f"[{'1,' * MAX_WRITTEN_VALUES}]", "a", MAX_WRITTEN_VALUES).problems


@pytest.mark.parametrize("text", ["1" * 400_000 + "x", "1_" * 200_000 + "x", "1." + "1" * 400_000 + "x", "." * 400_000])
def test_no_pattern_of_a_number_takes_quadratic_time(text):
    began = time.process_time()
    assert plain_scalar(text) == text
    assert time.process_time() - began < 1


def test_files_that_are_none_are_refused_unread(tmp_path, monkeypatch):
    huge, pipe = tmp_path / "huge.yaml", tmp_path / "pipe.yaml"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(pipe)
    expected = f"expected a YAML file, of at most {MAX_TEXT_BYTES} bytes"
    assert problems(huge) == [f"{huge}: (file): found {1 << 40} bytes; {expected}"]
    large = written(tmp_path, BASE + "#" + "x" * (12 << 20))
    assert problems(large) == [f"{large}: (file): found {large.stat().st_size} bytes; {expected}"]
    assert problems(pipe) == [f"{pipe}: (file): found a FIFO; expected a YAML file"]
    assert problems(tmp_path) == [f"{tmp_path}: (file): found a directory; expected a YAML file"]
    assert problems("/dev/zero") == ["/dev/zero: (file): found a device; expected a YAML file"]
    (tmp_path / "circle").symlink_to("circle")
    assert "Too many levels of symbolic links" in problems(tmp_path / "circle")[0]
    assert "File name too long" in problems(tmp_path / ("x" * 300))[0]
    assert "found embedded null byte" in problems(f"{tmp_path}/a\0b")[0]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load_config(written(tmp_path, b"\xef\xbb\xbf" + BASE.encode())).train.max_steps == 5


def test_a_file_at_the_limit_is_read_and_what_is_written_of_it_too(tmp_path):
    sources = "".join(f"    s{number}: {{shards: d, weight: 1}}\n" for number in range(1000))
    text = BASE.replace(
        "data: {shards: data/train, sequence_length: 128}", f"data:\n  sequence_length: 128\n  sources:\n{sources}"
    )
    config = load_config(written(tmp_path, text))
    assert len(config.data.sources) == 1000
    assert not read_yaml(resolved_yaml(config), "a", MAX_WRITTEN_VALUES).problems


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["train.lr=1e-5", "train.lr=1e-5"], "--set: train.lr: found this key a second time; expected every key once"),
        (["train.lr=1e-5", "seed=1", " train.lr =2e-5"], "--set: train.lr: found this key a second time"),
        (["train.lr=1e-5", "train={max_steps: 5}"], "--set: train: found a second value for what train.lr=... sets"),
        (["train={max_steps: 5, lr: 1}", "train.lr=2"], "train.lr: found a second value for what train=... sets"),
        (["a=1"] * (MAX_OVERRIDES + 1), f"--set: (all): found {MAX_OVERRIDES + 1} values of"),
        ([f"a=[{'1,' * MAX_TEXT_BYTES}]"], f"expected at most {MAX_OVERRIDES} values of {MAX_TEXT_BYTES} bytes"),
        (
            [f"{'a.' * 60_000}b=1"],
            f"found 60001 levels, 120001 characters; expected a key of at most {MAX_DEPTH} levels",
        ),
        ([f"{'a' * 60_000}=1"], "found 1 levels, 60000 characters"),
        (["x" * 60_000], "found no key=value"),
        (["seed=1\0"], "--set: seed: found the character U+0000"),
        (["seed=\udcff"], "--set: seed: found the character U+DCFF"),
        (["seed=" + "7" * 100_000], "expected an integer from 0"),
        (["seed=" + "[" * 100_000], f"found more than {MAX_DEPTH} levels"),
        ([f"k{number}={number}" for number in range(900)], "found 800 more wrong keys and values"),
    ],
)
def test_overrides_are_bounded_and_none_replaces_another(tmp_path, overrides, found):
    assert any(found in line for line in problems(written(tmp_path, BASE), *overrides))


def test_a_key_inside_what_another_override_sets_is_added_to_it(tmp_path):
    config = load_config(written(tmp_path, BASE), ["train={max_steps: 7}", "train.lr=2", "data.sequence_length=64"])
    assert (config.train.max_steps, config.train.lr, config.data.sequence_length) == (7, 2, 64)


def test_programs_replace_their_users_overrides():
    given = ["train.lr=1", "seed=2", "data.sources.a.weight=1", "data.sourcesx=1"]
    assert replace_overrides(given, ["data.sources=null", "seed=3"]) == [
        *("train.lr=1", "data.sourcesx=1", "data.sources=null", "seed=3")
    ]


def test_every_wrong_key_is_counted(tmp_path):
    lines = problems(written(tmp_path, BASE + "".join(f"k{n}: 1\n" for n in range(MAX_EXPLAINED + 7))))
    assert len(lines) == MAX_EXPLAINED + 1 and "found 7 more wrong keys and values" in "".join(lines)
