"""`--set key=value`: single keys on the command line, written into the tree of a configuration's file."""

from collections.abc import Iterable, Sequence
from typing import Any

from ebft_mega.config.yaml_source import MAX_DEPTH, MAX_KEY_CHARACTERS, MAX_TEXT_BYTES, read_yaml
from ebft_mega.errors import Problem

OVERRIDE = "--set"
MAX_OVERRIDES = 1000


def apply_overrides(tree: dict[str, Any], places: dict[str, str], texts: Iterable[str]) -> list[Problem]:
    """Write all `a.b=value` texts into a tree.

    No text may replace what another one has written: like a key that stands in a file twice, it would leave open which
    of the two is meant.

    Args:
        tree: of the file; it is changed.
        places: where each dotted key of the tree was written; it is changed, too.
        texts: as the command line has them.

    Returns:
        What is wrong with them; texts with problems are not written.
    """
    given = list(texts)
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in given)
    if len(given) > MAX_OVERRIDES or num_bytes > MAX_TEXT_BYTES:
        found = f"{len(given)} values of {num_bytes} bytes"
        expected = f"at most {MAX_OVERRIDES} values of {MAX_TEXT_BYTES} bytes together: write them into the file"
        return [Problem(OVERRIDE, "(all)", found, expected)]
    problems = []
    written: list[str] = []
    for text in given:
        key = key_of(text)
        wrong = _obstacle(tree, written, text)
        problems += wrong or _apply(tree, places, text)
        written += [] if wrong else [key]
    return problems


def key_of(text: str) -> str:
    """The dotted key of a `key=value` text."""
    return text.partition("=")[0].strip()


def replace_overrides(texts: Sequence[str], by: Sequence[str]) -> list[str]:
    """Join two lists of `key=value` texts; the first loses its texts for the second's keys, and for keys inside these.

    For programs that decide some keys themselves, whatever their users set.
    """
    keys = [key_of(text) for text in by]
    return [*(text for text in texts if not any(f"{key_of(text)}.".startswith(f"{key}.") for key in keys)), *by]


def _obstacle(tree: dict[str, Any], written: Sequence[str], text: str) -> list[Problem]:
    """Why a text cannot be written, if it cannot."""
    key, names = key_of(text), key_of(text).split(".")
    if "=" not in text or not all(names):
        return [Problem(OVERRIDE, _shown(text), "no key=value", "section.key=value, such as train.lr=1e-5")]
    if len(names) > MAX_DEPTH or max(map(len, names)) > MAX_KEY_CHARACTERS:
        expected = f"a key of at most {MAX_DEPTH} levels of {MAX_KEY_CHARACTERS} characters"
        return [Problem(OVERRIDE, _shown(key), f"{len(names)} levels, {len(key)} characters", expected)]
    for other in written:
        if key == other or other.startswith(f"{key}.") or (key.startswith(f"{other}.") and _holds(tree, names)):
            found = "this key a second time" if key == other else f"a second value for what {other}=... sets"
            return [Problem(OVERRIDE, key, found, "every key once")]
    return []


def _holds(tree: Any, names: Sequence[str]) -> bool:
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _apply(tree: dict[str, Any], places: dict[str, str], text: str) -> list[Problem]:
    """Write one text into the tree."""
    key = key_of(text)
    written = text.partition("=")[2]
    source = read_yaml(written, OVERRIDE)
    if not source.problems and _ends_in_comment(written, source.value):
        found = f"{_shown(written)!r}, where a comment begins at #"
        return [Problem(OVERRIDE, key, found, "quotes around a value with # after a space, such as key='\"a #b\"'")]
    if source.problems:
        return [Problem(OVERRIDE, key, problem.found, problem.expected) for problem in source.problems]
    *parents, leaf = key.split(".")
    branch = tree
    for depth, name in enumerate(parents, start=1):
        if branch.get(name) is None:
            branch[name] = {}
            places[".".join(parents[:depth])] = OVERRIDE
        if not isinstance(branch[name], dict):
            holder = ".".join(parents[:depth])
            return [Problem(OVERRIDE, key, f"{holder} holding a value, not a section", "a key inside a section")]
        branch = branch[name]
    branch[leaf] = source.value
    for old in [known for known in places if known == key or known.startswith(key + ".")]:
        del places[old]
    places[key] = OVERRIDE
    return []


def _ends_in_comment(text: str, value: Any) -> bool:
    """Whether the end of a YAML text is left out of its value: what is added there changes nothing."""
    longer = read_yaml(f"{text}x", OVERRIDE) if "#" in text else None
    return longer is not None and not longer.problems and longer.value == value


def _shown(text: str) -> str:
    return text if len(text) <= MAX_KEY_CHARACTERS else f"{text[: MAX_KEY_CHARACTERS - 3]}..."
