"""A search server that misbehaves on demand: real sockets, and HTTP written by hand where a fault needs it."""

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from searche1_lite.search.base import Retriever

Answer = bytes | Callable[[socket.socket, threading.Event], None]
"""What is sent, or who sends it; the event is set when the server closes."""


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    about = [f"Content-Length: {len(body)}", "Content-Type: application/json", "Connection: close"]  # as it does
    lines = [f"HTTP/1.1 {status}", *about, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def as_json(value: Any) -> bytes:
    return reply("200 OK", json.dumps(value).encode())


def say_nothing(connection: socket.socket, closing: threading.Event) -> None:
    closing.wait(60)


def _drip(connection: socket.socket, closing: threading.Event, text: bytes) -> None:
    for _ in range(3_000):
        connection.sendall(text)
        if closing.wait(0.02):
            return


def drip_headers(connection: socket.socket, closing: threading.Event) -> None:
    """A byte at a time, for a minute: no single one is late."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    _drip(connection, closing, b"x")


def drip_body(connection: socket.socket, closing: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    _drip(connection, closing, b" ")


def flood(connection: socket.socket, closing: threading.Event) -> None:
    """An answer without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not closing.is_set():
        connection.sendall(b" " * 2**20)


def reset(connection: socket.socket, closing: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class FaultyServer(socketserver.ThreadingTCPServer):
    """Answers like Search-R1's server, but for the `faults` that it has been given, each of which comes once, in order.

    Args:
        retriever: what is searched.
        port: 0 for a free one.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, retriever: Retriever, port: int = 0) -> None:
        self.retriever = retriever
        self.faults: list[Answer] = []
        self.always: Answer | None = None
        """Given where there is no fault left, once `good` requests have been answered."""
        self.good = 0
        self.asked: list[dict[str, Any]] = []
        """The bodies of all requests."""
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/retrieve"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this is for."""

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            if self.faults:
                return self.faults.pop(0)
        if self.always is not None and len(self.asked) > self.good:
            return self.always
        return as_json({"result": self.hits(body["queries"], body["topk"])})

    def hits(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        return [
            [
                {"document": {"id": p.id, "contents": f'"{p.title}"\n{p.text}'}, "score": p.score}
                for p in passages
            ]
            for passages in self.retriever.search(queries, k)
        ]  # fmt: skip


class _Handler(socketserver.StreamRequestHandler):
    server: FaultyServer

    def handle(self) -> None:
        method, path, _ = self.rfile.readline().decode().split(" ", 2)
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if (method, path) != ("POST", "/retrieve"):
            self.wfile.write(reply("404 Not Found"))
            return
        answer = self.server.answer(json.loads(body), headers)
        if isinstance(answer, bytes):
            self.wfile.write(answer)
        else:
            answer(self.connection, self.server.closing)


@contextmanager
def faulty_server(retriever: Retriever, port: int = 0) -> Iterator[FaultyServer]:
    with FaultyServer(retriever, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
