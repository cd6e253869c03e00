"""A local https server that serves a directory, counts requests, and misbehaves on purpose."""

import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Fault:
    """What happens to requests for a file.

    kind: `status`, `redirect`, `hang` (no answer), `stall` (an answer that stops after `value` bytes), `drop` (a
    connection that closes after `value` bytes), `shorter` (a complete answer of `value` bytes), `longer` (of `value`
    bytes more), `no ranges`, `other range` (206 with bytes from elsewhere), `compressed`, `chunked`.
    """

    kind: str
    value: int | str = 0
    times: int | None = None  # requests that it happens to; None: all
    methods: tuple[str, ...] = ("GET",)


class FileServer(ThreadingHTTPServer):
    """Files below `directory` by their path; a fault belongs to a file name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path, context: ssl.SSLContext | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.context = context
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
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

    def handle_error(self, request, client_address) -> None:
        pass  # a client that goes away is what the tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer()

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    def _answer(self) -> None:
        self.close_connection = True
        server, byte_range = self.server, self.headers.get("Range")
        with server.lock:
            server.requests.append((self.command, self.path, byte_range))
        path = server.directory / self.path.lstrip("/")
        fault = server.fault(self.command, path.name) or Fault("")
        if fault.kind == "hang":
            server.stalled.set()
            server.released.wait()
            return
        if fault.kind in ("status", "redirect"):
            self._headers(302 if fault.kind == "redirect" else int(fault.value), 0, {"Location": str(fault.value)})
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
            server.released.wait()

    def _headers(self, status: int, num_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        if "Transfer-Encoding" not in headers:
            headers = {"Content-Length": str(num_bytes), **headers}
        for key, value in {**headers, "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()


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
    """Serves a directory until the block ends; without a certificate by plain http."""
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
            thread.join()


@contextmanager
def trusted_server(
    directory: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileServer]:
    """Serves a directory by https; this process trusts the certificate, and no proxy stands between."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost")
    directory.mkdir(exist_ok=True)
    with serving(directory, certificate) as server:
        yield server
