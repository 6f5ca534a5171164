"""Looks at every request before the application does: who asks, how much, how slowly; and at what an error tells."""

import asyncio
import hmac
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from searche1_lite.runtime.terminal import one_line
from searche1_lite.serve.guards.errors import error_response
from searche1_lite.serve.guards.place import Place

MAX_BODY = 2**20
"""Bytes of a request's body."""
HEALTH = "/health"
"""Answered without a token."""
FAILED = "the server failed; its log says more"
_LINGER = 16 * MAX_BODY
"""Bytes that are read and dropped after a refusal, so that a client that writes before it reads sees the refusal."""
_HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}
"""Of every response that does not set them itself."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take. Times in seconds."""

    head_seconds: float = 10.0
    """From the connection, or the last answer, to the end of a request's headers."""
    body_seconds: float = 20.0
    """From there to the end of the request's body."""
    read_seconds: float = 30.0
    """That a client may leave what it is sent unread."""
    connections: int = 256
    """At once. A request of one more is answered with 503; beyond twice as many, connections are cut."""
    body: int = MAX_BODY
    """Bytes."""


class Guard:
    """ASGI middleware: lets in what may come in, with its body read whole, and lets no error out but in our form.

    Args:
        open_paths: needed without a token: what a browser has to load before it can show one. No secrets in there.
    """

    def __init__(
        self, app: ASGIApp, place: Place, limits: Limits | None = None, open_paths: Collection[str] = ()
    ) -> None:
        self._app, self._place, self._limits = app, place, limits or Limits()
        self._open = {HEALTH, *open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = scope["headers"]
        status = None

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message.get("headers", ())}
                message["headers"] = [
                    *message.get("headers", ()), *((n, v) for n, v in _HEADERS.items() if n not in own)
                ]  # fmt: skip
            await send(message)
            # An application that has much to say and never waits would not notice that nobody listens any more.
            await asyncio.sleep(0)

        if refusal := self._refusal(scope, headers):
            return await _refuse(refusal, headers, receive, sending, self._limits.body_seconds)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more and len(body) <= self._limits.body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            return await _refuse((408, "the body did not come in time", {}), headers, None, sending, 0)
        if len(body) > self._limits.body:
            refusal = _too_large(self._limits.body)
            return await _refuse(refusal, headers, receive, sending, self._limits.body_seconds)
        pending: bytes | None = bytes(body)

        async def receiving() -> Message:
            nonlocal pending
            if pending is not None:
                whole, pending = pending, None
                return {"type": "http.request", "body": whole, "more_body": False}
            return await receive()

        try:
            await self._app(scope, receiving, sending)
        except Exception as error:
            log_failure(scope, error)
            if status is not None:
                raise  # of an answer that was begun, the connection is cut
            await _refuse((500, FAILED, {}), headers, None, sending, 0)

    def _refusal(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> tuple[int, str, dict[str, str]] | None:
        """Status, reason and headers, if this request is not to be answered."""
        values: dict[bytes, list[str]] = {}
        for name, value in headers:
            values.setdefault(name, []).append(value.decode("latin-1"))

        def one(name: bytes) -> str | None:
            """None if it is not there; several are no value that anyone expects."""
            return ", ".join(values[name]) if name in values else None

        host, origin = one(b"host"), one(b"origin")
        if host is None:
            return 400, "the request names no Host", {}
        if not self._place.is_name(host):
            return 403, "the Host of the request is not a name of this server", {}
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return 403, "requests of other origins are refused", {}
        # Browsers send no Origin with a GET for an image or a script. A link followed is no harm: it loads the page.
        followed = scope["method"] in ("GET", "HEAD") and one(b"sec-fetch-mode") == "navigate"
        if one(b"sec-fetch-site") in ("cross-site", "same-site") and not followed:
            return 403, "requests of other origins are refused", {}
        if self._place.token is not None and scope["path"] not in self._open:
            scheme, _, shown = (one(b"authorization") or "").partition(" ")
            if (
                not hmac.compare_digest(shown.strip().encode(), self._place.token.encode())
                or scheme.lower() != "bearer"
            ):
                return 401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
        length = one(b"content-length")
        if length is not None and int(length) > self._limits.body:  # h11 lets nothing but digits through
            return _too_large(self._limits.body)
        return None


def _too_large(limit: int) -> tuple[int, str, dict[str, str]]:
    return 413, f"the body is larger than {limit:,} bytes", {}


async def _refuse(
    refusal: tuple[int, str, dict[str, str]],
    request_headers: list[tuple[bytes, bytes]],
    receive: Receive | None,
    send: Send,
    seconds: float,
) -> None:
    """Sends the refusal, drops for a while what still comes, and ends the connection."""
    status, message, headers = refusal
    response = error_response(status, message, headers | {"connection": "close"})
    await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    waits = any(name == b"expect" for name, _ in request_headers)  # to be told to send its body; it never will be
    if receive is not None and not waits:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                dropped = 0
                while dropped < _LINGER:
                    message_in = await receive()
                    dropped += len(message_in.get("body", b""))
                    if not message_in.get("more_body", False):
                        break
    await send({"type": "http.response.body", "body": b""})


def log_failure(scope: Scope, error: Exception) -> None:
    """On stderr, once: a line, with SEARCHE1_LITE_DEBUG the traceback."""
    if scope.get("searche1_lite.logged") is error:
        return
    scope["searche1_lite.logged"] = error
    if os.environ.get("SEARCHE1_LITE_DEBUG"):
        traceback.print_exception(error)
    method, path = one_line(scope["method"], 20), one_line(scope["path"], 200)
    reason = one_line(str(error), 500)
    print(f"error: {method} {path}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection too many."""
    refusal = (503, "too many connections at once; try again", {"retry-after": "1"})
    await _refuse(refusal, scope["headers"], None, send, 0)
