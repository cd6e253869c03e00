"""The boundary around everything that parses what others have written: whatever it raises is bad input, said as such.

A parser may raise anything: a library's own errors, those of Python about numbers, names and nesting, or the panic of
a library in Rust, which is no `Exception`. Outside of `reading` there is only `InputError`, with file and place.
"""

import contextlib
import errno
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ebft_mega.errors import EbftError, InputError, InputProblems, Problem

logger = logging.getLogger(__name__)

MAX_WORDS = 200  # characters of what a parser says; it may repeat half of a file


@contextlib.contextmanager
def reading(where: object, key: str, expected: str, kind: type[InputProblems] = InputError) -> Iterator[None]:
    """Turn whatever the statements within raise into one problem of the input that they read.

    The package's own errors, a request to stop and the end of the interpreter pass unchanged. The cause goes with the
    error, and to the log.

    Args:
        where: the file or address that is read.
        key: what of it, or the option that names it.
        expected: what it should be.
        kind: of the error.

    Raises:
        InputProblems: of the kind asked for.
    """
    try:
        yield
    except EbftError:
        raise
    except BaseException as error:
        if not is_of_parser(error):
            raise
        # The parser's stack is for those who mend the program; the message is for those who mend the file.
        logger.info("%s: %s cannot be read", where, key, exc_info=error)
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise kind([Problem(f"{where}{line}", key, words_of(error), expected)]) from error


def is_of_parser(error: BaseException) -> bool:
    """Whether an error is about what was parsed: any `Exception`, and the panic of a library in Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def words_of(error: BaseException) -> str:
    """What a parser or the system has found, in a few words."""
    if isinstance(error, OSError):
        return shortage(error) or error.strerror or str(error) or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start}, which is not {error.encoding.upper()}"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which no text has"
    said = " ".join(str(error).split())
    if isinstance(error, ValueError) and said.startswith("Exceeds the limit"):
        return f"an integer of more than {sys.get_int_max_str_digits()} digits"
    for of_kind, words in _WORDS:
        if isinstance(error, of_kind):
            return words(said)
    return said[:MAX_WORDS] or type(error).__name__


_WORDS: tuple[tuple[type[Exception], Callable[[str], str]], ...] = (
    (RecursionError, lambda said: "values that are nested too deeply"),
    (MemoryError, lambda said: "sizes for which there is not enough memory"),
    (OverflowError, lambda said: f"a number that is too large ({said[:MAX_WORDS]})"),
    (KeyError, lambda said: f"no {said[:MAX_WORDS]}"),
    (TypeError, lambda said: f"values of another kind ({said[:MAX_WORDS]})"),
    (AttributeError, lambda said: f"values of another kind ({said[:MAX_WORDS]})"),
)


def shortage(error: BaseException) -> str | None:
    """What the machine or this process has too little of, and how to get more; None for all other errors.

    Libraries raise other errors than the system's for the same, and say it in their text alone.
    """
    number, text = (error.errno, "") if isinstance(error, OSError) else (None, str(error))
    if number == errno.EMFILE or any(words in text for words in _NO_DESCRIPTORS):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too few file descriptors: this process may have {soft} (raise it with `ulimit -n`, up to {hard})"
    if number == errno.ENFILE:
        return "too few file descriptors on this machine (raise it with `sysctl fs.file-max`)"
    is_full = isinstance(error, OSError) and number == errno.ENOSPC and _is_shared_memory(error.filename)
    if is_full or any(words in text for words in _NO_SHARED_MEMORY) or _is_full_object(text):
        return f"{_SHARED_MEMORY} is full: {_shared_memory_size()} (in a container, start it with a larger --shm-size)"
    return None


# Of torch's own texts: file descriptors that could not be sent, and workers that died of a bus error.
_NO_DESCRIPTORS = ("Too many open files", "received 0 items of ancdata")
_NO_SHARED_MEMORY = ("out of shared memory", "raise your shared memory limit")


def _is_full_object(text: str) -> bool:
    return "No space left on device" in text and ("shared memory" in text or "</torch_" in text)


_SHARED_MEMORY = "/dev/shm"


def _is_shared_memory(name: object) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(_SHARED_MEMORY)


def _shared_memory_size() -> str:
    try:
        stats = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return "its size is not known"
    return f"{stats.f_bavail * stats.f_frsize} of {stats.f_blocks * stats.f_frsize} bytes are free"
