"""Git's patterns, with the answers of git 2.39 (`git check-ignore --no-index`), in bounded time."""

import random
import time

import pytest

from ebft_mega.data.selection.git_patterns import GitPattern, git_pattern


def pattern(text: str) -> GitPattern:
    found = git_pattern(text.encode())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "matched", "others"),
    [
        ("*.py", ["a.py", "x/y/a.py", ".py"], ["a.pyc", "py"]),
        ("/*.py", ["a.py"], ["x/a.py"]),
        ("src/*.py", ["src/a.py"], ["src/x/a.py", "y/src/a.py"]),
        ("src/**/*.py", ["src/a.py", "src/x/y/a.py"], ["a.py", "y/src/a.py"]),
        ("**/tests", ["tests", "a/b/tests"], ["mytests", "tests/a"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "x/a/b"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("**/a/**/b/**/c", ["a/b/c", "x/a/y/b/z/c", "a/a/b/b/c/c"], ["a/c", "b/a/c"]),
        ("a**b", ["ab", "axyb"], ["a/b"]),  # two stars within a name are one
        ("x/a**b", ["x/ab", "x/aab"], ["x/a/b"]),
        ("*a*b*a", ["aba", "xabyaza"], ["ab", "baa"]),
        ("?", ["a", "x/b"], ["ab", "é"]),  # bytes
        ("[ab]c", ["ac", "x/bc"], ["cc", "c"]),
        ("[!ab]c", ["cc"], ["ac", "c"]),
        ("[^a-c-e]x", ["dx", "fx"], ["bx", "ex", "-x"]),
        ("[]a]", ["]", "a"], ["b", "[]a]"]),
        ("[[:digit:]x]", ["7", "x"], ["a", ":"]),
        ("a[b/]c", [], ["a/c"]),
        (r"\*", ["*"], ["a", r"\*"]),
        (r"\!a", ["!a"], ["a"]),
        (r"\#a", ["#a"], ["a"]),
        ("a\\ ", ["a "], ["a"]),
        ("a  ", ["a"], ["a  "]),
        (" a", [" a"], ["a"]),
        ("z[b-a]", ["zb"], ["za", "z-"]),
        ("xa**/b", ["xa/b", "xab", "xac/d/b"], ["a/b", "xa/c"]),  # as git does, not as it says
        ("/a**", ["ab", "a/b"], ["ba"]),
        ("x?**/b", ["xa/b", "xac/b"], ["xa/c/b"]),
    ],
)
def test_one_file(text: str, matched: list[str], others: list[str]) -> None:
    found = pattern(text)
    assert [path for path in [*matched, *others] if found.matches(path)] == matched


def test_folders_and_what_they_hold() -> None:
    assert pattern("build/").matches("a/build", is_folder=True)
    assert not pattern("build/").matches("a/build")
    assert not pattern("build/").matches("build/x")  # what a folder holds is another pattern's matter for git
    assert pattern("build/").covers("a/build/x/y")
    assert not pattern("build/").covers("a/build")
    assert pattern("build").covers("build/x") and pattern("build").covers("a/build")
    assert pattern("a/*").covers("a/b/c") and not pattern("a/*").covers("a")
    assert not pattern("/build").covers("a/build/x")


@pytest.mark.parametrize("text", ["", "   ", "# a", "/", "//", "a[", "[a", "\\", "a\\", "[[:word:]]", "[a-", "!"])
def test_what_matches_nothing_is_no_pattern(text: str) -> None:
    assert git_pattern(text.encode()) is None


def test_a_negation_says_so() -> None:
    assert pattern("!a").negated and pattern("!a").matches("a")
    assert not pattern("a").negated


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("*a" * 100 + "b", "a" * 255),
        ("**/a/" * 100 + "b", "a/" * 2000 + "c"),
        ("**/*a*a*b/" * 50 + "x", ("a" * 200 + "/") * 20 + "y"),
        ("**/a*b*/" * 100 + "x", ("ab" * 100 + "/") * 20 + "y"),
    ],
)
def test_no_pattern_takes_long(text: str, path: str) -> None:
    found = pattern(text)
    begin = time.perf_counter()
    assert not found.matches(path) and not found.covers(path)
    assert time.perf_counter() - begin < 1


def naive(tokens: str, text: str) -> bool:
    """Of `*`, `?`, letters and slashes, by trying everything; `D` stands for a `**` with its slash."""
    if not tokens:
        return not text
    if tokens[0] == "D":
        starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == "/")]
        return any(naive(tokens[1:], text[start:]) for start in starts)
    if tokens[0] == "*":
        end = text.find("/")
        return any(naive(tokens[1:], text[n:]) for n in range((len(text) if end < 0 else end) + 1))
    fits = bool(text) and (text[0] == tokens[0] or (tokens[0] == "?" and text[0] != "/"))
    return fits and naive(tokens[1:], text[1:])


def random_texts(seed: int, letters: str, longest: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(1, longest))) for _ in range(400)]


def test_equals_trying_everything() -> None:
    paths = [path for path in random_texts(1, "ab/", 9) if path.strip("/") == path != "" and "//" not in path]
    checked = 0
    for tokens in random_texts(2, "ab*?/D", 7):
        text = "/" + tokens.replace("D", "**/")
        if "//" in text or "***" in text or tokens.endswith("/") or any(x in tokens for x in ("aD", "bD", "*D", "?D")):
            continue  # not a pattern of these tokens alone
        found = git_pattern(text.removesuffix("/").encode())
        if found is None or tokens.endswith("D") or "**" in tokens:
            continue
        for path in paths:
            assert found.matches(path) == naive(tokens, path), (text, path)
            checked += 1
    assert checked > 3000
