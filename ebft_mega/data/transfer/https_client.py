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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

from ebft_mega.data.transfer.addresses import is_same_server, redirect_obstacle
from ebft_mega.data.transfer.answers import (
    Asked,
    RefusedError,
    TransferFailureError,
    TransientError,
    content_length,
    content_range,
    failure_of,
    status_text,
)
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
_FORBIDDEN = 403
_HEAD_REFUSED_STATUS = (_FORBIDDEN, 405, 501)
_LONGEST_VERSION = 100


class HttpsClient(StoreClient):
    """Read files of https servers. Threads may share a client; copies in other processes open their own connections.

    Stores that are asked over https have subclasses: they say what an address means (`_asked`) and what a refusal
    (`_refusal`), and all bounds, attempts and checks are these.

    Args:
        transfer: timeouts, retries and redirects.
        redirect_hosts: more hosts that are followed to, see `Transfer.redirect_hosts`.
    """

    def __init__(self, transfer: Transfer, redirect_hosts: tuple[str, ...] = ()):
        self._transfer = transfer
        self._redirect_hosts = (*transfer.redirect_hosts, *redirect_hosts)
        # What servers called the contents of files when their sizes were asked for, by address.
        self._versions: dict[str, str] = {}
        # Not the generator of the `random` module: its state belongs to the training run.
        self._jitter = random.SystemRandom()
        self._start_empty()

    def _start_empty(self) -> None:
        self._client: httpx2.Client | None = None
        self._lock = threading.RLock()  # the garbage collector may call `close` at any place
        self._process = os.getpid()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._arguments(), {"_versions": self._versions}

    def _arguments(self) -> tuple[object, ...]:
        """What a copy in another process is made with; no secrets, which it finds where this one did."""
        return (self._transfer,)

    def _asked(self, method: str, url: str) -> Asked:
        """What is sent for a file: GET for its contents, HEAD for what describes it.

        Raises:
            RefusedError, TransientError: there is nothing to ask with, credentials say.
        """
        return Asked(method, url)

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        """What a status that is no success means, with the beginning of the answer's body."""
        return RefusedError(status_text(status), status=status)

    def _is_absent(self, failure: TransferFailureError, if_forbidden: bool) -> bool:
        """Whether a refusal means that there is no such file; `if_forbidden` as in `small_file`."""
        return failure.status in _ABSENT_STATUS or (if_forbidden and failure.status == _FORBIDDEN)

    def version(self, url: str) -> str:
        """What the server called the contents of a file when its size was asked for; empty where it said nothing."""
        return self._versions.get(url, "")

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
            except TransientError as failure:
                found = str(failure)
            except RefusedError as failure:
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
            except TransientError as failure:
                found = str(failure)
            except RefusedError as failure:
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
        return self._read_small(url, limit_bytes, absent_if_forbidden, lambda: self._asked("GET", url))

    def _read_small(
        self, place: str, limit_bytes: int, absent_if_forbidden: bool, ask: Callable[[], Asked]
    ) -> bytes | None:
        expected, found = f"at most {limit_bytes} bytes", ""
        for _ in self._tries():
            try:
                with self._answered(ask()) as answer:
                    declared = content_length(answer)
                    if declared is not None and declared > limit_bytes:
                        raise RefusedError(f"{declared} bytes")
                    content = b"".join(self._body(answer, limit_bytes))
            except TransientError as failure:
                found = str(failure)
            except RefusedError as failure:
                if self._is_absent(failure, absent_if_forbidden):
                    return None
                raise DamagedDataError(place, None, failure.expected or expected, str(failure)) from failure
            else:
                if declared in (None, len(content)):
                    return content
                found = f"{len(content)} of {declared} bytes"
        raise UnreachableDataError(place, None, expected, self._after_attempts(found))

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        if self._process == os.getpid():
            with self._lock:
                # Not `Client.close`, which would also close the connection that another thread is reading from. Without
                # a reference from here, the connections are closed when the last answer has been read.
                self._client = None

    def _tries(self) -> Iterator[int]:
        self._leave_the_parent_s()
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
                length = content_length(answer)
                self._versions[url] = answer.headers.get("ETag", "")[:_LONGEST_VERSION]
        except RefusedError as failure:
            if failure.status not in _HEAD_REFUSED_STATUS:
                raise
            length = None
        if length is not None:
            return length
        try:
            with self._answer("GET", url, "bytes=0-0") as answer:
                length = content_range(answer)[2] if answer.status_code == 206 else content_length(answer)
        except RefusedError as failure:
            if failure.status == 416:  # no first byte
                return 0
            raise
        if length is None:
            raise RefusedError("an answer without a length")
        return length

    @contextmanager
    def _answer_from(self, url: str, position: int, stop: int, total_bytes: int) -> Iterator["httpx2.Response"]:
        """Ask for the bytes [position, stop) and check that the answer announces exactly these."""
        whole = position == 0 and stop == total_bytes
        with self._answer("GET", url, None if whole else f"bytes={position}-{stop - 1}") as answer:
            if whole:
                if answer.status_code != 200:
                    raise RefusedError(status_text(answer.status_code), "HTTP status 200")
                found_total = content_length(answer)
            else:
                if answer.status_code != 206:
                    expected = "HTTP status 206 (a server with byte ranges)"
                    raise RefusedError(status_text(answer.status_code), expected)
                first, last, found_total = content_range(answer)
                if (first, last) != (position, stop - 1) and found_total == total_bytes:
                    raise RefusedError(f"bytes {first} to {last}", f"bytes {position} to {stop - 1}")
            if found_total not in (None, total_bytes):
                raise RefusedError(f"a file of {found_total} bytes", f"a file of {total_bytes} bytes")
            yield answer

    @contextmanager
    def _answer(self, method: str, url: str, byte_range: str | None = None) -> Iterator["httpx2.Response"]:
        """Send a request; the answer has a status of success, and its body is still to be read."""
        with self._answered(self._asked(method, url), byte_range) as answer:
            yield answer

    @contextmanager
    def _answered(self, asked: Asked, byte_range: str | None = None) -> Iterator["httpx2.Response"]:
        answer = self._send(asked, byte_range)
        try:
            if not answer.is_success:
                status, body = answer.status_code, self._read_rest(answer)
                if status in _TRANSIENT_STATUS:
                    raise TransientError(status_text(status), status=status)
                raise self._refusal(status, answer.headers, body)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise RefusedError("a compressed answer")
            yield answer
            self._read_rest(answer)
        finally:
            answer.close()

    def _send(self, asked: Asked, byte_range: str | None) -> "httpx2.Response":
        """Send a request and follow redirects; returns with the header of the last answer, all within the timeout."""
        import httpx2

        client = self._client_of_this_process()
        headers = {"User-Agent": "ebft-mega", "Accept-Encoding": "identity", **asked.headers}
        if byte_range:
            headers["Range"] = byte_range
        try:
            request = client.build_request(asked.method, asked.url, headers=headers)
            with answer_within(self._transfer.timeout_seconds):
                return self._follow(client, request, asked)
        except (httpx2.InvalidURL, UnicodeError) as error:  # the latter: a host without a form for the DNS
            raise RefusedError("no valid address") from error
        except httpx2.HTTPError as error:
            raise failure_of(error, self._transfer.timeout_seconds) from error

    def _follow(self, client: "httpx2.Client", request: "httpx2.Request", asked: Asked) -> "httpx2.Response":
        """Send a request and, while the answer is a redirect, the next one, without the own headers of the first."""
        first = request.url
        for number in range(_MAX_REDIRECTS + 1):
            answer = client.send(request, stream=True)
            if answer.next_request is None:
                return answer
            self._read_rest(answer)
            answer.close()
            request = answer.next_request
            if not is_same_server(first, request.url):
                for name in asked.headers:
                    request.headers.pop(name, None)
            obstacle = redirect_obstacle(first, request.url, self._redirect_hosts)
            if obstacle or number == _MAX_REDIRECTS:
                found = f"{status_text(answer.status_code)}: {obstacle or f'more than {_MAX_REDIRECTS} in a row'}"
                raise RefusedError(found, status=answer.status_code)
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
                if content_length(answer) is None:
                    raise failure_of(error, self._transfer.timeout_seconds) from error
                return
            except httpx2.HTTPError as error:
                read_seconds = time.monotonic() - before
                if isinstance(error, httpx2.TimeoutException) and read_seconds < 0.9 * self._transfer.timeout_seconds:
                    raise TransientError(f"{received} bytes in {waited + read_seconds:.0f} s") from error
                raise failure_of(error, self._transfer.timeout_seconds) from error
            waited += time.monotonic() - before
            received += len(chunk)
            if not chunk:
                return
            if received > limit_bytes:
                raise RefusedError("a longer answer")
            yield chunk

    def _read_rest(self, answer: "httpx2.Response") -> bytes:
        """Read a short body that nobody has read, so that the connection can be used again, and for what it says."""
        chunks: list[bytes] = []
        length = 0 if answer.request.method == "HEAD" else content_length(answer)
        if length is None and not answer.is_success:  # bodies of refusals are often sent in chunks
            length = _SHORT_BODY_BYTES
        if not answer.is_stream_consumed and length is not None and length <= _SHORT_BODY_BYTES:
            with suppress(TransferFailureError):
                chunks.extend(self._body(answer, _SHORT_BODY_BYTES))
        return b"".join(chunks)

    def _leave_the_parent_s(self) -> None:
        if self._process != os.getpid():
            # Forked. The connections belong to the parent, and one of its threads may have held a lock.
            self._start_empty()

    def _client_of_this_process(self) -> "httpx2.Client":
        self._leave_the_parent_s()
        with self._lock:
            if self._client is None:
                self._client = _new_client(self._transfer.timeout_seconds)
            return self._client


def silence(*packages: str) -> None:
    """Let packages log nothing below WARNING: what they log there may hold addresses and headers with secrets."""
    for name in packages:
        logger = logging.getLogger(name)
        logger.setLevel(max(logging.WARNING, logger.level))


def _new_client(timeout_seconds: float) -> "httpx2.Client":
    import httpx2

    silence("httpx2", "httpcore2")  # which log the targets of redirects
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
        raise RefusedError("a proxy in the environment that cannot be used", "an http or https proxy") from error
    limit_connections(client)
    return client
