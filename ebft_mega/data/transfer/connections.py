"""Connections to servers: limits of time for whole answers, however slowly their bytes drip. Imports no torch.

The timeouts of sockets are for single reads: a server that sends a byte a second never meets them. Here the thread that
asks sets a limit (`answer_within`), and every operation on its connection ends with it: looking the host up,
connecting, the handshake of TLS, a proxy's tunnel, each line of a header, each byte of a body.
"""

import math
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

    import httpcore2
    import httpx2


class _Limit(threading.local):
    at = math.inf  # of `time.monotonic`


_limit = _Limit()


@contextmanager
def answer_within(seconds: float) -> Iterator[None]:
    """Let everything that the calling thread sends and receives inside the block end in time.

    Raises:
        httpx2.TimeoutException: inside the block, by the operation that meets the limit. Limits around this one hold.
    """
    before = _limit.at
    _limit.at = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _limit.at = before


def shared_context() -> "ssl.SSLContext":
    """Make a TLS context that threads may share, which httpcore2 assumes and does not see to.

    It sets the protocols anew for each connection. OpenSSL then frees the list that another thread may be copying into
    its handshake: the server gets bytes of freed memory and answers "decode error".
    """
    import ssl

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    vars(context)["set_alpn_protocols"] = lambda protocols: None
    return context


def limit_connections(client: "httpx2.Client") -> None:
    """Make all connections of a client, through proxies too, obey `answer_within`; before its first request."""
    for transport in (client._transport, *client._mounts.values()):
        if transport is None:  # addresses that NO_PROXY names
            continue
        pool: Any = getattr(transport, "_pool", None)
        if not hasattr(pool, "_network_backend"):
            raise RuntimeError("this version of httpx2 has no place for a network backend")
        pool._network_backend = _LimitedBackend()


def _seconds_left(timeout: float | None) -> float:
    import httpcore2

    left = min(math.inf if timeout is None else timeout, _limit.at - time.monotonic())
    if left <= 0:
        raise httpcore2.ReadTimeout("the limit for the whole answer")
    return left


class _LimitedBackend:
    """Opens connections (a `httpcore2.NetworkBackend`)."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> "_LimitedStream":
        import httpcore2

        backend, failure = httpcore2.SyncBackend(), None
        addresses = _addresses(host, port, _seconds_left(timeout))
        for tried, address in enumerate(addresses):
            # One that never answers leaves time for the others.
            seconds = _seconds_left(timeout) / (len(addresses) - tried)
            try:
                return _LimitedStream(backend.connect_tcp(address, port, seconds, local_address, socket_options))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = failure or error
        raise failure or httpcore2.ConnectError("no address")


def _addresses(host: str, port: int, seconds: float) -> list[str]:
    """Look a host's numeric addresses up, in a thread of its own: the system's call for it has no timeout."""
    import httpcore2

    found: list[str] = []
    failures: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:  # the latter: a host without a form for the DNS
            failures.append(error)

    thread = threading.Thread(target=look_up, name="host-address", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        if isinstance(failures[0], UnicodeError):
            raise failures[0]
        raise httpcore2.ConnectError(str(failures[0])) from failures[0]
    if not found:
        raise httpcore2.ConnectTimeout("the host's address")
    return list(dict.fromkeys(found))


class _LimitedStream:
    """A connection (a `httpcore2.NetworkStream`) that ends its operations with the limit of the calling thread."""

    def __init__(self, stream: "httpcore2.NetworkStream", is_tunnelled: bool = False):
        self._stream = stream
        # TLS inside TLS (a proxy that speaks https) waits several times in one operation.
        self._is_tunnelled = is_tunnelled

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._interrupted(timeout) as left:
            return self._stream.read(max_bytes, left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with self._interrupted(timeout) as left:
            self._stream.write(buffer, left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: "ssl.SSLContext", server_hostname: str | None = None, timeout: float | None = None
    ) -> "_LimitedStream":
        is_tunnelled = self._stream.get_extra_info("ssl_object") is not None
        inside = _LimitedStream(self._stream, is_tunnelled)
        with inside._interrupted(timeout) as left:
            return _LimitedStream(self._stream.start_tls(ssl_context, server_hostname, left), is_tunnelled)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    @contextmanager
    def _interrupted(self, timeout: float | None) -> Iterator[float]:
        left = _seconds_left(timeout)
        if not self._is_tunnelled:
            yield left
            return
        # Only a shutdown, not a close: the number of a closed descriptor may belong to another connection next.
        connection = self._stream.get_extra_info("socket")
        timer = threading.Timer(left, _shut_down, [connection])
        timer.daemon = True
        timer.start()
        try:
            yield left
        finally:
            timer.cancel()


def _shut_down(connection: socket.socket) -> None:
    try:
        # Of the socket below TLS, whose own `shutdown` would drop the state that the other thread is using.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # closed already
