"""The search for input that a parser neither takes nor refuses, and that it would find such a parser."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ebft_mega.apps.fuzzing.campaign import Tally, changed_files
from ebft_mega.apps.fuzzing.fuzzed_parsers import PARSERS
from ebft_mega.apps.fuzzing.summary import verdict

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "fuzz.py"


def fuzz(*options: str, timeout: float = 300.0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def figures(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in output.splitlines()[1:]}


def require_clean(found: subprocess.CompletedProcess, cases: int) -> None:
    assert found.returncode == 0, found.stdout + found.stderr[-5000:]
    assert "Traceback" not in found.stderr
    assert f"{cases} cases of each of {len(PARSERS)} parsers, seed " in found.stderr.splitlines()[-1]
    assert found.stderr.endswith(": all read or refused\n")
    by_parser = figures(found.stdout)
    assert list(by_parser) == [parser.name for parser in PARSERS]
    for name, (number, share, *_) in by_parser.items():
        assert int(number) == cases and int(share.rstrip("%")) >= 33, name


def test_five_hundred_hostile_files_of_every_kind_are_read_or_refused():
    require_clean(fuzz("--cases", "500", "--seed", "0"), 500)


@pytest.mark.slow
def test_twenty_thousand_hostile_files_of_every_kind_are_read_or_refused():
    require_clean(fuzz("--cases", "20000", "--seed", "1", "--processes", "2", timeout=5400.0), 20_000)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_case_is_a_pure_function_of_parser_seed_and_number(parser):
    valid = dict(parser.files())
    assert dict(parser.files()) == valid
    cases = [changed_files(parser, valid, 3, number) for number in range(20)]
    assert cases == [changed_files(parser, valid, 3, number) for number in range(20)]
    assert cases != [changed_files(parser, valid, 4, number) for number in range(20)]
    assert sum(case != {name: valid[name] for name in case} for case in cases) > 10


PLANTED = """
    import sys, tempfile, time
    from pathlib import Path
    from random import Random
    from ebft_mega.apps.fuzzing import campaign
    from ebft_mega.apps.fuzzing.fuzzed_parsers import FuzzedParser
    from ebft_mega.apps.fuzzing.watched_writes import WatchedWrites
    from ebft_mega.io.input_errors import bad_input

    outside = Path(sys.argv[1])
    held = []

    def refuses(content): raise bad_input("file", "key", "this", "that")
    def raises(content): raise KeyError("planted")
    def hangs(content):
        try:
            time.sleep(30)
        except Exception:
            pass
    def panics(content): raise type("PanicException", (BaseException,), {})("planted")
    def writes(content): (outside / "owned").write_bytes(content)
    def renames(content): outside.rename(outside.with_name("renamed"))
    def starts(content): __import__("os").system("true")
    def grows(content): held.append(bytearray(b"x") * (600 * 2**20))

    class Loud(campaign.InputProblems):
        def __str__(self): return "\\x1b[31m"
    def shouts(content): raise Loud([])

    watch = WatchedWrites()
    for act in (len, refuses, raises, hangs, panics, writes, renames, starts, shouts, grows):
        campaign.SLOW_SECONDS = 0.5 if act is hangs else 60.0
        def read(directory, act=act):
            content = (directory / "a").read_bytes()
            if content != b"valid":
                act(content)
        change = {"a": lambda random, content: content + b"!"}
        parser = FuzzedParser("planted", lambda: {"a": b"valid"}, change, bool, read)
        with tempfile.TemporaryDirectory() as scratch:
            tally = campaign.run_cases(parser, 0, range(1), Path(scratch), watch)
        found = tally.failures[0].what if tally.failures else f"{tally.accepted} read, {tally.refused} refused"
        print(act.__name__, "->", found)
"""


def test_a_parser_that_neither_takes_nor_refuses_is_found(tmp_path):
    # What held much memory before it became this program must not hide what the program itself takes.
    large = "import os, sys; b'x' * (700 * 2**20); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", large, "-c", textwrap.dedent(PLANTED), str(tmp_path / "outside")]
    (tmp_path / "outside").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" -> ") for line in done.stdout.splitlines())
    assert found["len"] == "1 read, 0 refused" and found["refuses"] == "0 read, 1 refused"
    assert found["raises"].startswith("KeyError: \"'planted'\" at ") and found["panics"].startswith("PanicException: ")
    assert found["hangs"].startswith("it took more than ")
    assert found["writes"].startswith("written elsewhere: open ") and "owned" in found["writes"]
    assert found["renames"].startswith("written elsewhere: os.rename ")
    assert found["starts"].startswith("written elsewhere: os.system ")
    assert found["shouts"].startswith("a message that cannot be shown: ")
    assert found["grows"].startswith("peak memory grew by ")


def test_the_files_of_a_case_are_saved_and_one_case_is_run_again(tmp_path):
    found = fuzz("--parser", "state", "--only", "3", "--output", str(tmp_path / "out"))
    assert found.returncode == 0 and figures(found.stdout)["state"][0] == "1"
    assert found.stderr.startswith("state: case 3 of seed 0: re")
    assert not (tmp_path / "out").exists()  # it did not fail


def test_a_good_search_ends_with_what_became_of_its_cases():
    two = [Tally("state", cases=100), Tally("tar", cases=100)]
    assert verdict(two, 3, None) == ["100 cases of each of 2 parsers, seed 3: all read or refused"]
    assert verdict(two[1:], 3, None) == ["100 cases of tar, seed 3: all read or refused"]
    one = [Tally("state", 1, accepted=1), Tally("tar", 1, refused=1, last_refusal="a: wrong\nb: wrong")]
    read, refused = verdict(one, 0, 17)
    assert read == "state: case 17 of seed 0: read"
    assert refused == "tar: case 17 of seed 0: refused: a: wrong; b: wrong"


def test_help_and_errors_list_the_parsers_once():
    shown = fuzz("--help").stdout
    for found in (shown, fuzz("--parser", "none").stderr):
        assert all(found.count(name) == 1 for name in ("describing-files", "json-lines", "status-and-lock"))
    assert all(word in shown for word in ("`past syntax`", "512 MB", "started a program"))
