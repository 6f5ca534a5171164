"""The page's server: three files, what the session is, and a stream of JSON lines for each question.

The page is light, and open to whoever may reach the server; what is behind it needs the token, where there is one. It
cannot choose files: the adapter it was started with can be switched off, and on again.
"""

import json
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import Receive, Scope, Send

from searche1_lite.config import ProtocolConfig
from searche1_lite.data.questions import sample_question
from searche1_lite.rollout.protocol import check_question
from searche1_lite.runtime.errors import UserError
from searche1_lite.serve.ask import Asker, changed_settings
from searche1_lite.serve.http_server import error_response, new_app, serve
from searche1_lite.serve.place import Place
from searche1_lite.serve.web.desk import Desk, Note, Taken

PAGE_PATHS = ("/", "/page.js", "/page.css")
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Nothing inline, nothing from elsewhere, and no text that becomes markup."""


class Asked(BaseModel):
    """A question and how it is to be answered; what is left out is as the session began."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    k: int | None = None
    max_searches: int | None = None
    temperature: float | None = None
    seed: int | None = None
    adapter: bool = True
    """False: by the bare base."""
    compare: bool = False
    """By the base, then with the adapter."""


def create_app(desk: Desk) -> FastAPI:
    """The application; `serve_page` guards it."""
    app = new_app("searche1-lite ask")
    asker, began = desk.asker, desk.asker.settings
    limits = asker.work.protocol.config
    sample = sample_question(asker.work.config.data.evaluation)

    def add_file(path: str, name: str, kind: str) -> None:
        content = (files("searche1_lite.serve.web") / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, headers={"content-security-policy": POLICY}, media_type=f"{kind}; charset=utf-8")

    for path, (name, kind) in _FILES.items():
        add_file(path, name, kind)

    @app.get("/api/session")
    async def session() -> dict[str, Any]:
        model = asker.work.config.model.name
        return {
            "model": Path(model).name if Path(model).is_dir() else model,  # no path of here leaves it
            "adapter": asker.adapter.name if asker.adapter else None,
            "retriever": asker.work.retriever.name,
            "settings": asdict(began),
            "sample": sample,
        }

    @app.post("/api/ask")
    async def ask(asked: Asked) -> Response:
        question = _question(asked.question, limits)
        settings = began
        for name in asdict(began):
            if (value := getattr(asked, name)) is not None:
                settings = changed_settings(settings, name, str(value))
        if asked.compare:
            asker.check_comparable()
        sides = (True, False) if asked.compare else (not asked.adapter,)
        try:
            taken = desk.take(question, settings, sides)
        except BlockingIOError:
            return error_response(503, "many questions wait already; ask again later", {"retry-after": "10"})
        return _Answering(taken)

    return app


class _Answering(StreamingResponse):
    """What happens, as JSON lines; an answer that its client does not wait for is stopped."""

    def __init__(self, taken: Taken) -> None:
        super().__init__(_lines(taken.notes()), media_type="application/x-ndjson")
        self._taken = taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where it has not even begun
            self._taken.leave()


async def _lines(notes: AsyncIterator[Note]) -> AsyncIterator[bytes]:
    async for note in notes:
        yield json.dumps(note).encode("ascii") + b"\n"


def _question(text: str, limits: ProtocolConfig) -> str:
    """As `check_question`, on one line.

    Raises:
        UserError: also if it holds control characters other than white space.
    """
    question = " ".join(check_question(text, limits).split())
    for character in question:
        if unicodedata.category(character) == "Cc":
            raise UserError(f"the question holds a control character, U+{ord(character):04X}; take it out")
    return question


def serve_page(asker: Asker, place: Place) -> None:
    """Serves the page until Ctrl-C or SIGTERM, which stop what is being answered."""
    desk = Desk(asker)
    try:
        serve(create_app(desk), place, open_paths=PAGE_PATHS, on_stop=desk.stop)
    finally:
        desk.close()
