"""A whole answer of a server is bounded by time, wherever it stands still or drips."""

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ebft_mega.data.transfer import connections
from ebft_mega.data.transfer.https_client import HttpsClient, Transfer
from ebft_mega.errors import DamagedDataError
from tests.unit.data.transfer.dripping_server import DrippingServer, Say, dripping

pytestmark = pytest.mark.timeout(60)

LIMIT = 0.2  # seconds
SHORT = Transfer(timeout_seconds=LIMIT, attempts=1)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n"


@pytest.fixture(autouse=True)
def trust(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost")


def taken(read: Callable[[], object]) -> tuple[str, float]:
    """What a failing read says, and how long it took."""
    before = time.monotonic()
    with pytest.raises(DamagedDataError) as caught:
        read()
    return caught.value.found, time.monotonic() - before


def header_drips(server: DrippingServer, say: Say) -> None:
    server.drip(say, HEAD + b"X-Long: " + b"x" * 2000)


def header_lines_drip(server: DrippingServer, say: Say) -> None:
    say(HEAD)
    server.drip_for_ever(say, b"X: y\r\n")


def informational_answers_for_ever(server: DrippingServer, say: Say) -> None:
    while not server.ended.wait(0.02):
        say(b"HTTP/1.1 103 Early Hints\r\n\r\n")


def body_drips(server: DrippingServer, say: Say) -> None:
    say(HEAD + b"\r\n")
    server.drip(say, b"x" * 5000)


def chunks_drip(server: DrippingServer, say: Say) -> None:
    say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    server.drip_for_ever(say, b"1\r\nx\r\n")


def extension_of_a_chunk_drips(server: DrippingServer, say: Say) -> None:
    say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;")
    server.drip_for_ever(say, b"name=value;")


def trailer_drips(server: DrippingServer, say: Say) -> None:
    say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
    server.drip_for_ever(say, b"X: y\r\n")


DRIPS = (
    *(header_drips, header_lines_drip, informational_answers_for_ever),
    *(body_drips, chunks_drip, extension_of_a_chunk_drips, trailer_drips),
)


@pytest.mark.parametrize("answer", DRIPS, ids=lambda answer: answer.__name__)
def test_an_answer_that_drips_ends_in_time(certificate: tuple[Path, Path], answer: Callable) -> None:
    slowest = replace(SHORT, minimum_bytes_per_second=1e9)
    with dripping(answer, certificate) as server:
        found, seconds = taken(lambda: HttpsClient(slowest).small_file(f"{server.url}/file", 1 << 20))
        assert "no answer within" in found or "bytes in 0 s" in found
        assert LIMIT / 2 < seconds < 5 * LIMIT


def test_a_trickle_is_broken_off_by_its_average(certificate: tuple[Path, Path]) -> None:
    with dripping(body_drips, certificate) as server:
        transfer = replace(SHORT, minimum_bytes_per_second=1000)
        found, _ = taken(lambda: list(HttpsClient(transfer).chunks(f"{server.url}/file", 0, 5000, 5000)))
        assert re.fullmatch(r"[0-9]+ bytes in 0 s \(attempt 1 of 1\)", found)
        # 20 ms a byte are 50 bytes a second.
        steady = replace(SHORT, minimum_bytes_per_second=1)
        chunks = HttpsClient(steady).chunks(f"{server.url}/file", 0, 5000, 5000)
        assert len(b"".join(itertools.islice(chunks, 30))) >= 30


@pytest.mark.parametrize("answer", [header_drips, body_drips], ids=lambda answer: answer.__name__)
def test_ranges_and_sizes_that_drip_end_in_time(certificate: tuple[Path, Path], answer: Callable) -> None:
    slowest = replace(SHORT, minimum_bytes_per_second=1e9)
    with dripping(answer, certificate) as server:
        client = HttpsClient(slowest)
        assert taken(lambda: list(client.chunks(f"{server.url}/file", 0, 5000, 5000)))[1] < 5 * LIMIT
        if answer is header_drips:
            assert taken(lambda: client.size(f"{server.url}/file"))[1] < 5 * LIMIT


def test_redirects_one_after_another_share_the_time(certificate: tuple[Path, Path]) -> None:
    def redirect(server: DrippingServer, say: Say) -> None:
        server.drip(say, f"HTTP/1.1 302 Found\r\nLocation: {server.url}/file\r\n".encode(), 0.002)
        say(b"Content-Length: 0\r\nConnection: close\r\n\r\n")

    with dripping(redirect, certificate) as server:
        transfer = replace(SHORT, timeout_seconds=0.6)
        found, seconds = taken(lambda: HttpsClient(transfer).small_file(f"{server.url}/file", 1 << 20))
        assert "no answer within" in found
        assert seconds < 3
        assert 1 < len(server.requests) < 10


def test_a_handshake_that_stands_still_or_drips_ends_in_time(certificate: tuple[Path, Path]) -> None:
    def nothing(server: DrippingServer, say: Say) -> None:
        server.ended.wait(30)

    def record(server: DrippingServer, say: Say) -> None:
        server.drip(say, b"\x16\x03\x03\x40\x00" + bytes(2000))

    for answer in (nothing, record):
        with dripping(answer, None, handshake=False) as server:
            found, seconds = taken(lambda server=server: HttpsClient(SHORT).size(f"{server.url}/file"))
            assert "no answer within" in found
            assert seconds < 5 * LIMIT


def test_a_proxy_that_drips_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "elsewhere")
    with dripping(header_drips, None) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        found, seconds = taken(lambda: HttpsClient(SHORT).size("https://localhost:9/file"))
        assert "no answer within" in found
        assert seconds < 5 * LIMIT
        assert proxy.requests[0].startswith(b"CONNECT localhost:9 ")


