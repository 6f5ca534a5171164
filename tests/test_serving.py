"""The guard of the servers, over real sockets: hosts, origins, tokens, bodies, slow clients, errors, and the end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from searche1_lite.runtime.errors import UserError
from searche1_lite.serve import http_server
from searche1_lite.serve.http_server import MAX_BODY, GuardedServer, Text, new_app
from searche1_lite.serve.place import TOKEN_VARIABLE, find_token, listen

TOKEN = "correct-horse-battery-staple"


class Wanted(BaseModel):
    text: Text
    times: int = Field(1, ge=1, le=3)


def echo_app() -> FastAPI:
    app = new_app("echo", openapi="/openapi.json")

    @app.post("/echo")
    def echo(wanted: Wanted) -> dict[str, str]:
        if wanted.text == "wrong":
            raise UserError("that text is wrong; give another")
        if wanted.text == "fail":
            raise UserError("the disk at /secret/place is full", exit_code=1)
        if wanted.text == "crash":
            raise RuntimeError("no such thing as /secret/place")
        return {"text": wanted.text * wanted.times}

    @app.get("/much")
    async def much() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 65536

        return StreamingResponse(pieces())

    @app.get("/half")
    async def half() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("no such thing as /secret/place")

        return StreamingResponse(pieces())

    return app


class Client:
    """A server in a thread, and what goes over the wire to it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def raw(self, data: bytes) -> bytes:
        """What comes until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            return received(sock)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> "Reply":
        """One request on a connection of its own. `_` in a header's name stands for `-`."""
        named = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        lines = {"host": f"localhost:{self.address[1]}", "connection": "close", **named}
        if body and "transfer-encoding" not in lines:
            lines.setdefault("content-length", str(len(body)))
            lines.setdefault("content-type", "application/json")
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        return Reply(self.raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body))


class Reply:
    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines)}

    def json(self) -> object:
        return json.loads(self.body)

    def refused(self, status: int, reason: str) -> None:
        assert self.status == status and self.headers["content-type"] == "application/json"
        told = self.json()
        assert isinstance(told, dict) and list(told) == ["error"] and reason in told["error"]
        assert "\n" not in told["error"] and "Traceback" not in told["error"] and "/" not in told["error"]


