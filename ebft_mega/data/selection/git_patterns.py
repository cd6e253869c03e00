"""Git's patterns for paths, in time that is linear in a path's length whatever the pattern.

A `.gitignore` comes with the texts of other people. Matched with backtracking, `*a*a*a*a*b` takes seconds for one name
of 255 letters. Here each wildcard but the last takes the first match of what follows it and never another one, which
finds every match: what a later match would skip, the next wildcard can take.

Source: dir.c (`parse_path_pattern`, `last_matching_pattern_from_list`) and wildmatch.c of git 2.47.
"""

import re
import string
from dataclasses import dataclass
from functools import lru_cache

# Bytes, as git compares: in the names of most systems a letter beyond ASCII is several of them.
_CLASSES = {
    b"alnum": string.ascii_letters + string.digits,
    b"alpha": string.ascii_letters,
    b"blank": " \t",
    b"cntrl": "".join(map(chr, [*range(32), 127])),
    b"digit": string.digits,
    b"graph": "".join(map(chr, range(33, 127))),
    b"lower": string.ascii_lowercase,
    b"print": "".join(map(chr, range(32, 127))),
    b"punct": string.punctuation,
    b"space": " \t\n\v\f\r",
    b"upper": string.ascii_uppercase,
    b"xdigit": string.hexdigits,
}
_LITERAL = re.compile(rb"[^*?\[\\]*", re.DOTALL)
_ANY, _FOLDERS, _REST = "*", "**/", "**"  # wildcards that match any number of bytes


@dataclass(frozen=True)
class GitPattern:
    """One pattern of git, such as a line of a `.gitignore`."""

    negated: bool
    folders_only: bool
    _own: re.Pattern[bytes]
    _below: re.Pattern[bytes]

    def matches(self, path: str, is_folder: bool = False) -> bool:
        """Whether the pattern is for this very file or folder, as the lines of a `.gitignore` are.

        Args:
            path: relative to where the pattern holds, without a slash at its end.
            is_folder: whether it is one.
        """
        return (is_folder or not self.folders_only) and self._own.match(path_bytes(path)) is not None

    def covers(self, path: str, is_folder: bool = False) -> bool:
        """Whether the pattern is for this file or folder, or for a folder in which it lies."""
        return self.matches(path, is_folder) or self._below.match(path_bytes(path)) is not None


@lru_cache(maxsize=4096)
def git_pattern(line: bytes) -> GitPattern | None:
    """The pattern of a line without its line end; None for a blank line, a comment, and what can match nothing."""
    if line.startswith(b"#"):
        return None
    line = _without_spaces_at_the_end(line)
    negated = line.startswith(b"!")
    text = line[negated:]
    folders_only = text.endswith(b"/")
    text = text[: len(text) - folders_only]
    is_bound = b"/" in text
    tokens = _tokens(text.removeprefix(b"/"), is_bound)
    if not tokens:
        return None
    regex = _regex(tokens if is_bound else [_FOLDERS, *tokens])
    return GitPattern(
        negated, folders_only, re.compile(regex + rb"\Z", re.DOTALL), re.compile(regex + rb"/", re.DOTALL)
    )


def path_bytes(path: str) -> bytes:
    """A path as the system writes it."""
    try:
        return path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a name that no system has, of an archive's member
        return path.encode("utf-8", "surrogatepass")


def _without_spaces_at_the_end(line: bytes) -> bytes:
    kept = line.rstrip(b" ")
    backslashes = len(kept) - len(kept.rstrip(b"\\"))
    return kept + b" " if backslashes % 2 and len(kept) < len(line) else kept


