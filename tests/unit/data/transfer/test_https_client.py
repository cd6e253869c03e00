"""The https client: ranges, retries, redirects, certificates, and connections that are kept."""

import logging
import multiprocessing
import pickle
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ebft_mega.data.transfer.addresses import redirect_obstacle
from ebft_mega.data.transfer.answers import Asked
from ebft_mega.data.transfer.https_client import HttpsClient, Transfer
from ebft_mega.errors import DamagedDataError
from tests.unit.data.store.https_server import Fault, FileServer, proxying, serving

pytestmark = pytest.mark.timeout(60)

QUICK = Transfer(timeout_seconds=5, attempts=3, first_wait_seconds=0.001)
IMPATIENT = Transfer(timeout_seconds=1.5, attempts=1)
CONTENT = bytes(range(256)) * 40
sleep = time.sleep  # some tests replace it


@pytest.fixture
def url(server: FileServer) -> str:
    (server.directory / "file").write_bytes(CONTENT)
    return f"{server.url}/file"


def read_range(url: str, start: int, stop: int, transfer: Transfer = QUICK) -> bytes:
    return b"".join(HttpsClient(transfer).chunks(url, start, stop, len(CONTENT)))


@pytest.mark.parametrize(("start", "stop"), [(0, len(CONTENT)), (0, 1), (100, 5000), (len(CONTENT) - 1, len(CONTENT))])
def test_any_range_of_a_file_is_read(server: FileServer, url: str, start: int, stop: int) -> None:
    assert read_range(url, start, stop) == CONTENT[start:stop]
    whole = (start, stop) == (0, len(CONTENT))
    assert server.requests == [("GET", "/file", None if whole else f"bytes={start}-{stop - 1}")]
    assert read_range(url, start, start) == b""
    assert len(server.requests) == 1


def test_a_broken_connection_is_continued_where_it_broke(server: FileServer, url: str) -> None:
    server.faults["file"] = Fault("drop", 4000, times=2)
    assert read_range(url, 0, len(CONTENT)) == CONTENT
    asked = [entry[2] for entry in server.requests]
    assert asked == [None, f"bytes=4000-{len(CONTENT) - 1}", f"bytes=8000-{len(CONTENT) - 1}"]


def test_a_busy_server_is_asked_again(server: FileServer, url: str) -> None:
    for status in (500, 503, 429):
        server.faults["file"] = Fault("status", status, times=2)
        assert read_range(url, 10, 20) == CONTENT[10:20]


@pytest.mark.parametrize(
    ("fault", "position", "expected", "found", "requests"),
    [
        (Fault("status", 404), 16, "184 bytes", r"HTTP status 404 \(Not Found\)", 1),
        (Fault("status", 403), 16, "184 bytes", r"HTTP status 403 \(Forbidden\)", 1),
        (Fault("status", 500), 16, "184 bytes", r"HTTP status 500 .*attempt 3 of 3", 3),
        (Fault("drop", 60), 196, "4 bytes", "4 bytes early.*attempt 3 of 3", 3),
        (Fault("no ranges"), 16, "HTTP status 206", r"HTTP status 200 \(OK\)", 1),
        (Fault("other range"), 16, "bytes 16 to 199", "bytes 17 to 200", 1),
        (Fault("compressed"), 16, "184 bytes", "a compressed answer", 1),
    ],
)
def test_a_bad_answer_names_place_expected_and_found(
    server: FileServer, url: str, fault: Fault, position: int, expected: str, found: str, requests: int
) -> None:
    server.faults["file"] = fault
    with pytest.raises(DamagedDataError, match=found) as caught:
        read_range(url, 16, 200)
    assert (caught.value.shard, caught.value.offset) == (url, position)
    assert caught.value.expected.startswith(expected)
    assert caught.value.exit_code == 4
    assert len(server.requests) == requests


