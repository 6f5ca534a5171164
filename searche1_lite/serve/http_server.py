"""The HTTP server of the page and of the search engine: who may ask, how much, and the one form of its errors.

place = listen(host, port, find_token(token))   # binds the port before anything heavy is loaded
app = new_app("search")                         # FastAPI whose errors are all {"error": "one line"}
serve(app, place)                               # guarded; until Ctrl-C or SIGTERM
"""

import asyncio
import hmac
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.terminal import one_line
from searche1_lite.serve.place import Place

MAX_BODY = 2**20
"""Bytes of a request's body."""
BODY_SECONDS = 20.0
"""The longest time that a request's body may take to arrive."""
CONNECTIONS = 256
"""Simultaneous connections; uvicorn answers further ones with 503."""
HEALTH = "/health"
"""Answered without a token."""
_QUEUE = 1024
"""Connections that may wait to be accepted."""
_FAILED = "the server failed; its log says more"
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of every response that does not set them itself."""


class _AsciiJSON(JSONResponse):
    """ASCII, so that a lone surrogate of the request can be repeated in an error."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    """`{"error": message}`, on one line of at most 500 characters."""
    return _AsciiJSON({"error": one_line(message, 500)}, status, headers)


def _no_surrogates(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_no_surrogates)]
"""A string of a request that can be encoded as UTF-8."""


def new_app(title: str, *, openapi: str | None = None) -> FastAPI:
    """A FastAPI application whose errors have one form, and that answers GET /health.

    UserErrors of wrong usage are answered with status 422, other exceptions with a 500 without details.

    Args:
        openapi: path of its OpenAPI description, such as /openapi.json.
    """
    app = FastAPI(title=title, openapi_url=openapi, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, "the body is no JSON")
        place = ".".join(map(str, first["loc"][1:])) or str(first["loc"][0])
        return error_response(422, f"{place}: {first['msg']}")

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        if error.exit_code != 2:
            raise error
        return error_response(422, str(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log_failure(request.scope, error)
        return error_response(500, _FAILED)

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


class Guard:
    """ASGI middleware that refuses foreign hosts and origins, missing tokens, and large or slow bodies.

    Args:
        open_paths: served without a token, such as the page before it can show a form for one.
    """

    def __init__(self, app: ASGIApp, place: Place, open_paths: Collection[str] = ()) -> None:
        self._app, self._place, self._open = app, place, {HEALTH, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)
            await asyncio.sleep(0)  # lets a long answer notice that its client has gone

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        pending: bytes | None = None
        if refusal is None:
            try:
                pending = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
            except TimeoutError:
                refusal = error_response(408, "the body did not come in time", {"connection": "close"})
            except _TooLargeError:
                refusal = _too_large()
            except _DisconnectedError:
                return
        if refusal is not None:
            if "expect" not in Headers(scope=scope):
                await _drop_body(receive)
            return await refusal(scope, receive, sending)

        async def receiving() -> Message:
            nonlocal pending
            if pending is None:
                return await receive()
            body, pending = pending, None
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, receiving, sending)
        except Exception as error:
            _log_failure(scope, error)
            if started:
                raise  # cuts the connection if the answer is incomplete
            await error_response(500, _FAILED)(scope, receive, sending)

    def _refusal(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        """The answer to a request that is not let in."""

        def one(name: str) -> str | None:
            """None if it is missing; several values are joined, and match nothing."""
            return ", ".join(headers.getlist(name)) if name in headers else None

        host, origin = one("host"), one("origin")
        if host is None:
            return error_response(400, "the request names no Host")
        if not self._place.is_name(host):
            return error_response(403, "the Host of the request is not a name of this server")
        foreign = origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")
        # Browsers send no Origin with a GET of an image or a script. Following a link is harmless.
        followed = method in ("GET", "HEAD") and one("sec-fetch-mode") == "navigate"
        if foreign or (one("sec-fetch-site") in ("cross-site", "same-site") and not followed):
            return error_response(403, "requests of other origins are refused")
        if self._place.token is not None and path not in self._open:
            scheme, _, token = (one("authorization") or "").partition(" ")
            right = hmac.compare_digest(token.strip().encode(), self._place.token.encode())
            if not right or scheme.lower() != "bearer":
                return error_response(
                    401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
                )
        if int(one("content-length") or 0) > MAX_BODY:  # h11 lets only digits through
            return _too_large()
        return None


class _TooLargeError(Exception):
    pass


class _DisconnectedError(Exception):
    pass


async def _read_body(receive: Receive, limit: int = MAX_BODY, keep: bool = True) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLargeError
        if keep:
            parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _drop_body(receive: Receive) -> None:
    """Reads what the client still sends, up to a limit: most clients read the answer only after that."""
    with suppress(TimeoutError, _TooLargeError, _DisconnectedError):
        await asyncio.wait_for(_read_body(receive, 16 * MAX_BODY, keep=False), BODY_SECONDS)


def _too_large() -> JSONResponse:
    return error_response(413, f"the body is larger than {MAX_BODY:,} bytes", {"connection": "close"})


def _log_failure(scope: Scope, error: Exception) -> None:
    """One line on stderr, once per error; with SEARCHE1_LITE_DEBUG also the traceback."""
    if scope.get("searche1_lite.logged") is error:
        return
    scope["searche1_lite.logged"] = error
    if os.environ.get("SEARCHE1_LITE_DEBUG"):
        traceback.print_exception(error)
    method, path = one_line(scope["method"], 20), one_line(scope["path"], 200)
    print(f"error: {method} {path}: {type(error).__name__}: {one_line(str(error), 500)}", file=sys.stderr, flush=True)


def server_config(app: Any, **settings: Any) -> uvicorn.Config:
    """uvicorn's settings of every server here."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
        **settings,
    )


class GuardedServer(uvicorn.Server):
    """A server that reports when it is ready, and exits normally on a signal.

    Args:
        on_start: called with the URL as soon as connections are accepted.
        on_stop: called from a signal handler or `stop`, possibly twice, before connections are waited for.
    """

    def __init__(
        self,
        app: ASGIApp,
        place: Place,
        open_paths: Collection[str] = (),
        on_start: Callable[[str], None] | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(server_config(Guard(app, place, open_paths)))
        self._place, self._on_start, self._on_stop = place, on_start, on_stop

    def start(self) -> None:
        """Serves until `stop`, Ctrl-C or SIGTERM (signals only in the main thread)."""
        self.run(sockets=[self._place.bound])

    def stop(self) -> None:
        """From any thread."""
        self.should_exit = True
        if self._on_stop is not None:
            self._on_stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start(self._place.url)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        try:
            with super().capture_signals():
                yield
                self._captured_signals.clear()  # uvicorn would raise them again
        finally:
            self._place.bound.close()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or (sig == signal.SIGTERM and self._captured_signals.count(sig) > 1)
        self.stop()


def say_where(place: Place, more: str = "") -> None:
    print(f"serving on {place.url}{more} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if not place.loopback:
        print(
            "the token and all else travel unencrypted: on a network you do not trust, use a TLS proxy or a tunnel",
            file=sys.stderr,
            flush=True,
        )


def serve(
    app: ASGIApp, place: Place, *, open_paths: Collection[str] = (), on_stop: Callable[[], None] | None = None
) -> None:
    """Serves `app`, guarded, until Ctrl-C or SIGTERM; reports its address on stderr."""
    GuardedServer(app, place, open_paths, lambda url: say_where(place), on_stop).start()
