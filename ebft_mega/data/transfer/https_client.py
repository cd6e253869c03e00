"""Download whole files and byte ranges from https servers, over kept connections. Imports no torch.

Only https is spoken, and certificates are verified: against the system's authorities, or those that SSL_CERT_FILE or
SSL_CERT_DIR name. The proxy of the environment (HTTPS_PROXY, ALL_PROXY, NO_PROXY) is used. Redirects are followed
within the server and to named hosts (`addresses.py`). Nothing that a server says is believed before it is bounded: an
answer by its announced and by its expected size, and by time (`connections.py`). An address is never run as a command
or opened as a local file.
"""

import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import responses
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

from ebft_mega.data.transfer.addresses import redirect_obstacle
from ebft_mega.data.transfer.connections import answer_within, limit_connections, shared_context
from ebft_mega.errors import DamagedDataError, UnreachableDataError
from ebft_mega.extension.store import StoreClient, Transfer

if TYPE_CHECKING:
    import httpx2

# An idle connection is closed after this time, and only so many idle ones are kept. Common servers keep one for 5 to
# 75 seconds; one that the server has closed is noticed before it is used again.
_IDLE_SECONDS = 30.0
_IDLE_CONNECTIONS = 20
_MAX_REDIRECTS = 10
# Bodies of redirects and error answers up to this size are read to the end: only then can the connection be kept.
_SHORT_BODY_BYTES = 1 << 16
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_ABSENT_STATUS = (404, 410)
_HEAD_REFUSED_STATUS = (403, 405, 501)
# At most 18 digits: far above any size, and below what Python or a disk could not hold.
_COUNT = "[0-9]{1,18}"
_CONTENT_RANGE = re.compile(f"bytes (?:({_COUNT})-({_COUNT})|\\*)/({_COUNT})")


