"""Standard output and standard error for what is only shown.

No failure of theirs ends a run, and nothing that is printed through them makes a terminal do more than draw letters.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, TextIO

from ebft_mega.shown_text import LONGEST_NOTE, escaped, set_last_resort, shown

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STREAMS = {"stdout": 1, "stderr": 2}
# A reader that stands still, such as a pager or a terminal after Ctrl-S, holds the run for this time at most.
STALLED_SECONDS = 30.0
# A pipe that can be written at all takes so many bytes at once.
MOST_BYTES = 4096
_ROOM_MAY_RETURN = (errno.ENOSPC, errno.EDQUOT)
# Of all characters that a terminal obeys, those that a text is laid out with.
_LAYOUT = "\n\t"


class ForgivingFile(io.FileIO):
    """A descriptor whose writes never fail: what cannot be written is dropped.

    A reader that has gone is gone for good. A full disk is tried again with the next text. A reader that stands still
    is waited for once, then texts are dropped until it reads again.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "wb", closefd=False)
        self.failure: OSError | None = None  # the first one
        self._is_silent = False
        self._patience_seconds = STALLED_SECONDS

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write bytes, or drop them; returns their number in any case."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left and not self._is_silent:
            try:
                self._wait_for_room()
                left = left[super().write(left[:MOST_BYTES]) or 0 :]
            except OSError as error:
                self._note(error)
                break
        return total

    def _wait_for_room(self) -> None:
        """Return when something can be written without waiting.

        Raises:
            OSError: the reader stands still.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        is_ready = bool(poll.poll(1000 * self._patience_seconds))
        self._patience_seconds = STALLED_SECONDS if is_ready else 0.0
        if not is_ready:
            raise TimeoutError(errno.ETIMEDOUT, f"nobody has read for {STALLED_SECONDS:g} s")

    def _note(self, error: OSError) -> None:
        self.failure = self.failure or error
        if isinstance(error, TimeoutError) or error.errno in _ROOM_MAY_RETURN:
            return
        self._is_silent = True
        # Programs that this one starts write there, too, and a signal would end them.
        to_nowhere(self.fileno())


class ShownText(io.TextIOWrapper):
    """A text stream that draws letters, newlines and tabs; every other character is written as an escape.

    It is so on a terminal, in a pipe and in a file alike: what a program printed is the same everywhere, and a file
    is read on a terminal later.
    """

    def write(self, text: str, /) -> int:
        """Write a text; returns the number of its characters."""
        super().write(escaped(text, _LAYOUT))
        return len(text)

    def drawing(self) -> io.TextIOWrapper:
        """A stream for what moves the cursor by itself: a progress bar, which escapes the texts that it shows."""
        self.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(ForgivingFile(self.fileno())), encoding=self.encoding, errors=self.errors
        )


def drawing_stream(stream: TextIO) -> TextIO:
    """The stream on which a progress bar draws, beside what is printed to `stream`."""
    return stream.drawing() if isinstance(stream, ShownText) else stream


def protect_standard_streams(failing: Collection[str] = ()) -> None:
    """Replace standard output and standard error by streams that only show text, and never raise.

    Characters that a terminal obeys and those that the stream's encoding lacks are written as escapes. Log records that
    no handler takes are harmless lines there, too. A stream that was closed when the program started leads nowhere: the
    next file that is opened would otherwise get its number, and the texts.

    Args:
        failing: of `stdout` and `stderr`, those that raise what becomes of their reader and their disk all the same.
    """
    set_last_resort()
    fill_closed_descriptors()
    for name, descriptor in STREAMS.items():
        old = getattr(sys, name)
        if old is not None:
            if isinstance(old, ShownText) or not _is_at(old, descriptor):
                continue
            with contextlib.suppress(OSError):
                old.flush()
        raw = io.FileIO(descriptor, "wb", closefd=False) if name in failing else ForgivingFile(descriptor)
        stream = ShownText(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=old is None or name == "stderr" or old.line_buffering,
            write_through=getattr(old, "write_through", False),
        )
        setattr(sys, name, stream)


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print what may hold foreign text as one line, at once, on standard error or another stream."""
    print(shown(text, LONGEST_NOTE), file=stream or sys.stderr, flush=True)


def output_failures() -> dict[str, OSError]:
    """The first failure of each forgiving standard stream that has had one, by the stream's name."""
    failures = {}
    for name in STREAMS:
        file = _forgiving_file(name)
        if file is not None and file.failure is not None:
            failures[name] = file.failure
    return failures


def to_nowhere(descriptor: int) -> None:
    """Let a descriptor lead to the null device from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _forgiving_file(name: str) -> ForgivingFile | None:
    raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
    return raw if isinstance(raw, ForgivingFile) else None


def _is_at(stream: TextIO, descriptor: int) -> bool:
    """Whether a stream is the process's own one, and not what a test or a notebook has put in its place."""
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def fill_closed_descriptors() -> None:
    """Let standard streams that were closed when the program started lead nowhere; before anything is opened."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(nowhere, True)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
