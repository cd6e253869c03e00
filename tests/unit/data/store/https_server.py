"""A local https server that serves a directory, counts connections and requests, and misbehaves on purpose."""

import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ANSWER_SECONDS = 60  # after which no thread of a server waits any more
SHORT_BODY = b"<p>What a server says in an answer without a file.</p>"


@dataclass
class Fault:
    """What happens to requests for a file.

    kind: `status`, `redirect`, `hang` (no answer), `stall` (an answer that stops after `value` bytes), `drop` (a
    connection that closes after `value` bytes), `hang up` (a whole answer, then a connection that closes), `shorter`
    (a complete answer of `value` bytes), `longer` (of `value` bytes more), `no ranges`, `other range` (206 with bytes
    from elsewhere), `compressed`, `chunked`.
    """

    kind: str
    value: int | str = 0
    times: int | None = None  # requests that it happens to; None: all
    methods: tuple[str, ...] = ("GET",)


class FileServer(ThreadingHTTPServer):
    """Files below `directory` by their path, over kept connections; a fault belongs to a file name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path, context: ssl.SSLContext | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.context = context
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.headers: list[dict[str, str]] = []  # of each request, by name in lower case
        self.more_headers: dict[str, str] = {}  # of every answer
        self.connections = 0  # whose TLS handshake is complete
        self.open_connections: set[tuple[str, int]] = set()
        self.stalled = threading.Event()  # a `hang` or `stall` has begun; it ends when `released` is set
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://localhost:{self.server_address[1]}"

    def asked(self, method: str, suffix: str = "") -> list[tuple[str, str, str | None]]:
        with self.lock:
            return [entry for entry in self.requests if entry[0] == method and entry[1].endswith(suffix)]

    def fault(self, method: str, name: str) -> Fault | None:
        with self.lock:
            fault = self.faults.get(name)
            if fault is None or method not in fault.methods or fault.times == 0:
                return None
            if fault.times is not None:
                fault.times -= 1
            return fault

    def get_request(self):
        connection, address = super().get_request()
        if self.context is not None:
            # The handshake happens in the connection's own thread, so that nobody can keep the others waiting.
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request_thread(self, request, client_address) -> None:
        super().process_request_thread(request, client_address)
        with self.lock:
            self.open_connections.discard(client_address)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that goes away is what the tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as usual: a body behind its header would wait for the client's acknowledgement
    server: FileServer

    def log_message(self, *arguments) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        if self.server.context is not None:
            self.request.do_handshake()
        with self.server.lock:
            self.server.connections += 1
            self.server.open_connections.add(self.client_address)

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer()

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    def _answer(self) -> None:
        server, byte_range = self.server, self.headers.get("Range")
        with server.lock:
            server.requests.append((self.command, self.path, byte_range))
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
        path = server.directory / self.path.lstrip("/")
        fault = server.fault(self.command, path.name) or Fault("")
        # Without a word in the answer: the client finds out.
        self.close_connection = fault.kind in ("hang", "stall", "drop", "hang up")
        if fault.kind == "hang":
            server.stalled.set()
            server.released.wait(ANSWER_SECONDS)
            return
        if fault.kind in ("status", "redirect"):
            status = 302 if fault.kind == "redirect" else int(fault.value)
            self._headers(status, len(SHORT_BODY), {"Location": str(fault.value)})
            if self.command == "GET":
                self.wfile.write(SHORT_BODY)
            return
        if not path.is_file():
            self._headers(404, 0, {})
            return
        content = path.read_bytes()
        status, headers = 200, {}
        if byte_range and fault.kind != "no ranges":
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", byte_range).groups())
            if first >= len(content):
                self._headers(416, 0, {"Content-Range": f"bytes */{len(content)}"})
                return
            if fault.kind == "other range":
                first, last = first + 1, last + 1
            status = 206
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content = content[first : last + 1]
        body = content
        if fault.kind == "shorter":
            content = body = content[: int(fault.value)]
        elif fault.kind == "longer":
            content = body = content + bytes(int(fault.value))
        elif fault.kind in ("stall", "drop"):
            body = content[: int(fault.value)]
        elif fault.kind == "compressed":
            headers["Content-Encoding"] = "gzip"
        elif fault.kind == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n"
        self._headers(status, len(content), headers)
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
        if fault.kind == "stall":
            server.stalled.set()
            server.released.wait(ANSWER_SECONDS)

    def _headers(self, status: int, num_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        if "Transfer-Encoding" not in headers:
            headers = {"Content-Length": str(num_bytes), **headers}
        for key, value in {**headers, **self.server.more_headers}.items():
            self.send_header(key, value)
        self.end_headers()


class Proxy(ThreadingHTTPServer):
    """An http proxy that opens tunnels (CONNECT), or answers `status` where that is no success."""

    daemon_threads = True

    def __init__(self, status: int = 200):
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.status = status
        self.tunnels: list[tuple[str, str | None]] = []  # host and port, Proxy-Authorization


class _ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def log_message(self, *arguments) -> None:
        pass

    def do_CONNECT(self) -> None:  # noqa: N802
        self.server.tunnels.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(self.server.status)
        self.end_headers()
        self.close_connection = True
        if self.server.status != 200:
            return
        host, port = self.path.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=30) as upstream:
            other = {self.connection: upstream, upstream: self.connection}
            while True:
                for ready in select.select(list(other), [], [], 30)[0]:
                    content = ready.recv(1 << 16)
                    if not content:
                        return
                    other[ready].sendall(content)


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost that is its own authority, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes the certificate of the test server")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    return certificate, key


@contextmanager
def serving(directory: Path, certificate: tuple[Path, Path] | None) -> Iterator[FileServer]:
    """Serve a directory until the block ends; without a certificate by plain http."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(os.fspath, certificate))
    with FileServer(directory, context) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join(ANSWER_SECONDS)


@contextmanager
def proxying(status: int = 200) -> Iterator[Proxy]:
    """A proxy that runs until the block ends."""
    with Proxy(status) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join(ANSWER_SECONDS)


@contextmanager
def trusted_server(
    directory: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileServer]:
    """Serve a directory by https; this process trusts the certificate, and no proxy stands between."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost")
    directory.mkdir(exist_ok=True)
    with serving(directory, certificate) as server:
        yield server