class HttpsClient(StoreClient):
    """Read files of https servers. Threads may share a client; copies in other processes open their own connections.

    Args:
        transfer: timeouts, retries and redirects.
    """

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        # Not the generator of the `random` module: its state belongs to the training run.
        self._jitter = random.SystemRandom()
        self._start_empty()

    def _start_empty(self) -> None:
        self._client: httpx2.Client | None = None
        self._lock = threading.RLock()  # the garbage collector may call `close` at any place
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["HttpsClient"], tuple[Transfer]]:
        return HttpsClient, (self._transfer,)

    def size(self, url: str) -> int:
        """Ask for a file's size: one HEAD, or a range of one byte where HEAD is refused.

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
                raise DamagedDataError(url, None, failure.expected or "a file", str(failure)) from failure
        raise UnreachableDataError(url, None, "a file", self._after_attempts(found))

    def chunks(self, url: str, start: int, stop: int, total_bytes: int) -> Iterator[bytes]:
        """Read a byte range in order; after a broken connection, continue at the first missing byte.

        Args:
            url: the file.
            start, stop: the range, 0 <= start <= stop <= total_bytes.
            total_bytes: size that the file must have.

        Yields:
            Chunks; together exactly the `stop - start` bytes.

        Raises:
            DamagedDataError: another size, no ranges, a status that is no success, an address that cannot be
                reached, or too many failed attempts; names the offset of the first missing byte.
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
        raise UnreachableDataError(url, position, f"{stop - position} bytes", self._after_attempts(found))

    def small_file(self, url: str, limit_bytes: int, absent_if_forbidden: bool = False) -> bytes | None:
        """Read a whole file of unknown size.

        Args:
            url: the file.
            limit_bytes: a longer file is refused.
            absent_if_forbidden: public buckets without permission to list them answer 403 for a missing file.

        Returns:
            Its contents; None where there is no such file.

        Raises:
            DamagedDataError: no usable answer.
        """
        expected, found = f"at most {limit_bytes} bytes", ""
        absent = (*_ABSENT_STATUS, 403) if absent_if_forbidden else _ABSENT_STATUS
        for _ in self._tries():
            try:
                with self._answer("GET", url) as answer:
                    declared = _content_length(answer)
                    if declared is not None and declared > limit_bytes:
                        raise _RefusedError(f"{declared} bytes")
                    content = b"".join(self._body(answer, limit_bytes))
            except _TransientError as failure:
                found = str(failure)
            except _RefusedError as failure:
                if failure.status in absent:
                    return None
                raise DamagedDataError(url, None, failure.expected or expected, str(failure)) from failure
            else:
                if declared in (None, len(content)):
                    return content
                found = f"{len(content)} of {declared} bytes"
        raise UnreachableDataError(url, None, expected, self._after_attempts(found))

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        if self._process == os.getpid():
            with self._lock:
                # Not `Client.close`, which would also close the connection that another thread is reading from. Without
                # a reference from here, the connections are closed when the last answer has been read.
                self._client = None

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
            with self._answer("HEAD", url) as answer:
                length = _content_length(answer)
        except _RefusedError as failure:
            if failure.status not in _HEAD_REFUSED_STATUS:
                raise
            length = None
        if length is not None:
            return length
        try:
            with self._answer("GET", url, "bytes=0-0") as answer:
                length = _content_range(answer)[2] if answer.status_code == 206 else _content_length(answer)
        except _RefusedError as failure:
            if failure.status == 416:  # no first byte
                return 0
            raise
        if length is None:
            raise _RefusedError("an answer without a length")
        return length

    @contextmanager
    def _answer_from(self, url: str, position: int, stop: int, total_bytes: int) -> Iterator["httpx2.Response"]:
        """Ask for the bytes [position, stop) and check that the answer announces exactly these."""
        whole = position == 0 and stop == total_bytes
        with self._answer("GET", url, None if whole else f"bytes={position}-{stop - 1}") as answer:
            if whole:
                if answer.status_code != 200:
                    raise _RefusedError(_status_text(answer.status_code), "HTTP status 200")
                found_total = _content_length(answer)
            else:
                if answer.status_code != 206:
                    expected = "HTTP status 206 (a server with byte ranges)"
                    raise _RefusedError(_status_text(answer.status_code), expected)
                first, last, found_total = _content_range(answer)
                if (first, last) != (position, stop - 1) and found_total == total_bytes:
                    raise _RefusedError(f"bytes {first} to {last}", f"bytes {position} to {stop - 1}")
            if found_total not in (None, total_bytes):
                raise _RefusedError(f"a file of {found_total} bytes", f"a file of {total_bytes} bytes")
            yield answer

    @contextmanager
    def _answer(self, method: str, url: str, byte_range: str | None = None) -> Iterator["httpx2.Response"]:
        """Send a request; the answer has a status of success, and its body is still to be read."""
        answer = self._send(method, url, byte_range)
        try:
            if not answer.is_success:
                self._read_rest(answer)
                kind = _TransientError if answer.status_code in _TRANSIENT_STATUS else _RefusedError
                raise kind(_status_text(answer.status_code), status=answer.status_code)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise _RefusedError("a compressed answer")
            yield answer
            self._read_rest(answer)
        finally:
            answer.close()

    def _send(self, method: str, url: str, byte_range: str | None) -> "httpx2.Response":
        """Send a request and follow redirects; returns with the header of the last answer, all within the timeout."""
        import httpx2

        client = self._client_of_this_process()
        headers = {"User-Agent": "ebft-mega", "Accept-Encoding": "identity"}
        if byte_range:
            headers["Range"] = byte_range
        try:
            request = client.build_request(method, url, headers=headers)
            with answer_within(self._transfer.timeout_seconds):
                return self._follow(client, request)
        except (httpx2.InvalidURL, UnicodeError) as error:  # the latter: a host without a form for the DNS
            raise _RefusedError("no valid address") from error
        except httpx2.HTTPError as error:
            raise self._failure(error) from error

    def _follow(self, client: "httpx2.Client", request: "httpx2.Request") -> "httpx2.Response":
        """Send a request and, while the answer is a redirect, the next one."""
        asked = request.url
        for number in range(_MAX_REDIRECTS + 1):
            answer = client.send(request, stream=True)
            if answer.next_request is None:
                return answer
            self._read_rest(answer)
            answer.close()
            request = answer.next_request
            obstacle = redirect_obstacle(asked, request.url, self._transfer.redirect_hosts)
            if obstacle or number == _MAX_REDIRECTS:
                found = f"{_status_text(answer.status_code)}: {obstacle or f'more than {_MAX_REDIRECTS} in a row'}"
                raise _RefusedError(found, status=answer.status_code)
        raise AssertionError

    def _body(self, answer: "httpx2.Response", limit_bytes: int) -> Iterator[bytes]:
        """Chunks of an answer's body, together at most `limit_bytes`.

        They end where the answer ends, also where that is before its Content-Length: the callers count. The time for
        all of them grows with the bytes that have come.
        """
        import httpx2

        received, waited = 0, 0.0
        body = answer.iter_raw()
        while True:
            before = time.monotonic()
            allowed = self._transfer.timeout_seconds + received / self._transfer.minimum_bytes_per_second
            try:
                with answer_within(allowed - waited):
                    chunk = next(body, b"")
            except httpx2.RemoteProtocolError as error:
                if _content_length(answer) is None:
                    raise self._failure(error) from error
                return
            except httpx2.HTTPError as error:
                read_seconds = time.monotonic() - before
                if isinstance(error, httpx2.TimeoutException) and read_seconds < 0.9 * self._transfer.timeout_seconds:
                    raise _TransientError(f"{received} bytes in {waited + read_seconds:.0f} s") from error
                raise self._failure(error) from error
            waited += time.monotonic() - before
            received += len(chunk)
            if not chunk:
                return
            if received > limit_bytes:
                raise _RefusedError("a longer answer")
            yield chunk

    def _read_rest(self, answer: "httpx2.Response") -> None:
        """Read a short body that nobody has read, so that the connection can be used again."""
        length = 0 if answer.request.method == "HEAD" else _content_length(answer)
        if not answer.is_stream_consumed and length is not None and length <= _SHORT_BODY_BYTES:
            with suppress(_TransferFailureError):
                for _ in self._body(answer, _SHORT_BODY_BYTES):
                    pass

    def _client_of_this_process(self) -> "httpx2.Client":
        if self._process != os.getpid():
            # Forked. The connections belong to the parent, and one of its threads may have held the lock.
            self._start_empty()
        with self._lock:
            if self._client is None:
                self._client = _new_client(self._transfer.timeout_seconds)
            return self._client

    def _failure(self, error: "httpx2.HTTPError") -> "_TransferFailureError":
        """What an exception of httpx2 means for the attempt, in the words of the operating system where it has any."""
        import httpx2

        if isinstance(error, httpx2.TimeoutException):
            return _TransientError(f"no answer within {self._transfer.timeout_seconds:g} s")
        if isinstance(error, httpx2.ProxyError):
            return _TransientError(f"Tunnel connection failed: {str(error)[:100]}")
        # httpx2 raises from the exception of httpcore2, and that one was raised while an OSError was handled.
        core = error.__cause__
        cause = core and (core.__cause__ or core.__context__)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _RefusedError(cause.strerror or str(cause))
        closed = isinstance(error, httpx2.RemoteProtocolError) and str(error).startswith("Server disconnected")
        if closed or isinstance(cause, ConnectionResetError | ssl.SSLEOFError):
            return _TransientError("a closed connection")
        if isinstance(cause, OSError) and cause.strerror:
            return _TransientError(cause.strerror)
        return _TransientError(ascii(str(error))[1:-1][:200] or type(error).__name__)