def received(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def one_answer(sock: socket.socket) -> bytes:
    """On a connection that is kept."""
    parts = b""
    while not parts.endswith(b"}"):
        parts += (part := sock.recv(65536))
        assert part, parts
    return parts


@contextmanager
def running(app: FastAPI, host: str = "127.0.0.1", token: str | None = None) -> Iterator[Client]:
    place = listen(host, 0, token)
    ready = threading.Event()
    server = GuardedServer(app, place, ["/open"], on_start=lambda url: ready.set())
    thread = threading.Thread(target=server.start)
    thread.start()
    assert ready.wait(60)
    try:
        yield Client(("127.0.0.1", place.port))
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running(echo_app()) as client:
        yield client


def body(**values: object) -> bytes:
    return json.dumps(values).encode()


def test_a_request_is_answered_and_the_response_keeps_to_itself(client: Client) -> None:
    reply = client.ask("POST", "/echo", body(text="é<b>", times=2))
    assert reply.status == 200 and reply.json() == {"text": "é<b>é<b>"}
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "server" not in reply.headers and reply.headers["cache-control"] == "no-store"
    assert client.ask("GET", "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "data", "status", "reason"),
    [
        ("POST", "/echo", b"{", 400, "the body is no JSON"),
        ("POST", "/echo", b'{"text": "\xff"}', 400, "pars"),
        ("POST", "/echo", b"[" * 200_000, 400, "pars"),
        ("POST", "/echo", b'{"text": ' + b"9" * 5000 + b"}", 400, "pars"),
        ("POST", "/echo", b'{"text": 1}', 422, "text: Input should be a valid string"),
        ("POST", "/echo", b'{"text": "\\ud800"}', 422, "text: Value error, it holds half a surrogate pair"),
        ("POST", "/echo", b"{}", 422, "text: Field required"),
        ("POST", "/echo", b"[1]", 422, "body: Input should be"),
        ("POST", "/echo", b"", 422, "body: Field required"),
        ("POST", "/echo", b'{"text": "a", "times": 4}', 422, "times: Input should be less than or equal to 3"),
        ("POST", "/echo", b'{"text": "a", "times": NaN}', 422, "times: Input should be"),
        ("POST", "/echo", b'{"text": "wrong"}', 422, "that text is wrong; give another"),
        ("POST", "/echo", b'{"text": "fail"}', 500, "the server failed"),
        ("POST", "/echo", b'{"text": "crash"}', 500, "the server failed"),
        ("GET", "/echo", b"", 405, "Method Not Allowed"),
        ("BREW", "/echo", b"", 405, "Method Not Allowed"),
        ("GET", "/no/../such%00%0d%0a", b"", 404, "Not Found"),
        ("GET", "/echo/", b"", 404, "Not Found"),
        ("GET", "/docs", b"", 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_form(
    client: Client, method: str, path: str, data: bytes, status: int, reason: str
) -> None:
    client.ask(method, path, data).refused(status, reason)
    assert client.ask("GET", "/health").status == 200


def test_a_failure_is_logged_in_one_line(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.ask("POST", "/echo", body(text="crash"))
    assert capfd.readouterr().err == "error: POST /echo: RuntimeError: no such thing as /secret/place\n"
    reply = Reply(client.raw(b"GET /half HTTP/1.1\r\nhost: localhost\r\n\r\n"))
    assert reply.status == 200 and reply.body == b"4\r\nhalf\r\n", "cut off, with no last chunk"
    assert capfd.readouterr().err == "error: GET /half: RuntimeError: no such thing as /secret/place\n"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: gzip\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(client: Client, data: bytes) -> None:
    reply = Reply(client.raw(data))
    assert reply.status in (400, 501)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"])
def test_the_names_of_loopback_are_taken(client: Client, name: str) -> None:
    assert client.ask("GET", "/health", host=name).status == 200


@pytest.mark.parametrize(
    "name",
    [
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:80", "192.168.0.1", "0.0.0.0",
        "user@localhost", "localhost:80:80", "[::1", "localhost, evil.example", "[::2]",
    ],
)  # fmt: skip
def test_other_names_that_lead_here_are_refused(client: Client, name: str) -> None:
    client.ask("GET", "/health", host=name).refused(403, "the Host of the request")


def test_other_origins_are_refused(client: Client) -> None:
    host = f"localhost:{client.address[1]}"
    assert client.ask("POST", "/echo", body(text="a"), origin=f"http://{host}").status == 200
    other = f"http://localhost:{client.address[1] + 1}"
    for origin in (
        "http://evil.example",
        "null",
        other,
        f"http://{host}.evil.example",
        f"file://{host}",
        "http://localhost",
    ):
        client.ask("POST", "/echo", body(text="a"), origin=origin).refused(403, "other origins")
        client.ask("GET", "/health", origin=origin).refused(403, "other origins")
        client.ask("OPTIONS", "/echo", origin=origin, access_control_request_method="POST").refused(403, "origins")
    for site in ("cross-site", "same-site"):
        client.ask("GET", "/health", sec_fetch_site=site, sec_fetch_mode="no-cors").refused(403, "other origins")
        client.ask("POST", "/echo", body(text="a"), sec_fetch_site=site, sec_fetch_mode="navigate").refused(403, "or")
        assert client.ask("GET", "/health", sec_fetch_site=site, sec_fetch_mode="navigate").status == 200, "a link"


def test_a_body_beyond_the_limit_is_refused_whole_or_in_chunks(client: Client) -> None:
    text = "x" * (MAX_BODY - len(body(text="")))
    assert client.ask("POST", "/echo", body(text=text)).json() == {"text": text}
    client.ask("POST", "/echo", body(text=text + "x")).refused(413, "larger than 1,048,576 bytes")
    client.ask("POST", "/echo", b"", content_length=str(10**15), expect="100-continue").refused(413, "larger")
    part = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    client.ask("POST", "/echo", part * 40 + b"0\r\n\r\n", transfer_encoding="chunked").refused(413, "larger")


def test_a_slow_body_is_timed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BODY_SECONDS", 0.3)
    with running(echo_app()) as client:
        head = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        Reply(client.raw(head)).refused(408, "the body did not come in time")


def test_connections_beyond_the_limit_are_refused_until_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS", 3)
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with running(echo_app()) as client:
        with client.connect() as first, client.connect() as second:
            for sock in (first, second):
                sock.sendall(request)
                assert b" 200 " in one_answer(sock)
            assert b" 503 " in client.raw(request)
        assert client.ask("GET", "/health").status == 200


def test_a_token_is_needed_for_all_but_health_and_what_is_open() -> None:
    with running(echo_app(), token=TOKEN) as client:
        assert client.ask("GET", "/health").status == 200
        client.ask("GET", "/open").refused(404, "Not Found")
        for shown in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff", f"Bearer {TOKEN[:-1]}"):
            reply = client.ask("POST", "/echo", body(text="a"), authorization=shown)
            reply.refused(401, "a token is needed")
            assert reply.headers["www-authenticate"] == "Bearer"
        client.ask("GET", "/openapi.json").refused(401, "a token is needed")
        client.ask("GET", "/none").refused(401, "a token is needed")
        for scheme in ("Bearer", "bearer"):
            assert client.ask("POST", "/echo", body(text="a"), authorization=f"{scheme} {TOKEN}").json() == {
                "text": "a"
            }


def test_beyond_loopback_a_token_is_needed_and_addresses_are_names() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match="can be reached from other machines: give a token with --token"):
            listen(host, 0)
    with running(echo_app(), host="0.0.0.0", token=TOKEN) as client:
        for name in ("192.168.0.1:80", "localhost", socket.gethostname()):
            assert client.ask("GET", "/health", host=name).status == 200
        client.ask("GET", "/health", host="evil.example").refused(403, "the Host")


def test_a_token_is_found_and_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert find_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert find_token(None) == TOKEN and find_token("another-token-of-mine") == "another-token-of-mine"
    for weak in ("", "short", "a token with spaces in it", "ünïcödé-ünïcödé-ünïcödé"):
        with pytest.raises(UserError, match="the token of --token has to have 16 or more") as caught:
            find_token(weak)
        assert not weak or weak not in str(caught.value)


def test_a_port_that_is_not_to_be_had_is_told_in_one_line() -> None:
    place = listen("127.0.0.1", 0)
    place.bound.listen()
    try:
        with pytest.raises(UserError, match=f"port {place.port} of localhost is taken; .* give another with --port"):
            listen("localhost", place.port)
    finally:
        place.bound.close()
    for host, port, reason in (
        ("no.such.host.invalid", 0, "there is no host 'no.such.host.invalid'; give 127.0.0.1"),
        ("127.0.0.1", 70000, "there is no port 70000"),
        ("203.0.113.1", 0, "203.0.113.1 is no address of this machine"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            listen(host, port, TOKEN)


def test_64_clients_at_once_each_get_their_own_answer(client: Client) -> None:
    def ask(number: int) -> bool:
        return client.ask("POST", "/echo", body(text=str(number), times=2)).json() == {"text": str(number) * 2}

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(ask, range(640)))


SCRIPT = """
import asyncio, sys
from fastapi.responses import StreamingResponse
from searche1_lite.serve.http_server import new_app, serve
from searche1_lite.serve.place import listen
app, stopped = new_app("slow"), []
@app.get("/endless")
async def endless():
    async def pieces():
        yield b"begun"
        while not stopped:
            await asyncio.sleep(0.01)
    return StreamingResponse(pieces())
serve(app, listen("127.0.0.1", 0), on_stop=lambda: stopped.append(1))
print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_also_in_the_middle_of_an_answer(number: int) -> None:
    repository = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    ) as process:
        assert process.stdout and process.stderr
        line = process.stderr.readline()
        match = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)
        assert match
        with socket.create_connection(("127.0.0.1", int(match[1])), timeout=60) as sock:
            sock.sendall(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n")
            said = b""
            while b"begun" not in said:
                said += sock.recv(65536)
            process.send_signal(number)
            assert (said + received(sock)).endswith(b"0\r\n\r\n"), "the answer was ended, not cut"
        assert process.wait(60) == 0
        assert process.stdout.read() == "ended\n" and process.stderr.read() == ""


def test_without_the_extra_an_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UserError, match=r"a server needs fastapi, which is not installed: pip install -e '.\[web\]'"):
        listen()
