"""A FastAPI application, and the server that runs it until Ctrl-C or SIGTERM."""

import signal
import socket
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator
from starlette.exceptions import HTTPException

from searche1_lite.runtime.errors import UserError
from searche1_lite.serve.guards.connection import TimedProtocol
from searche1_lite.serve.guards.errors import error_response
from searche1_lite.serve.guards.guard import FAILED, HEALTH, ASGIApp, Guard, Limits, log_failure
from searche1_lite.serve.guards.place import Place


def _no_surrogates(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_no_surrogates)]
"""A string of a request. JSON can write halves of surrogate pairs, which nothing later can write as UTF-8: refused."""


def new_app(title: str, *, openapi: str | None = None) -> FastAPI:
    """A FastAPI application whose errors all have one form, and that answers GET /health.

    UserErrors of wrong usage are told with status 422; what else is raised is a 500 that tells nothing.

    Args:
        openapi: path of its OpenAPI description, such as /openapi.json; default: none is given.
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
        log_failure(request.scope, error)
        return error_response(500, FAILED)

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


class GuardedServer(uvicorn.Server):
    """A server that says where it is once it is, and whose end by a signal is an end like any other.

    Args:
        on_start: called with the URL as soon as connections are taken.
        on_stop: called when the end is asked for, before connections are waited for: to stop long answers. It may be
            called from a signal handler, and again.
    """

    def __init__(
        self,
        app: ASGIApp,
        place: Place,
        limits: Limits | None = None,
        open_paths: Collection[str] = (),
        on_start: Callable[[str], None] | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        bounds = limits or Limits()

        class Protocol(TimedProtocol):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(bounds, *args, **kwargs)

        super().__init__(
            uvicorn.Config(
                Guard(app, place, limits, open_paths),
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=3,
            )
        )
        self._place, self._on_start, self._on_stop = place, on_start, on_stop

    def start(self) -> None:
        """Serves until `stop`, Ctrl-C or SIGTERM (the signals only in the main thread)."""
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
                self._captured_signals.clear()  # uvicorn would raise them again, now that all is done
        finally:
            self._place.bound.close()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or (sig == signal.SIGTERM and self._captured_signals.count(sig) > 1)
        self.stop()


def serve(
    app: ASGIApp,
    place: Place,
    *,
    limits: Limits | None = None,
    open_paths: Collection[str] = (),
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serves `app`, guarded, until Ctrl-C or SIGTERM; says on stderr where.

    Args:
        open_paths: see `Guard`.
        on_stop: see `GuardedServer`.
    """

    def say(url: str) -> None:
        print(f"serving on {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if not place.loopback:
            print(
                "the token and all else travel unencrypted: on a network you do not trust, use a TLS proxy or a tunnel",
                file=sys.stderr,
                flush=True,
            )

    GuardedServer(app, place, limits, open_paths, say, on_stop).start()
