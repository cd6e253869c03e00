"""What is sent to servers, what their answers announce, and what ends an attempt to read. Imports no torch."""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import responses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

# At most 18 digits: far above any size, and below what Python or a disk could not hold.
_COUNT = "[0-9]{1,18}"
_CONTENT_RANGE = re.compile(f"bytes (?:({_COUNT})-({_COUNT})|\\*)/({_COUNT})")


@dataclass(frozen=True)
class Asked:
    """What is sent to a server for a file. Its query and headers may be secrets: messages never show them."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)  # for the server itself, not where it redirects to


class TransferFailureError(Exception):
    """One attempt to read from a server has failed.

    Args:
        found, expected: for messages, without secrets; no `expected`: what was asked for.
        status: of the answer; None where there is none.
        code: the server's own word for what is wrong; empty where it has none.
    """

    def __init__(self, found: str, expected: str | None = None, status: int | None = None, code: str = ""):
        super().__init__(found)
        self.expected, self.status, self.code = expected, status, code


class TransientError(TransferFailureError):
    """Another attempt may succeed."""


class RefusedError(TransferFailureError):
    """Another attempt would end the same way."""


def status_text(status: int) -> str:
    """A status in words."""
    text = f"HTTP status {status} ({responses.get(status, 'unknown')})"
    return f"{text}, a redirect that is not followed" if 300 <= status < 400 else text


def content_length(answer: "httpx2.Response") -> int | None:
    """Bytes that an answer announces; None where it announces none."""
    text = answer.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(_COUNT, text) else None


def content_range(answer: "httpx2.Response") -> tuple[int, int, int]:
    """First byte, last byte and size of the whole file that an answer with a range announces.

    Raises:
        RefusedError: it announces no range.
    """
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or match[1] is None:
        raise RefusedError(f"Content-Range {text[:100]!r}", "the range that was asked for")
    return int(match[1]), int(match[2]), int(match[3])


def failure_of(error: "httpx2.HTTPError", timeout_seconds: float) -> TransferFailureError:
    """What an exception of httpx2 means for the attempt, in the words of the operating system where it has any."""
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return TransientError(f"no answer within {timeout_seconds:g} s")
    if isinstance(error, httpx2.ProxyError):
        return TransientError(f"Tunnel connection failed: {str(error)[:100]}")
    # httpx2 raises from the exception of httpcore2, and that one was raised while an OSError was handled.
    core = error.__cause__
    cause = core and (core.__cause__ or core.__context__)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RefusedError(cause.strerror or str(cause))
    closed = isinstance(error, httpx2.RemoteProtocolError) and str(error).startswith("Server disconnected")
    if closed or isinstance(cause, ConnectionResetError | ssl.SSLEOFError):
        return TransientError("a closed connection")
    if isinstance(cause, OSError) and cause.strerror:
        return TransientError(cause.strerror)
    return TransientError(ascii(str(error))[1:-1][:200] or type(error).__name__)
