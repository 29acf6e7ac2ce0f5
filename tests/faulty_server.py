"""A real HTTP server on loopback that fails in every way, for tests of what is read from URLs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves a folder; the first requests for a file go wrong as the server's `faults` say."""

    server: DatasetServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.server.requests.append((name, query))
        file = self.server.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        waiting = self.server.faults.get(name, [])
        (waiting.pop(0) if waiting else send)(self, file.read_bytes())

    def do_HEAD(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        file = self.server.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        size = self.server.stated.get(name, file.stat().st_size)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


def send(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def stall(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.server.stopped.wait(60)


def say_nothing(handler: Handler, data: bytes) -> None:
    handler.server.stopped.wait(60)


def cut(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])


def hang_up(handler: Handler, data: bytes) -> None:
    handler.connection.close()


def status(code: int) -> Fault:
    return lambda handler, data: handler.send_error(code)


def truncate(handler: Handler, data: bytes) -> None:
    send(handler, data[:-100])


def lengthen(handler: Handler, data: bytes) -> None:
    send(handler, data + bytes(100_000))


def alter(handler: Handler, data: bytes) -> None:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    send(handler, bytes(changed))


class DatasetServer(ThreadingHTTPServer):
    """An HTTP server of one folder, with the requests it has had: (file, query)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.stated: dict[str, int | None] = {}  # sizes, where HEAD is to tell another than the true one, or none
        self.stopped = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    @property
    def fetched(self) -> Counter[str]:
        """How often each file was asked for."""
        return Counter(name for name, _ in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up."""


@contextmanager
def serving(folder: Path) -> Iterator[DatasetServer]:
    """Serves a folder while the block runs."""
    server = DatasetServer(folder)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