@pytest.mark.parametrize("fault", [Fault("hang"), pytest.param(Fault("stall", 60), marks=pytest.mark.slow)])
def test_a_server_that_hangs_is_left(server: FileServer, url: str, fault: Fault) -> None:
    server.faults["file"] = fault
    with pytest.raises(DamagedDataError, match=r"no answer within 1\.5 s \(attempt 1 of 1\)"):
        read_range(url, 16, 200, IMPATIENT)
    fault.times = 1
    assert read_range(url, 16, 200, replace(IMPATIENT, attempts=2, first_wait_seconds=0.001)) == CONTENT[16:200]


def test_only_a_failed_attempt_is_waited_after(server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("ebft_mega.data.transfer.https_client.time.sleep", waits.append)
    client = HttpsClient(Transfer())
    for _ in range(2):
        assert b"".join(client.chunks(url, 0, len(CONTENT), len(CONTENT))) == CONTENT
        assert client.size(url) == len(CONTENT)
        assert client.small_file(url, 1 << 20) == CONTENT
    assert waits == []
    server.faults["file"] = Fault("status", 500, methods=("GET", "HEAD"))
    for read in (lambda: list(client.chunks(url, 0, 5, len(CONTENT))), lambda: client.size(url)):
        waits.clear()
        with pytest.raises(DamagedDataError, match="attempt 5 of 5"):
            read()
        assert len(waits) == 4
        for number, wait in enumerate(waits):
            assert 0.25 * 2**number <= wait <= 0.75 * 2**number
    assert len(set(waits)) == 4


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("start", [0, 16])
def test_a_file_of_another_size_is_an_error_at_once(server: FileServer, url: str, start: int, change: int) -> None:
    (server.directory / "file").write_bytes((CONTENT + b"x")[: len(CONTENT) + change])
    expected = f"a file of {len(CONTENT)} bytes, found a file of {len(CONTENT) + change} bytes"
    with pytest.raises(DamagedDataError, match=expected):
        read_range(url, start, len(CONTENT))
    assert len(server.requests) == 1


def test_answers_without_a_length_are_counted(server: FileServer, url: str) -> None:
    server.faults["file"] = Fault("chunked")
    assert read_range(url, 0, len(CONTENT)) == CONTENT
    (server.directory / "file").write_bytes(CONTENT + b"x")
    with pytest.raises(DamagedDataError, match="a longer answer"):
        read_range(url, 0, len(CONTENT))


def test_an_unreachable_server_is_an_error(server: FileServer, url: str) -> None:
    closed = url.replace(str(server.server_address[1]), "1")
    with pytest.raises(DamagedDataError, match=r"refused.*attempt 3 of 3"):
        read_range(closed, 0, 5)


def test_a_size_of_thousands_of_digits_is_no_traceback(server: FileServer, url: str) -> None:
    digits = "9" * 5000
    server.more_headers = {"Content-Range": f"bytes 16-199/{digits}"}
    server.faults["file"] = Fault("status", 206)
    with pytest.raises(DamagedDataError, match="Content-Range 'bytes 16-199/9999"):
        read_range(url, 16, 200)
    server.more_headers = {"Content-Length": digits}
    for read in (HttpsClient(QUICK).size, lambda url: HttpsClient(QUICK).small_file(url, 100)):
        with pytest.raises(DamagedDataError):
            read(url)


def test_a_small_file_is_refused_by_the_size_it_announces(server: FileServer, url: str) -> None:
    server.faults["file"] = Fault("stall", 0)
    with pytest.raises(DamagedDataError, match=f"at most 100 bytes, found {len(CONTENT)} bytes"):
        HttpsClient(IMPATIENT).small_file(url, 100)


@pytest.mark.parametrize(
    ("target", "hosts", "obstacle"),
    [
        ("https://data.example/other", (), None),
        ("https://DATA.example:443/other", (), None),
        ("https://data.example:8443/other", (), "to data.example:8443, which"),
        ("https://data.example:8443/other", ("data.example",), "to data.example:8443, which"),
        ("https://data.example:8443/other", ("data.example:8443",), None),
        ("https://data.example.evil.example/", (), "to data.example.evil.example, which"),
        ("https://data.example./", (), "to data.example., which"),
        ("https://cdn.example/x?signature=s3cret", ("Cdn.Example",), None),
        ("https://cdn.example/x?signature=s3cret", (), "to cdn.example, which"),
        ("https://a.b.cdn.example/", ("*.cdn.example",), None),
        ("https://cdn.example/", ("*.cdn.example",), "to cdn.example, which"),
        ("https://evilcdn.example/", ("*.cdn.example",), "to evilcdn.example, which"),
        ("https://a.cdn.example:8443/", ("*.cdn.example",), "to a.cdn.example:8443, which"),
        ("https://a.cdn.example:8443/", ("*.cdn.example:8443",), None),
        ("https://169.254.169.254/latest/meta-data", ("cdn.example",), "to 169.254.169.254, which"),
        ("https://[::1]/", (), "to [::1], which"),
        ("https://[::1]/", ("[::1]",), None),
        ("https://[::1]:8443/", ("[::1]",), "to [::1]:8443, which"),
        ("https://[::1]:8443/", ("[::1]:8443",), None),
        ("http://data.example/", ("data.example", "data.example:80"), "to the scheme 'http'"),
        ("https://user:s3cret@data.example/", (), "with a user or password"),
    ],
)
def test_a_redirect_leads_to_the_server_itself_and_to_named_hosts(
    target: str, hosts: tuple[str, ...], obstacle: str | None
) -> None:
    import httpx2

    found = redirect_obstacle(httpx2.URL("https://data.example/file"), httpx2.URL(target), hosts)
    assert found == obstacle if obstacle is None else found is not None and found.startswith(obstacle)
    assert "s3cret" not in str(found)


def test_a_circle_of_redirects_ends(server: FileServer, url: str) -> None:
    server.faults["file"] = Fault("redirect", url)
    with pytest.raises(DamagedDataError, match="not followed: more than 10 in a row"):
        read_range(url, 0, 5)
    assert len(server.requests) == 11


def test_a_redirect_to_no_address_is_refused_at_once(server: FileServer, url: str) -> None:
    server.faults["file"] = Fault("redirect", "https://s3cret:[::1/file")
    with pytest.raises(DamagedDataError, match="a redirect that is not followed") as caught:
        read_range(url, 0, 5)
    assert "s3cret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("host", ["host..example", "h\u00f6st..example"])
def test_a_host_that_cannot_exist_is_refused_at_once(host: str) -> None:
    with pytest.raises(DamagedDataError, match="no valid address$"):
        read_range(f"https://{host}/file", 0, 5)


def test_an_unknown_certificate_is_refused_at_once(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DamagedDataError, match="certificate verify failed"):
        read_range(url, 0, 5)
    assert server.requests == []


def test_a_certificate_of_another_host_is_refused(server: FileServer, url: str) -> None:
    with pytest.raises(DamagedDataError, match="certificate"):
        read_range(url.replace("localhost", "127.0.0.1"), 0, 5)


def test_sizes_are_asked_without_the_contents(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    assert client.size(url) == len(CONTENT)
    for fault in (
        Fault("status", 405, methods=("HEAD",)),
        Fault("status", 403, methods=("HEAD",)),
        Fault("chunked", methods=("HEAD",)),
    ):
        server.faults["file"] = fault
        server.requests.clear()
        assert client.size(url) == len(CONTENT)
        assert server.requests == [("HEAD", "/file", None), ("GET", "/file", "bytes=0-0")]
    server.faults["file"] = Fault("status", 405, methods=("HEAD",))
    (server.directory / "file").write_bytes(b"")
    assert client.size(url) == 0
    server.faults["file"] = Fault("hang", methods=("HEAD",))
    with pytest.raises(DamagedDataError, match="no answer within"):
        HttpsClient(IMPATIENT).size(url)
    with pytest.raises(DamagedDataError, match="404"):
        client.size(url + "2")


def test_redirects_lead_to_https_only(server: FileServer, url: str, certificate, tmp_path: Path) -> None:
    (server.directory / "other").write_bytes(CONTENT)
    server.faults["file"] = Fault("redirect", f"{server.url}/other", methods=("GET", "HEAD"))
    client = HttpsClient(QUICK)
    assert read_range(url, 7, 70) == CONTENT[7:70]
    assert client.size(url) == len(CONTENT)
    assert server.requests[1] == ("GET", "/other", "bytes=7-69")
    assert server.requests[3] == ("HEAD", "/other", None)
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    with serving(server.directory, None) as plain:
        for target in (f"{plain.url}/other", f"file://{secret}", f"pipe:cat {secret}", "ftp://localhost/other", ""):
            server.faults["file"] = Fault("redirect", target, methods=("GET", "HEAD"))
            with pytest.raises(DamagedDataError, match=r"302 \(Found\), a redirect that is not followed") as caught:
                read_range(url, 0, len(CONTENT))
            assert not target or target not in str(caught.value)
        assert plain.requests == []
    server.faults["file"] = Fault("redirect", url)
    with pytest.raises(DamagedDataError, match="302"):
        read_range(url, 0, 5)


def test_the_generator_of_the_random_module_is_left_alone(server: FileServer, url: str) -> None:
    import random

    server.faults["file"] = Fault("status", 500, times=2)
    before = random.getstate()
    read_range(url, 0, 5)
    assert random.getstate() == before


# Redirects, headers and the environment.


def test_every_redirect_of_a_chain_leads_to_https(server: FileServer, url: str) -> None:
    with serving(server.directory, None) as plain:
        server.faults["file"] = Fault("redirect", f"{server.url}/second")
        for target in (f"{plain.url}/file", url.replace("https:", "http:"), url.replace("//", "//user:secret@")):
            server.faults["second"] = Fault("redirect", target)
            server.requests.clear()
            with pytest.raises(DamagedDataError, match="a redirect that is not followed") as caught:
                read_range(url, 3, 30)
            assert [entry[1] for entry in server.requests] == ["/file", "/second"]
            assert "secret" not in str(caught.value)
        assert plain.requests == []


def test_a_redirect_to_another_server_asks_it_for_the_same_range(
    server: FileServer, url: str, certificate: tuple[Path, Path]
) -> None:
    with serving(server.directory, certificate) as other:
        server.faults["file"] = Fault("redirect", f"{other.url}/file?signature=a%2Fb&until=1")
        (server.directory / "file?signature=a%2Fb&until=1").write_bytes(CONTENT)
        host = other.url.removeprefix("https://")
        client = HttpsClient(replace(QUICK, redirect_hosts=(host,)))
        for _ in range(3):
            assert b"".join(client.chunks(url, 7, 70, len(CONTENT))) == CONTENT[7:70]
        assert other.requests == [("GET", "/file?signature=a%2Fb&until=1", "bytes=7-69")] * 3
        assert other.headers[0]["host"] == other.url.removeprefix("https://")
        assert (server.connections, other.connections) == (1, 1)
        # Without a port an entry stands for 443.
        for hosts in ((), ("localhost",), (f"elsewhere:{other.server_address[1]}",)):
            with pytest.raises(DamagedDataError) as caught:
                list(HttpsClient(replace(QUICK, redirect_hosts=hosts)).chunks(url, 7, 70, len(CONTENT)))
            found = f"to {host}, which is neither this server nor one of data.redirect_hosts"
            assert caught.value.found == f"HTTP status 302 (Found), a redirect that is not followed: {found}"
        assert len(other.requests) == 3


def test_what_is_sent_says_nothing_of_this_machine_or_of_earlier_answers(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "more_headers", {"Set-Cookie": "session=1; Path=/"})
    client = HttpsClient(QUICK)
    for _ in range(2):
        client.size(url)
    host = server.url.removeprefix("https://")
    sent = {"host": host, "accept": "*/*", "accept-encoding": "identity", "user-agent": "ebft-mega"}
    assert server.headers == [sent | {"connection": "keep-alive"}] * 2


def test_targets_of_redirects_are_not_logged(server: FileServer, url: str, caplog: pytest.LogCaptureFixture) -> None:
    (server.directory / "secret").write_bytes(CONTENT)
    server.faults["file"] = Fault("redirect", f"{server.url}/secret")
    with caplog.at_level(logging.DEBUG):
        assert read_range(url, 3, 30) == CONTENT[3:30]
    assert "secret" not in caplog.text


def test_authorities_may_lie_in_a_directory(
    server: FileServer, url: str, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(certificate[0])]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    authorities = tmp_path / "authorities"
    authorities.mkdir()
    (authorities / f"{name}.0").write_bytes(certificate[0].read_bytes())
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", str(authorities))
    assert read_range(url, 3, 30) == CONTENT[3:30]


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "ALL_PROXY"])
def test_the_proxy_of_the_environment_is_used(
    server: FileServer, url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxying() as proxy:
        address = f"http://user:secret@127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv(name, address)
        assert read_range(url, 3, 30) == CONTENT[3:30]
        assert proxy.tunnels == []  # NO_PROXY
        for variable in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(variable, "elsewhere")
        client = HttpsClient(QUICK)
        for _ in range(3):
            assert b"".join(client.chunks(url, 3, 30, len(CONTENT))) == CONTENT[3:30]
        assert proxy.tunnels == [(server.url.removeprefix("https://"), "Basic dXNlcjpzZWNyZXQ=")]


def test_a_proxy_that_refuses_is_named_without_its_password(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "elsewhere")
    with proxying(status=407) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{proxy.server_address[1]}")
        with pytest.raises(DamagedDataError, match="Tunnel connection failed: 407 .*attempt 3 of 3"):
            read_range(url, 3, 30)
    for address in ("gopher://user:secret@localhost", "http://user:secret@[::1", "socks5://user:secret@localhost"):
        monkeypatch.setenv("HTTPS_PROXY", address)
        with pytest.raises(DamagedDataError, match="a proxy in the environment that cannot be used") as caught:
            read_range(url, 3, 30)
        assert "secret" not in str(caught.value)
    assert server.requests == []


# Connections.


def test_reads_one_after_the_other_share_a_connection(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    for start in range(0, 5000, 500):
        assert b"".join(client.chunks(url, start, start + 500, len(CONTENT))) == CONTENT[start : start + 500]
    assert client.size(url) == len(CONTENT)
    assert client.small_file(url, 1 << 20) == CONTENT
    assert client.small_file(url + "2", 1 << 20) is None
    server.faults["file"] = Fault("status", 503, times=2, methods=("GET", "HEAD"))
    assert client.size(url) == len(CONTENT)
    server.faults["file"] = Fault("status", 405, methods=("HEAD",))
    assert client.size(url) == len(CONTENT)
    server.faults["file"] = Fault("chunked")
    assert client.small_file(url, 1 << 20) == CONTENT
    assert len(server.requests) == 19
    assert server.connections == 1


def test_threads_share_a_client_and_not_a_connection(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)

    def read(start: int) -> bool:
        return b"".join(client.chunks(url, start, start + 300, len(CONTENT))) == CONTENT[start : start + 300]

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(read, range(0, 8000, 100)))
    assert len(server.requests) == 80
    assert 1 <= server.connections <= 4


def test_connections_leave_the_context_that_they_share_alone(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL frees the old list of protocols while another thread may be copying it into its handshake."""
    protocols: list[list[str]] = []
    original = ssl.SSLContext.set_alpn_protocols

    def record(context: ssl.SSLContext, names: list[str]) -> None:
        protocols.append(names)
        original(context, names)

    monkeypatch.setattr(ssl.SSLContext, "set_alpn_protocols", record)
    client = HttpsClient(QUICK)
    server.faults["file"] = Fault("hang up", methods=("GET", "HEAD"))
    for number in range(3):
        assert client.size(url) == len(CONTENT)
        wait_until(lambda: len(server.open_connections) == 0)
        assert server.connections == number + 1
    assert protocols == [["http/1.1"]]


def test_a_connection_that_the_server_closed_costs_no_attempt(
    server: FileServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("ebft_mega.data.transfer.https_client.time.sleep", waits.append)
    server.faults["file"] = Fault("hang up")
    client = HttpsClient(replace(QUICK, attempts=1))
    for number in range(3):
        assert b"".join(client.chunks(url, 3, 30, len(CONTENT))) == CONTENT[3:30]
        assert server.connections == number + 1
        wait_until(lambda: len(server.open_connections) == 0)
    assert waits == []


def test_an_answer_that_is_left_in_the_middle_ends_its_connection(server: FileServer, url: str) -> None:
    (server.directory / "file").write_bytes(CONTENT * 200)
    client = HttpsClient(QUICK)
    chunks = client.chunks(url, 0, len(CONTENT) * 200, len(CONTENT) * 200)
    next(chunks)
    chunks.close()
    assert b"".join(client.chunks(url, 3, 30, len(CONTENT) * 200)) == CONTENT[3:30]
    assert server.connections == 2
    wait_until(lambda: len(server.open_connections) == 1)


def test_connections_end_with_their_client(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    assert client.size(url) == len(CONTENT)
    assert len(server.open_connections) == 1
    del client
    wait_until(lambda: len(server.open_connections) == 0)


def test_closing_a_client_leaves_an_answer_that_is_being_read(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    assert client.size(url) == len(CONTENT)
    client.close()
    wait_until(lambda: len(server.open_connections) == 0)
    large = CONTENT * 200
    (server.directory / "file").write_bytes(large)
    chunks = client.chunks(url, 0, len(large), len(large))
    first = next(chunks)
    client.close()
    assert len(server.open_connections) == 1
    assert first + b"".join(chunks) == large
    assert len(server.requests) == 2
    wait_until(lambda: len(server.open_connections) == 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_has_connections_of_its_own(server: FileServer, url: str, method: str) -> None:
    client = HttpsClient(QUICK)
    assert client.size(url) == len(CONTENT)
    context = multiprocessing.get_context(method)
    # In the middle of an answer: bytes that the other process took from this connection would be missed here.
    chunks = client.chunks(url, 0, len(CONTENT), len(CONTENT))
    first = next(chunks)
    with client._lock:  # as one of this process's other threads may
        workers = [context.Process(target=client.size, args=(url,)) for _ in range(2)]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert first + b"".join(chunks) == CONTENT
    assert client.size(url) == len(CONTENT)
    assert server.connections == 3
    assert len(server.open_connections) == 1


def test_a_forked_process_gives_up_the_connections_of_its_parent(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    assert client.size(url) == len(CONTENT)
    context = multiprocessing.get_context("fork")
    asked, end = context.Event(), context.Event()
    worker = context.Process(target=ask_and_wait, args=(client, url, asked, end))
    worker.start()
    try:
        assert asked.wait(30)
        assert server.connections == 2
        del client
        wait_until(lambda: len(server.open_connections) == 1)  # the worker's
    finally:
        end.set()
        worker.join(30)
    assert worker.exitcode == 0


def ask_and_wait(client: HttpsClient, url: str, asked, end) -> None:
    client.size(url)
    asked.set()
    end.wait(30)


def test_a_pickled_client_has_no_connections(server: FileServer, url: str) -> None:
    client = HttpsClient(QUICK)
    for number in range(3):
        assert server.connections == number
        assert client.size(url) == len(CONTENT)
        client = pickle.loads(pickle.dumps(client))


def test_httpx2_is_loaded_by_the_first_request() -> None:
    code = (
        "import sys\n"
        "from ebft_mega.data.transfer.https_client import HttpsClient, Transfer\n"
        "HttpsClient(Transfer())\n"
        "assert 'httpx2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        sleep(0.005)


class KeyedClient(HttpsClient):
    """Sends a header of its own."""

    def _asked(self, method: str, url: str) -> Asked:
        return Asked(method, url, {"X-Key": "planted"})


def test_headers_of_a_store_are_not_sent_where_its_server_redirects_to(
    server: FileServer, url: str, certificate: tuple[Path, Path]
) -> None:
    with serving(server.directory, certificate) as other:
        server.faults["file"] = Fault("redirect", f"{other.url}/file", methods=("GET",))
        transfer = replace(QUICK, redirect_hosts=(other.url.removeprefix("https://"),))
        assert KeyedClient(transfer).small_file(url, 1 << 20) == CONTENT
        assert [headers.get("x-key") for headers in server.headers] == ["planted"]
        assert [headers.get("x-key") for headers in other.headers] == [None]