def _tokens(text: bytes, is_bound: bool) -> list[str | bytes] | None:
    """Wildcards as names, and all else as regular expressions for one byte each; None if nothing can match."""
    tokens: list[str | bytes] = []
    # Git compares what stands before the first wildcard by itself, and takes what follows for the beginning of a path.
    literal = len(text) - len(_LITERAL.sub(b"", text, count=1)) if is_bound else 0
    place = 0
    while place < len(text):
        byte = text[place : place + 1]
        if byte == b"*":
            end = place + len(text[place:]) - len(text[place:].lstrip(b"*"))
            is_between = end - place > 1 and (place in (0, literal) or text[place - 1 : place] == b"/")
            if is_between and end == len(text):
                tokens.append(_REST)
            elif is_between and text[end : end + 1] == b"/":
                tokens.append(_FOLDERS)
                end += 1
            else:
                tokens.append(_ANY)
            place = end
            continue
        if byte == b"[":
            found = _set_of_bytes(text, place)
            if found is None:
                return None
            token, place = found
            tokens.append(token)
            continue
        if byte == b"\\":
            place += 1
            byte = text[place : place + 1]
            if not byte:
                return None
            tokens.append(re.escape(byte))
        else:
            tokens.append(b"[^/]" if byte == b"?" else re.escape(byte))
        place += 1
    return tokens


def _set_of_bytes(text: bytes, place: int) -> tuple[bytes, int] | None:
    """The expression for a set such as `[a-z]` and where it ends; None if it does not end or names no class.

    Args:
        text: holds it.
        place: of its opening bracket.
    """
    place += 1
    negated = text[place : place + 1] in (b"!", b"^")
    place += negated
    chosen: set[int] = set()
    previous: int | None = None
    first = True
    while first or text[place : place + 1] != b"]":
        first = False
        if place >= len(text):
            return None
        byte = text[place]
        following = text[place + 1 : place + 2]
        if byte == ord("-") and previous is not None and following not in (b"", b"]"):
            place += 1 + (following == b"\\")
            if place >= len(text):
                return None
            chosen.update(range(previous, text[place] + 1))
            previous = None
        elif byte == ord("[") and following == b":":
            end = text.find(b"]", place + 2)
            if end < 0:
                return None
            if text[end - 1 : end] == b":" and end > place + 2:
                if text[place + 2 : end - 1] not in _CLASSES:
                    return None
                chosen.update(_CLASSES[text[place + 2 : end - 1]].encode())
                place, previous = end, None
            else:
                chosen.add(byte)
                previous = byte
        else:
            if byte == ord("\\"):
                place += 1
                if place >= len(text):
                    return None
                byte = text[place]
            chosen.add(byte)
            previous = byte
        place += 1
    # A slash is never matched by a set.
    chosen = (set(range(256)) - chosen if negated else chosen) - {ord("/")}
    members = b"".join(rb"\x%02x" % byte for byte in sorted(chosen))
    return (b"[" + members + b"]" if members else rb"(?!)"), place + 1


def _regex(tokens: list[str | bytes]) -> bytes:
    """One expression for all tokens, from the beginning of a path."""
    stretches: list[list[bytes]] = [[b""]]  # between two `**/`; within one, what stands between two `*`
    rest = b""
    for token in tokens:
        if token == _FOLDERS:
            stretches.append([b""])
        elif token == _REST:
            rest = b".*"
        elif token == _ANY:
            stretches[-1].append(b"")
        elif isinstance(token, bytes):
            stretches[-1][-1] += token
    first, *others = [_within_folders(parts) for parts in stretches]
    # What stands before a `**/` ends with a slash: it fits in one way, and its first place leaves most to what follows.
    inner = [b"(?>(?:.*?/)??" + regex + b")" for regex in others[:-1]]
    return first + b"".join(inner) + b"".join(b"(?:.*/)?" + regex for regex in others[-1:]) + rest


def _within_folders(parts: list[bytes]) -> bytes:
    """The expression for parts with a `*` between each two."""
    first, *others = parts
    return (
        first
        + b"".join(b"(?>[^/]*?" + part + b")" for part in others[:-1])
        + b"".join(b"[^/]*" + part for part in others[-1:])
    )
