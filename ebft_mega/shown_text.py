"""What this program shows of texts that it did not write: names, keys, values, documents, messages of libraries.

A terminal obeys what stands in the text that it is sent, a page obeys what looks like HTML, and a log is read line by
line. Whatever comes from outside therefore passes here on its way to a reader. Letters of all scripts stay as they are.
"""

import copy
import html
import logging
import re
import unicodedata

# Control characters, format characters (bidirectional overrides, zero-width ones, tags), halves of surrogate pairs
# (bytes of a file name that are not UTF-8), and the two separators that some readers take for the end of a line.
_ESCAPED_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# Letters and marks that are drawn as nothing at all.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0]")
# What of an address may be a secret: user and password, and the query, which may be a signature.
_WORD_OF_ADDRESS = re.compile(r"[^\s'\"<>]+")
_USER = re.compile(r"://[^/?#]+@")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
LONGEST = 200
LONGEST_PATH = 5000  # a system's longest is 4,096 bytes
LONGEST_LABEL = 60
LONGEST_NOTE = 8000
LONGEST_RECORD = 20_000  # of one line of a log
_REST = "… ({} more characters)"


def escaped(text: str, meant: str = "") -> str:
    r"""Return a text with escapes in place of all characters that are not simply drawn.

    The escapes are those of JSON (`\u001b`), so that a line of JSON stays one. A backslash stays as it is: what is
    escaped already does not change.

    Args:
        text: of any length.
        meant: characters that stay, such as the newlines of a document.
    """
    unmeant = text
    for character in meant:
        unmeant = unmeant.replace(character, "")
    if unmeant.isprintable() and not _INVISIBLE.search(unmeant):
        return text
    return "".join(character if character in meant else _escape(character) for character in text)


def without_secrets(text: str) -> str:
    """Return a text in which addresses have `***` in place of user, password and query."""
    return _WORD_OF_ADDRESS.sub(_masked, text) if "://" in text else text


def _masked(word: re.Match[str]) -> str:
    before, sign, address = word[0].partition("://")
    place, question, query = _USER.sub("://***@", sign + address).partition("?")
    return f"{before}{place}?***" if sign and query else f"{before}{place}{question}{query}"


def shown(value: object, longest: int = LONGEST) -> str:
    """Return one line that stands for a value in a message: escaped, without secrets, and not too long to be read.

    What `shown` returned comes through it unchanged.

    Args:
        value: a text, or anything with one.
        longest: characters of the line; a longer text is cut, and its end says how much of it is left out.
    """
    text = without_secrets(str(value))
    line = escaped(text[: longest + 1])
    if len(text) <= longest and len(line) <= longest:
        return line
    room = longest - len(_REST.format(len(text)))
    taken: list[str] = []
    for character in text[:room]:
        escape = escaped(character)
        room -= len(escape)
        if room < 0:
            break
        taken.append(escape)
    return "".join(taken) + _REST.format(len(text) - len(taken))


def shown_html(value: object) -> str:
    """Return HTML that shows a value as text, within an element or a quoted attribute."""
    return html.escape(escaped(str(value), meant="\n\t"))


def shown_label(value: object, longest: int = LONGEST_LABEL) -> str:
    """Return one line for a plot, whose library would read what stands between two dollar signs as a formula."""
    return shown(value, longest).replace("$", r"\$")


class LogLines(logging.Formatter):
    """Format log records such that only a record's first line begins at the margin.

    A message is one line, whatever it holds; what follows it (a stack) is indented. No text of a message can pass for a
    record of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, without a newline at the end."""
        own = copy.copy(record)  # other handlers may show it in another way
        own.msg, own.args, own.exc_text = shown(record.getMessage(), LONGEST_RECORD), None, None
        first, *more = super().format(own).split("\n")
        return "\n".join([escaped(first), *(f"  {shown(line, LONGEST_RECORD)}" for line in more)])


def set_last_resort() -> None:
    """Let records that no handler takes be printed as harmless lines."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LogLines())


def _escape(character: str) -> str:
    """One character, as an escape if it is not simply drawn."""
    if unicodedata.category(character) not in _ESCAPED_CATEGORIES and not _INVISIBLE.match(character):
        return character
    code = ord(character)
    return _SHORT.get(character) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
