"""A server that says what a test writes, byte for byte, as slowly as the test wants it; by https or by plain TCP."""

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ANSWER_SECONDS = 30  # after which no thread of the server waits any more
Say = Callable[[bytes], None]


class DrippingServer:
    """Answers each connection with `answer`, which gets a function that sends bytes and fails when nobody listens."""

    def __init__(self, answer: Callable[[Say], None], context: ssl.SSLContext | None, handshake: bool = True):
        self._answer, self._context, self._handshake = answer, context, handshake
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"https://localhost:{self.port}"
        self.requests: list[bytes] = []
        self.ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self.ended.set()
        # A close alone leaves a thread in `accept`.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_SECONDS)
        with suppress(OSError):
            if self._context is not None and self._handshake:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                if self._handshake:
                    self.requests.append(connection.recv(1 << 16))
                self._answer(connection.sendall)

    def drip(self, say: Say, text: bytes, seconds: float = 0.02) -> None:
        """Say a text byte by byte, until somebody goes away."""
        for byte in text:
            if self.ended.wait(seconds):
                return
            say(bytes([byte]))

    def drip_for_ever(self, say: Say, text: bytes, seconds: float = 0.02) -> None:
        """Say a text again and again; the test's own time limit ends a client that listens for ever."""
        until = time.monotonic() + ANSWER_SECONDS
        while not self.ended.is_set() and time.monotonic() < until:
            self.drip(say, text, seconds)


@contextmanager
def dripping(
    answer: Callable[["DrippingServer", Say], None], certificate: tuple[Path, Path] | None, handshake: bool = True
) -> Iterator[DrippingServer]:
    """Serve until the block ends; without a certificate by plain TCP."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(os.fspath, certificate))
    server = DrippingServer(lambda say: answer(server, say), context, handshake)
    try:
        yield server
    finally:
        server.close()
