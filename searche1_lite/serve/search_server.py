"""`serve-search`: a search engine over HTTP, in Search-R1's protocol.

    POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
      -> {"result": [[{"document": {"id", "contents"}, "score"}, ..], ..]}       one list a query, best first
      -> {"result": [[{"id", "contents"}, ..], ..]}                               without return_scores

GET /health names the retriever, /metrics has counters for Prometheus, /openapi.json describes the API.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from searche1_lite.config import SearchConfig
from searche1_lite.data.trajectory import Passage
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.search.base import Retriever, search_each
from searche1_lite.search.catalog import open_retriever
from searche1_lite.serve.http_server import (
    HEALTH,
    Guard,
    Text,
    error_response,
    new_app,
    say_where,
    serve,
    server_config,
)
from searche1_lite.serve.place import Place

MOST_QUERIES = 256
MOST_PASSAGES = 100
"""A query."""
MOST_FOUND = 6_400
"""Passages a request, what the client here asks for at most: an answer is held whole."""
LONGEST_QUERY = 16_384
"""Characters; an engine may use fewer."""
_MOST_WAITING = 256
"""Requests; further ones are answered with 503."""
_START_SECONDS = 600.0
"""The longest time that a worker may take to open its index."""


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


class Counters:
    """Counts for Prometheus, in memory that all workers share."""

    NAMES = ("2xx", "4xx", "5xx", "queries", "seconds", "deaths")

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._values = get_context("spawn").Array("d", len(self.NAMES))

    def add(self, name: str, amount: float = 1.0) -> None:
        locked = self._values.get_lock().acquire(timeout=1.0)  # a worker may be killed while it holds the lock
        values: Any = self._values.get_obj()
        values[self.NAMES.index(name)] += amount
        if locked:
            self._values.get_lock().release()

    def as_text(self, retriever: str) -> str:
        """Prometheus's text format."""
        value = dict(zip(self.NAMES, self._values.get_obj(), strict=True))
        name = retriever.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        samples = [
            *((f'requests_total{{status="{s}"}}', "counter", f"{value[s]:.0f}") for s in ("2xx", "4xx", "5xx")),
            ("queries_total", "counter", f"{value['queries']:.0f}"),
            ("seconds_total", "counter", f"{value['seconds']:.6f}"),
            ("workers", "gauge", str(self.workers)),
            ("worker_deaths_total", "counter", f"{value['deaths']:.0f}"),
            (f'info{{retriever="{name}"}}', "gauge", "1"),
        ]
        types = dict.fromkeys(f"# TYPE searche1_search_{n.partition('{')[0]} {kind}" for n, kind, _ in samples)
        return "\n".join([*types, *(f"searche1_search_{name} {value}" for name, _, value in samples)]) + "\n"


def create_app(retriever: Retriever, k: int, counters: Counters | None = None) -> FastAPI:
    """The application, to be run guarded (`http_server.py`). It searches in one thread.

    Args:
        k: passages where a request has no `topk`.
        counters: shared by several workers.
    """
    counted = counters or Counters()
    app = new_app("searche1-lite serve-search", openapi="/openapi.json")
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != HEALTH]
    # Java keeps a record of every thread that ever called it, and a retriever need not be thread-safe.
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
            return error_response(503, "too many requests wait already; try again", {"retry-after": "1"})
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


def serve_search(search: SearchConfig, place: Place, workers: int) -> None:
    """Serves an index that exists until Ctrl-C or SIGTERM.

    Args:
        workers: processes, each with a Java machine of its own over the same index.

    Raises:
        UserError: if it cannot be opened.
    """
    if search.url is not None:
        raise UserError(f"search.url={search.url} is a search server already; name an index or a corpus")
    if workers == 1:
        serve(create_app(open_retriever(search), search.k), place)
        return
    if os.name != "posix":
        raise UserError("several workers need Linux or macOS; leave --workers out")
    _Workers(search, place, Counters(workers)).run()


class _Workers(Multiprocess):
    """uvicorn's worker processes on one socket. A worker that dies is replaced; its connections are lost."""

    def __init__(self, search: SearchConfig, place: Place, counters: Counters) -> None:
        self._place, self._counters = place, counters
        threads = replace(search, threads=1)  # the cores are used by workers, not by threads
        address = (place.host, place.port, place.token, place.loopback)
        app = partial(_worker_app, threads, address, counters)
        # A worker accepts one connection at a time, which spreads those that come together, if not evenly.
        super().__init__(server_config(app, factory=True, workers=counters.workers, backlog=1), [place.bound])

    def init_processes(self) -> None:
        super().init_processes()
        ready = all(process.wait_until_ready(_START_SECONDS, self.should_exit) for process in self.processes)
        if not ready and not self.should_exit.is_set():
            self.should_exit.set()
            self.terminate_all()
            raise UserError("a search worker did not start; see above, and try --workers 1", exit_code=1)
        say_where(self._place, f" with {self._counters.workers} workers")

    def keep_subprocess_alive(self) -> None:
        before = [process.pid for process in self.processes]
        super().keep_subprocess_alive()
        for old, process in zip(before, self.processes, strict=True):
            if process.pid != old:
                self._counters.add("deaths")
                say_on_stderr(f"search worker {old} died; another one takes its place")


def _worker_app(search: SearchConfig, address: tuple[str, int, str | None, bool], counters: Counters) -> Guard:
    """The application of one worker, made in its process."""
    host, port, token, loopback = address
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        app = create_app(open_retriever(search), search.k, counters)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)
    return Guard(app, Place(host, port, socket.socket(), token, loopback))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


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
