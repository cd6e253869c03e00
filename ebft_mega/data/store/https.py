"""Files of an https server: sizes, byte ranges and whole files. Standard library only; imports no torch.

Only https is spoken, after redirects too, and certificates are verified: against the system's authorities, or
those that SSL_CERT_FILE or SSL_CERT_DIR name. A proxy of the environment (HTTPS_PROXY, NO_PROXY) is used. No user,
password or query can be part of an address, and no message names where a redirect led: that is where credentials
would be. Nothing here runs a command or reads a local file, whatever an address says.
"""

import http.client
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from ebft_mega.errors import DamagedDataError

_CHUNK_BYTES = 1 << 18
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_ABSENT_STATUS = (404, 410)
_HEAD_REFUSED_STATUS = (403, 405, 501)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass(frozen=True)
class Transfer:
    """How long to wait for a server, and how often to ask again."""

    timeout_seconds: float = 30.0  # to connect, and for every single read
    attempts: int = 5  # for one file or byte range; a broken one is continued where it broke
    first_wait_seconds: float = 0.5  # before the second attempt; doubled for each further one, times 0.5 to 1.5
    minimum_bytes_per_second: float = 10_000.0  # an attempt that stays below it for long is broken off


DEFAULT_TRANSFER = Transfer()


class HttpsClient:
    """Reads files of https servers. Threads may share a client; other processes get one of their own.

    Args:
        transfer: patience.
    """

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        self._opener: urllib.request.OpenerDirector | None = None
        # Not the generator of the `random` module: its state belongs to the training run.
        self._jitter = random.SystemRandom()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["HttpsClient"], tuple[Transfer]]:
        return HttpsClient, (self._transfer,)

    def size(self, url: str) -> int:
        """Asks for a file's size: one HEAD, or a range of one byte where HEAD is refused.

        Returns:
            Bytes.

        Raises:
            DamagedDataError: there is no such file, or no usable answer.
        """
        found = ""
        for _ in self._tries():
            try:
                return self._size(url)
            except _TransientError as failure:
                found = str(failure)
            except _RefusedError as failure:
                raise DamagedDataError(url, None, "a file", str(failure)) from failure
        raise DamagedDataError(url, None, "a file", self._after_attempts(found))

    def chunks(self, url: str, start: int, stop: int, total_bytes: int) -> Iterator[bytes]:
        """Reads a byte range, in order. What has come is kept when the connection breaks.

        Args:
            url: the file.
            start, stop: the range, 0 <= start <= stop <= total_bytes.
            total_bytes: size that the file must have.

        Yields:
            Pieces; together exactly the `stop - start` bytes.

        Raises:
            DamagedDataError: another size, no ranges, a status that is no success, an address that cannot be
                reached, or too many broken attempts; names the byte from which on nothing came.
        """
        position, found = start, ""
        if start == stop:
            return
        for _ in self._tries():
            try:
                with self._answer_from(url, position, stop, total_bytes) as answer:
                    for chunk in self._body(answer, stop - position):
                        position += len(chunk)
                        yield chunk
                if position == stop:
                    return
                found = f"an answer that ends {stop - position} bytes early"
            except _TransientError as failure:
                found = str(failure)
            except _RefusedError as failure:
                expected = failure.expected or f"{stop - position} bytes"
                raise DamagedDataError(url, position, expected, str(failure)) from failure
        raise DamagedDataError(url, position, f"{stop - position} bytes", self._after_attempts(found))

    def small_file(self, url: str, limit_bytes: int, absent: tuple[int, ...] = _ABSENT_STATUS) -> bytes | None:
        """Reads a whole file of unknown size.

        Args:
            url: the file.
            limit_bytes: a longer file is refused.
            absent: statuses that mean "no such file".

        Returns:
            Its contents; None where there is no such file.

        Raises:
            DamagedDataError: no usable answer.
        """
        expected, found = f"at most {limit_bytes} bytes", ""
        for _ in self._tries():
            try:
                with self._open("GET", url) as answer:
                    declared = _content_length(answer)
                    content = b"".join(self._body(answer, limit_bytes))
            except _TransientError as failure:
                found = str(failure)
            except _RefusedError as failure:
                if failure.status in absent:
                    return None
                raise DamagedDataError(url, None, expected, str(failure)) from failure
            else:
                if declared in (None, len(content)):
                    return content
                found = f"{len(content)} of {declared} bytes"
        raise DamagedDataError(url, None, expected, self._after_attempts(found))

    def _tries(self) -> Iterator[int]:
        for attempt in range(self._transfer.attempts):
            if attempt:
                wait = self._transfer.first_wait_seconds * 2 ** (attempt - 1)
                time.sleep(wait * self._jitter.uniform(0.5, 1.5))
            yield attempt

    def _after_attempts(self, found: str) -> str:
        return f"{found} (attempt {self._transfer.attempts} of {self._transfer.attempts})"

    def _size(self, url: str) -> int:
        try:
            with self._open("HEAD", url) as answer:
                length = _content_length(answer)
        except _RefusedError as failure:
            if failure.status not in _HEAD_REFUSED_STATUS:
                raise
            length = None
        if length is not None:
            return length
        try:
            with self._open("GET", url, "bytes=0-0") as answer:
                length = _content_range(answer)[2] if answer.status == 206 else _content_length(answer)
        except _RefusedError as failure:
            if failure.status == 416:  # no first byte
                return 0
            raise
        if length is None:
            raise _RefusedError("an answer without a length")
        return length

    def _answer_from(self, url: str, position: int, stop: int, total_bytes: int) -> http.client.HTTPResponse:
        """Asks for [position, stop) and makes sure that this is what comes."""
        whole = position == 0 and stop == total_bytes
        answer = self._open("GET", url, None if whole else f"bytes={position}-{stop - 1}")
        try:
            if whole:
                if answer.status != 200:
                    raise _RefusedError(_status_text(answer.status), "HTTP status 200")
                found_total = _content_length(answer)
            else:
                if answer.status != 206:
                    raise _RefusedError(_status_text(answer.status), "HTTP status 206 (a server with byte ranges)")
                first, last, found_total = _content_range(answer)
                if (first, last) != (position, stop - 1) and found_total == total_bytes:
                    raise _RefusedError(f"bytes {first} to {last}", f"bytes {position} to {stop - 1}")
            if found_total not in (None, total_bytes):
                raise _RefusedError(f"a file of {found_total} bytes", f"a file of {total_bytes} bytes")
        except _RefusedError:
            answer.close()
            raise
        return answer

    def _body(self, answer: http.client.HTTPResponse, limit_bytes: int) -> Iterator[bytes]:
        """Pieces of an answer's body, `limit_bytes` at most; ends where the answer ends."""
        received, waited = 0, 0.0
        while True:
            before = time.monotonic()
            try:
                chunk = answer.read1(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _TransientError(self._reason(error)) from error
            waited += time.monotonic() - before
            received += len(chunk)
            if not chunk:
                return
            if received > limit_bytes:
                raise _RefusedError("a longer answer")
            yield chunk
            if waited > self._transfer.timeout_seconds + received / self._transfer.minimum_bytes_per_second:
                raise _TransientError(f"{received} bytes in {waited:.0f} s")

    def _open(self, method: str, url: str, byte_range: str | None = None) -> http.client.HTTPResponse:
        if self._opener is None or self._process != os.getpid():
            self._opener, self._process = _opener(), os.getpid()
        headers = {"User-Agent": "ebft-mega", "Accept-Encoding": "identity"}
        if byte_range:
            headers["Range"] = byte_range
        request = urllib.request.Request(url, headers=headers, method=method)
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=self._transfer.timeout_seconds)
        except urllib.error.HTTPError as error:
            error.close()
            kind = _TransientError if error.code in _TRANSIENT_STATUS else _RefusedError
            raise kind(_status_text(error.code), status=error.code) from None
        except urllib.error.URLError as error:
            reason = error.reason
            kind = _RefusedError if isinstance(reason, ssl.SSLCertVerificationError | str) else _TransientError
            raise kind(self._reason(reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(self._reason(error)) from error
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            answer.close()
            raise _RefusedError("a compressed answer")
        return answer

    def _reason(self, error: BaseException | str) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._transfer.timeout_seconds:g} s"
        if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | ssl.SSLEOFError):
            return "a closed connection"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return str(error) or type(error).__name__