class _TransferFailureError(Exception):
    def __init__(self, found: str, expected: str | None = None, status: int | None = None):
        super().__init__(found)
        self.expected, self.status = expected, status


class _TransientError(_TransferFailureError):
    """Another attempt may succeed."""


class _RefusedError(_TransferFailureError):
    """Another attempt would end the same way."""


def _new_client(timeout_seconds: float) -> "httpx2.Client":
    import httpx2

    # Below WARNING both packages log the targets of redirects.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = httpx2.Client(
            verify=shared_context(),
            timeout=timeout_seconds,
            limits=httpx2.Limits(max_keepalive_connections=_IDLE_CONNECTIONS, keepalive_expiry=_IDLE_SECONDS),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
    except ModuleNotFoundError:
        raise
    except (ValueError, ImportError, httpx2.InvalidURL) as error:  # an ImportError for the scheme socks5
        # Not the error's own text: a proxy's address may contain a password.
        raise _RefusedError("a proxy in the environment that cannot be used", "an http or https proxy") from error
    limit_connections(client)
    return client


def _status_text(status: int) -> str:
    text = f"HTTP status {status} ({responses.get(status, 'unknown')})"
    return f"{text}, a redirect that is not followed" if 300 <= status < 400 else text


def _content_length(answer: "httpx2.Response") -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(_COUNT, text) else None


def _content_range(answer: "httpx2.Response") -> tuple[int, int, int]:
    """First byte, last byte and size of the whole file."""
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or match[1] is None:
        raise _RefusedError(f"Content-Range {text[:100]!r}", "the range that was asked for")
    return int(match[1]), int(match[2]), int(match[3])
