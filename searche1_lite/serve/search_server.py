"""`serve-search`: a search engine over HTTP, in Search-R1's protocol.

    POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
      -> {"result": [[{"document": {"id", "contents"}, "score"}, ..], ..]}       one list a query, best first
      -> {"result": [[{"id", "contents"}, ..], ..]}                               without return_scores

GET /health tells what is searched, /metrics what was done, for Prometheus; /openapi.json describes it all.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from searche1_lite.data.trajectory import Passage
from searche1_lite.search.base import Retriever, search_each
from searche1_lite.serve.guards import HEALTH, Text, error_response, new_app
from searche1_lite.serve.search_counters import Counters

MOST_QUERIES = 256
MOST_PASSAGES = 100
"""A query."""
MOST_FOUND = 6_400
"""Passages a request, what the client here asks for at most: an answer is held whole."""
LONGEST_QUERY = 16_384
"""Characters; an engine may use fewer."""
_MOST_WAITING = 256
"""Requests; one more is told to come again."""


def _whole(number: Any) -> Any:
    """JSON does not tell 3.0 from 3."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class Wanted(BaseModel):
    """Queries, and how many passages of each."""

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)

    queries: Annotated[list[Annotated[Text, Field(max_length=LONGEST_QUERY)]], Field(max_length=MOST_QUERIES)]
    topk: Annotated[int, Field(ge=0, le=MOST_PASSAGES), BeforeValidator(_whole)] | None = None
    """Passages a query; null or 0: as many as the server gives by default."""
    return_scores: bool = False


class Document(BaseModel):
    id: str
    contents: str
    """The title in the first line, then the text."""


class Scored(BaseModel):
    document: Document
    score: float


class Found(BaseModel):
    """For each query its passages, best first."""

    result: list[list[Scored]] | list[list[Document]]


class Fault(BaseModel):
    error: str


class Health(BaseModel):
    status: str
    retriever: str
    workers: int


_FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": Fault, "description": "The body is no JSON."},
    401: {"model": Fault, "description": "The server wants a token: Authorization: Bearer TOKEN."},
    403: {"model": Fault, "description": "Host or Origin are not this server's."},
    408: {"model": Fault, "description": "The request did not come in time."},
    413: {"model": Fault, "description": "The body is larger than 1 MiB."},
    422: {"model": Fault, "description": "The body is JSON of another form, or beyond a limit."},
    503: {"model": Fault, "description": "Too much waits already; see Retry-After."},
}


def create_app(retriever: Retriever, k: int, counters: Counters | None = None) -> FastAPI:
    """The application, to be run guarded (`searche1_lite.serve.guards`). It searches in one thread.

    Args:
        k: passages where a request names no number.
        counters: where it is counted; default: for this application alone.
    """
    counted = counters or Counters()
    app = new_app("searche1-lite serve-search", openapi="/openapi.json")
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != HEALTH]
    # Java keeps a record of every thread that ever called it, and one retriever may not be called by two at once.
    searcher = ThreadPoolExecutor(1, "search")
    waiting = 0

    def search(wanted: Wanted) -> bytes:
        began = time.perf_counter()
        found = search_each(retriever, wanted.queries, wanted.topk or k)
        counted.add("seconds", time.perf_counter() - began)
        counted.add("queries", len(wanted.queries))
        return as_answer(found, wanted.return_scores)

    @app.get(HEALTH, responses={code: _FAULTS[code] for code in (403, 408, 413)})
    async def health() -> Health:
        return Health(status="ok", retriever=retriever.name, workers=counted.workers)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={code: _FAULTS[code] for code in (401, 403, 408, 413)},
    )
    async def metrics() -> str:
        """Counters in Prometheus's text format, summed over all workers."""
        return counted.as_text(retriever.name)

    @app.post("/retrieve", response_model=Found, responses=_FAULTS)
    async def retrieve(wanted: Wanted) -> Response:
        """Searches for each query."""
        nonlocal waiting
        if len(wanted.queries) * (wanted.topk or k) > MOST_FOUND:
            return error_response(413, f"queries x topk may be at most {MOST_FOUND:,}; ask for fewer at once")
        if waiting >= _MOST_WAITING:
            return error_response(503, "too much waits already; try again", {"retry-after": "1"})
        waiting += 1
        try:
            body = await asyncio.get_running_loop().run_in_executor(searcher, search, wanted)
        finally:
            waiting -= 1
        return Response(body, media_type="application/json")

    @app.middleware("http")
    async def count(request: Any, call_next: Any) -> Response:
        response = await call_next(request)
        if request.url.path == "/retrieve":
            counted.add(f"{response.status_code // 100}xx")
        return response

    return app


def as_answer(found: Sequence[Sequence[Passage]], return_scores: bool) -> bytes:
    """Search-R1's answer, which `search.http.parse_answer` reads back as the same passages."""
    result: list[list[dict[str, Any]]] = []
    for passages in found:
        documents = [{"id": passage.id, "contents": _contents(passage)} for passage in passages]
        result.append(
            [{"document": d, "score": p.score} for d, p in zip(documents, passages, strict=True)]
            if return_scores
            else documents
        )
    return json.dumps({"result": result}).encode("ascii")  # ASCII: a passage can hold half a surrogate pair


def _contents(passage: Passage) -> str:
    """Quoted as in wiki-18 where a title has quotes of its own: whoever reads it drops one pair."""
    title = " ".join(passage.title.split("\n"))
    quoted = len(title) >= 2 and title[0] == title[-1] == '"'
    return f'"{title}"\n{passage.text}' if quoted else f"{title}\n{passage.text}"