def https_address_problem(address: str) -> str | None:
    """Why an address is not one that `HttpsClient` reads; None where it is."""
    try:
        parts = urlsplit(address)
        port_is_valid = parts.port is None or 0 < parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme.lower() != "https":
        return f"the scheme {parts.scheme!r}"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "a user, password, query or fragment"
    if not parts.hostname or not port_is_valid or not address.isprintable() or " " in address:
        return "no valid host, port or path"
    return None


class _TransferFailureError(Exception):
    def __init__(self, found: str, expected: str | None = None, status: int | None = None):
        super().__init__(found)
        self.expected, self.status = expected, status


class _TransientError(_TransferFailureError):
    """Another attempt may succeed."""


class _RefusedError(_TransferFailureError):
    """Another attempt would end the same way."""


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone, and asks the new address for the same thing."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != "https":
            return None  # the status is then an error like any other
        return urllib.request.Request(newurl, headers=req.headers, method=req.get_method())


def _opener() -> urllib.request.OpenerDirector:
    # Only these handlers: `build_opener` would add http, ftp, data and local files.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        _HttpsRedirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _status_text(status: int) -> str:
    text = f"HTTP status {status} ({http.client.responses.get(status, 'unknown')})"
    return f"{text}, a redirect that is not followed" if 300 <= status < 400 else text


def _content_length(answer: http.client.HTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _content_range(answer: http.client.HTTPResponse) -> tuple[int, int, int]:
    """First byte, last byte and size of the whole file."""
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or match[1] is None:
        raise _RefusedError(f"Content-Range {text[:100]!r}", "the range that was asked for")
    return int(match[1]), int(match[2]), int(match[3])