def test_a_server_behind_a_proxy_by_https_ends_in_time(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake with the server happens inside the proxy's, and its records drip."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "elsewhere")

    def tunnel(server: DrippingServer, say: Say) -> None:
        say(b"HTTP/1.1 200 OK\r\n\r\n")
        server.drip(say, b"\x16\x03\x03\x40\x00" + bytes(2000))

    with dripping(tunnel, certificate) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"https://localhost:{proxy.port}")
        found, seconds = taken(lambda: HttpsClient(SHORT).size("https://localhost:9/file"))
        assert LIMIT / 2 < seconds < 5 * LIMIT, found
        assert proxy.requests[0].startswith(b"CONNECT localhost:9 ")


def test_a_name_server_that_stays_silent_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: silent.wait(30) and [])
    found, seconds = taken(lambda: HttpsClient(SHORT).size("https://localhost:9/file"))
    silent.set()
    assert "no answer within" in found
    assert seconds < 5 * LIMIT


def test_an_address_that_stays_silent_leaves_time_for_the_others(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(server: DrippingServer, say: Say) -> None:
        say(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n")

    full = socket.create_server(("127.0.0.2", 0), backlog=0)
    port = full.getsockname()[1]
    waiting = [socket.socket() for _ in range(3)]
    for connection in waiting:  # the queue is full: a further one gets no answer
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.2", port))
    with dripping(answer, certificate) as server:
        lookup = socket.getaddrinfo

        def two(host: str, asked: int, *arguments, **named):
            both = [("127.0.0.2", port), ("127.0.0.1", server.port)]
            if host == "localhost":
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in both]
            return lookup(host, port if host == "127.0.0.2" else asked, *arguments, **named)

        monkeypatch.setattr(socket, "getaddrinfo", two)
        assert HttpsClient(replace(SHORT, timeout_seconds=2)).size(f"{server.url}/file") == 7
    for connection in (full, *waiting):
        connection.close()


def test_limits_lie_within_each_other() -> None:
    with connections.answer_within(10):
        outer = connections._limit.at
        with connections.answer_within(20):
            assert connections._limit.at == outer
        with connections.answer_within(5):
            assert connections._limit.at < outer - 4
        assert connections._limit.at == outer
        seen: list[float] = []
        thread = threading.Thread(target=lambda: seen.append(connections._limit.at))
        thread.start()
        thread.join(30)
        assert seen == [float("inf")]
    assert connections._limit.at == float("inf")


def test_a_library_without_a_place_for_limits_is_refused() -> None:
    import httpx2

    client = httpx2.Client()
    del client._transport._pool._network_backend
    with pytest.raises(RuntimeError, match="no place for a network backend"):
        connections.limit_connections(client)
