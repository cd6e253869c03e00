"""A local http server whose answers a function gives; it records what it is asked."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]


class ScriptedServer(ThreadingHTTPServer):
    """Answers GET and HEAD with what `answer(method, path, query, headers)` gives, ranges of whole files too."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, str, str, dict[str, str]], Answer]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path with query, headers in lower case

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ScriptedServer

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer()

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers))
        parts = urlsplit(self.path)
        status, more, body = self.server.answer(self.command, unquote(parts.path), parts.query, headers)
        if status == 200 and (asked := headers.get("range")):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            more = more | {"Content-Range": f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"}
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | more).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def scripted(answer: Callable[[str, str, str, dict[str, str]], Answer]) -> Iterator[ScriptedServer]:
    """Run a server for the time of the block."""
    server = ScriptedServer(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
