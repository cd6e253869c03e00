"""One word for one thing: the words that CONTRIBUTING.md refuses stand nowhere in code, names, tests and docs."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "docs", "ebft_mega", "launcher", "tests", "tools")
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".sbatch", ".html")
# Between two words of a phrase: nothing or an underscore in an identifier; white space in a text, with what a line
# break adds in a comment or in a text that is written in several literals.
GAP = r"""(?:_|\s*["'`*]?\s*\n\s*(?:#\s*|[rf]?["'])?|\s+)"""


@dataclass(frozen=True)
class Exemption:
    """A text with a refused word that stays, and why."""

    text: str  # regular expression
    files: str  # pattern of paths
    reason: str


EXEMPTIONS = (
    Exemption(r"going on after step", "*", "a console line that scripts read"),
    Exemption(r"SentencePiece", "*", "the name of a library and of its classes"),
    Exemption(r"(?i)pieces?", "*data/tokenizers/*tokenizer*.py", "what sentencepiece calls its tokens"),
    Exemption(r'["`]pieces["`]', "*checkpoint/*", "a JSON key of a checkpoint's tensor index"),
    Exemption(r"\n\| [^\n]*\| `[^\n|]*` \|(?=\n)", "CONTRIBUTING.md", "the list itself"),
    Exemption(r"\(`wishes`\)", "CHANGELOG.md", "the former name of a file that moved"),
    Exemption(r"(?s).*", "tests/unit/test_words.py", "examples of refused words"),
)


def refused_words():
    """The last column of CONTRIBUTING's table of words."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("## One word for one thing")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [word for row in rows[1:] if len(row) == 3 for word in re.findall("`([^`]+)`", row[2])]


def pattern_of(words):
    """What finds the words in a text whose compound names have been split; group n is word n."""
    parts = []
    for word in words:
        if word.endswith("…"):  # the beginning of an identifier, in its case
            start = word[:-1].rstrip("_")
            parts.append(rf"(?-i:(?<![A-Za-z0-9_])_?{start}_[{'a-z' if start.islower() else 'A-Z'}])")
        else:
            parts.append(rf"(?<![A-Za-z]){GAP.join(word.split())}(?![A-Za-z])")
    return re.compile("|".join(f"({part})" for part in parts), re.IGNORECASE)


def split_names(text):
    """`HeldOutRows` as `Held_Out_Rows`; line breaks stay where they are."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)


def findings(name, text, words):
    """`FILE:LINE: word` for every refused word in a file, and `FILE: word in its name`."""
    for exemption in EXEMPTIONS:
        if fnmatch(name, exemption.files):
            text = re.sub(exemption.text, lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    pattern, text = pattern_of(words), split_names(text)
    in_name = [f"{name}: {words[found.lastindex - 1]} in its name" for found in pattern.finditer(split_names(name))]
    return in_name + [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {words[found.lastindex - 1]}"
        for found in pattern.finditer(text)
    ]


def checked_files():
    """Everything that people read: code, tests, configurations, batch scripts and pages."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [*sorted(inside), *sorted(ROOT.glob("*.md")), ROOT / "Makefile"]


def test_the_list_is_read():
    words = refused_words()
    assert {"wish", "going on", "kept_…", "Kept…", "piece", "without end"} <= set(words) and len(words) > 20


def test_no_refused_word():
    words, found = refused_words(), []
    for path in checked_files():
        found += findings(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), words)
    assert found == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the run goes on from here", "goes on"),
        ("the run goes\n    # on from here", "goes on"),
        ('    "the run goes "\n    f"on from here"', "goes on"),
        ("def test_going_on_after_a_kill(): ...", "going on"),
        ("class GoingOnError(Exception): ...", "going on"),
        ("Wishes are granted.", "wishes"),
        ("stop_wish = 3", "wish"),
        ("num_kept_blocks = 3", "kept blocks"),
        ("kept_tokens = 3", "kept_…"),
        ("_kept_tokens = 3", "kept_…"),
        ("class KeptSomething: ...", "Kept…"),
        ("return batch.isolated()", "isolated"),
    ],
)
def test_the_check_can_fail(text, word):
    assert word in [line.split(": ", 1)[1] for line in findings("a.py", f"\n{text}\n", refused_words())]


@pytest.mark.parametrize(
    "text",
    [
        "where it stands is kept",
        "going, on a rank",
        "a category on its own",
        "let it go. On a rank",
        "the masterpiece",
        "rows are kept in order",
        "def test_what_is_kept_stays(): ...",
        "going on after step 7",
        "spm.SentencePieceProcessor",
    ],
)
def test_ordinary_words_pass(text):
    assert findings("a.py", f"\n{text}\n", refused_words()) == []


def test_names_of_files_are_checked_and_lines_are_named():
    assert findings("tests/test_going_on.py", "", ["going on"]) == ["tests/test_going_on.py: going on in its name"]
    assert findings("a.md", "one\n\na ThingWithoutEnd\n", ["without end"]) == ["a.md:3: without end"]


def test_no_exemption_is_idle():
    for exemption in EXEMPTIONS:
        texts = [path for path in checked_files() if fnmatch(str(path.relative_to(ROOT)), exemption.files)]
        assert any(re.search(exemption.text, path.read_text(encoding="utf-8")) for path in texts), exemption
