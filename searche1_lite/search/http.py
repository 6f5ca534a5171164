"""A search server of Search-R1's protocol as a `Retriever`: `POST /retrieve`.

    {"queries": [..], "topk": 3, "return_scores": true} -> {"result": [[{"document": {..}, "score": 1.5}, ..], ..]}

Servers differ in their documents: `id` and `contents`, whose first line is the title (wiki-18), `title` and `text`, all
of them, or none with an id; some leave `document` and `score` out and give the documents themselves. All are read; what
is none of these is refused, never guessed at.

What it leaves out: answers are not remembered, for a server may change; and nothing is retried that was answered.
"""

import asyncio
import hashlib
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from random import Random
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from searche1_lite.data.trajectory import FailedSearch, Passage
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.search.base import clean_query, parse_contents

if TYPE_CHECKING:
    import httpx2

TOKEN_VARIABLE = "SEARCHE1_LITE_SEARCH_TOKEN"
"""Where the server's token is read from: settings are written to run folders."""

QUERIES_A_REQUEST = 64
_BYTES_A_REQUEST = 3 * 2**18
"""Of queries; with what JSON adds it stays below the 1 MiB that servers commonly take."""
_AT_ONCE = 4
"""Requests under way at the same time, and connections kept for the next ones."""
_LARGEST_ANSWER = 64 * 2**20
"""Bytes; what is longer is not read to its end."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try, doubled before each further one; and the most, also if `Retry-After` asks for more."""
_RETRIES_AT_START = 2
"""Of a server that is busy or failing as a run begins; one that is not there is told of at once."""
_TICK = 0.25
"""Seconds after which a search looks whether anyone still waits for it."""


class _NoAnswer(Exception):
    """One try that failed.

    Args:
        again: is it worth another one?
        answered: did a server say something?
        pause: seconds that it asks to be left alone.
    """

    def __init__(self, reason: str, *, again: bool = False, answered: bool = True, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.answered, self.pause = again, answered, pause


class HTTPRetriever:
    """A `Retriever` that asks a server. May be called from any thread; one call waits for the other.

    Args:
        url: the server's; `/retrieve` is added where it has no path.
        timeout_seconds: what one request may take, from the connection to the last byte.
        retries: more tries where there is no connection, no answer in time, or the server is busy or failing.
        on_failure: `stop` raises; `empty` gives a `FailedSearch` for each query that was not answered.
        token: sent as a bearer token; default: what SEARCHE1_LITE_SEARCH_TOKEN holds.
        say: told of the first search that failed, and at the end how many did.

    Raises:
        UserError: for a URL that is none, no server there, or one of another protocol.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 30.0,
        retries: int = 6,
        on_failure: Literal["stop", "empty"] = "stop",
        token: str | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        import httpx2

        self._url, local = _checked(url)
        self._timeout, self._retries, self._on_failure, self._say = timeout_seconds, retries, on_failure, say
        self._random = Random()  # its own: pauses must not move the generator that a run is seeded by
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token and not (token.isascii() and token.isprintable()):
            raise UserError(f"the token in {TOKEN_VARIABLE} must be printable ASCII; give another")
        self._client = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            timeout=None,  # a try as a whole is timed: a server can be slow byte by byte
            limits=httpx2.Limits(max_connections=_AT_ONCE, max_keepalive_connections=_AT_ONCE, keepalive_expiry=4.0),
            trust_env=not local,  # a proxy is no way to this machine
        )
        self._failed = [0]
        """Searches that failed so far; in a list, so that it outlives this object."""
        self.close = weakref.finalize(self, _end, self._loop, self._client, self._failed, say)
        """Gives the connections back; done of itself when nobody holds on to this object."""
        try:
            self.name = f"http({self._run(self._open())})"
        except BaseException:
            self.close()
            raise

    @property
    def failed_searches(self) -> int:
        """How many searches could not be made so far."""
        return self._failed[0]

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. A query that comes twice in `queries` is sent once.

        Raises:
            UserError: with `on_failure=stop`, if one was not answered.
        """
        asked = [clean_query(query) for query in queries]
        batches = _batches([query for query in dict.fromkeys(asked) if query])
        found: dict[str, list[Passage]] = {"": []}
        for batch, answer in zip(batches, self._run(self._search_all(batches, k)) if batches else [], strict=True):
            if isinstance(answer, str):
                found |= {query: FailedSearch(answer) for query in batch}
            else:
                found |= dict(zip(batch, answer, strict=True))
        answers = [found[query] for query in asked]
        if failed := sum(isinstance(answer, FailedSearch) for answer in answers):
            self._tell(failed, next(answer.reason for answer in answers if isinstance(answer, FailedSearch)))
        return answers

    def _tell(self, failed: int, reason: str) -> None:
        if not self._failed[0]:
            self._say(f"a search failed: {reason}; its result is empty and marked so (search.on_failure=empty)")
        self._failed[0] += failed

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        with self._lock:
            task = self._loop.create_task(_while_wanted(work))
            try:
                if asyncio._get_running_loop() is None:
                    return self._loop.run_until_complete(task)
                # A notebook's thread runs a loop of its own, and no second one.
                with ThreadPoolExecutor(1) as side:
                    ended = side.submit(self._loop.run_until_complete, task)
                    try:
                        return ended.result()
                    except BaseException:
                        self._loop.call_soon_threadsafe(task.cancel)
                        raise
            except BaseException:  # Ctrl-C among them: nothing may be left half sent
                task.cancel()
                with suppress(BaseException):
                    self._loop.run_until_complete(task)
                raise

    async def _open(self) -> str:
        """Asks the server something, so that a wrong one is told before anything else begins; what it is called."""
        try:
            await self._ask_until_answered(["search"], 1, at_start=True)
        except _NoAnswer as error:
            remedy = (
                "search.url must name a server of Search-R1's protocol"
                if error.answered
                else "mend search.url, or start a server there, such as with `searche1-lite serve-search`"
            )
            raise UserError(f"cannot search at {self._url}: {error}; {remedy}", exit_code=1) from error
        address = self._url.partition("://")[2]
        with suppress(_NoAnswer, ValueError):  # ours tells; for others it is no fault
            health = json.loads(await self._send("GET", self._url.rpartition("/")[0] + "/health", None, limit=10_000))
            if isinstance(health, dict) and isinstance(retriever := health.get("retriever"), str):
                return f"{''.join(filter(str.isprintable, retriever))[:100]} at {address}"
        return address

    async def _search_all(self, batches: list[list[str]], k: int) -> list[list[list[Passage]] | str]:
        """For each batch its passages, or why there are none."""
        free = asyncio.Semaphore(_AT_ONCE)

        async def search(batch: list[str]) -> list[list[Passage]] | str:
            async with free:
                try:
                    return await self._ask_until_answered(batch, k)
                except _NoAnswer as error:
                    if self._on_failure == "stop":
                        raise UserError(
                            f"the search at {self._url} failed: {error}; what is finished is kept: see to the server, "
                            "then go on with the same command and --resume",
                            exit_code=1,
                        ) from error
                    return str(error)

        tasks = [asyncio.ensure_future(search(batch)) for batch in batches]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # of no use once one has raised
                task.cancel()
            await asyncio.wait(tasks)

    async def _ask_until_answered(self, queries: list[str], k: int, at_start: bool = False) -> list[list[Passage]]:
        tries = 1 + (min(self._retries, _RETRIES_AT_START) if at_start else self._retries)
        for number in range(1, tries + 1):
            try:
                body = {"queries": queries, "topk": k, "return_scores": True}
                return parse_answer(await self._send("POST", self._url, body, limit=_LARGEST_ANSWER), len(queries), k)
            except _NoAnswer as error:
                hopeless = not error.again or (at_start and not error.answered)
                if hopeless or number == tries:
                    counted = f" ({number} tries)" if number > 1 else ""
                    raise _NoAnswer(f"{error}{counted}", answered=error.answered) from error
                await asyncio.sleep(pause_before(number + 1, error.pause, self._random.random()))
        raise AssertionError("the last try returns or raises")

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, limit: int) -> bytes:
        """The body of a 200, at most `limit` bytes."""
        import httpx2

        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        received = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream(method, url, content=content, headers=headers) as response,
            ):
                _check_status(response)
                async for chunk in response.aiter_raw():
                    received += chunk
                    if len(received) > limit:
                        raise _NoAnswer(f"its answer is longer than {limit:,} bytes")
        except TimeoutError as error:
            raise _NoAnswer(f"no answer within {self._timeout:g} s", again=True, answered=False) from error
        except httpx2.TransportError as error:
            what = "no connection" if isinstance(error, httpx2.ConnectError) else "the connection broke"
            raise _NoAnswer(f"{what} ({_told(error)})", again=True, answered=False) from error
        return bytes(received)


def _checked(url: str) -> tuple[str, bool]:
    """The URL that is asked, and whether it is on this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(
            f"search.url={url} is no URL ({error}); write it like http://127.0.0.1:8000/retrieve"
        ) from error
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UserError(f"search.url={url} is no URL; write it like http://127.0.0.1:8000/retrieve")
    if "@" in parts.netloc:
        raise UserError(
            f"search.url holds a password, which a run's folder would show; put a token into {TOKEN_VARIABLE}"
        )
    local = host == "localhost" or host.startswith("127.") or host == "::1"
    return (parts._replace(path="/retrieve").geturl() if parts.path in ("", "/") else url), local


def pause_before(number: int, asked: float, chance: float) -> float:
    """Seconds to wait before try `number`, from 2 on.

    Args:
        asked: what the server asked for.
        chance: from [0, 1): up to half of the wait is left out, so that not all who wait come at once.
    """
    usual = min(_FIRST_PAUSE * 2 ** (number - 2), _LONGEST_PAUSE)
    return max(min(asked, _LONGEST_PAUSE), usual * (1 - chance / 2))


def _batches(queries: list[str]) -> list[list[str]]:
    """The queries in the order they came, cut into what one request may hold."""
    batches: list[list[str]] = []
    size = 0
    for query in queries:
        length = len(json.dumps(query, ensure_ascii=False).encode()) + 2
        if not batches or len(batches[-1]) == QUERIES_A_REQUEST or size + length > _BYTES_A_REQUEST:
            batches.append([])
            size = 0
        batches[-1].append(query)
        size += length
    return batches


def _check_status(response: "httpx2.Response") -> None:
    code = response.status_code
    if code == 429 or code >= 500:
        raise _NoAnswer(f"HTTP {code}", again=True, pause=_retry_after(response.headers.get("Retry-After")))
    if code in (401, 403):
        raise _NoAnswer(f"HTTP {code}; it asks for a token: put it into {TOKEN_VARIABLE}")
    if code != 200:
        raise _NoAnswer(f"HTTP {code}, where Search-R1's protocol has 200")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _NoAnswer("its answer is compressed, which was not asked for")


def _retry_after(value: str | None) -> float:
    """Seconds, from either form of the header (RFC 9110, 10.2.3); 0 where it is none."""
    with suppress(TypeError, ValueError, OverflowError):
        if (text := (value or "").strip()).isdecimal():
            return float(text)
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def parse_answer(body: bytes, n: int, k: int) -> list[list[Passage]]:
    """The passages of `n` queries, at most `k` each: some servers always give their own number.

    Raises:
        _NoAnswer: if it is anything else than an answer to `n` queries, saying what.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _NoAnswer("its answer is no JSON") from error
    results = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise _NoAnswer('its answer has no list "result"')
    if len(results) != n:
        raise _NoAnswer(f"it gave {len(results)} results for {n} queries")
    if not all(isinstance(hits, list) for hits in results):
        raise _NoAnswer("one of its results is no list")
    return [[_passage(hit) for hit in hits[:k]] for hits in results]


def _passage(hit: Any) -> Passage:
    """A hit in one of the forms that are known; see the module's beginning."""
    document = hit.get("document", hit) if isinstance(hit, dict) else None
    if not isinstance(document, dict):
        raise _NoAnswer("one of its passages is no object")
    contents, title, text = (document.get(key) for key in ("contents", "title", "text"))
    if contents is None and isinstance(text, str) and isinstance(title or "", str):
        # As the first line of contents would be read, so that a title's quotes are dropped in every form.
        contents = f"{' '.join((title or '').split())}\n{text}"
    if not isinstance(contents, str):
        raise _NoAnswer('one of its passages has neither "contents" nor "text" that is text')
    name = document.get("id")
    if name is None:  # Search-R1's BM25 gives none for an index that holds its text
        name = f"text-{hashlib.sha256(contents.encode('utf-8', 'replace')).hexdigest()[:16]}"
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise _NoAnswer('one of its passages has an "id" that is neither text nor a number')
    return parse_contents(str(name), contents, _score(hit.get("score")))


def _score(value: Any) -> float:
    """0 where none is given."""
    if value is None:
        return 0.0
    with suppress(OverflowError):  # an integer beyond all floats
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise _NoAnswer(f"one of its scores is {str(value)[:40]!r}, no number")


async def _while_wanted(work: Coroutine[Any, Any, Any]) -> Any:
    """`work`, given up when the program ends: its last thread would otherwise go on trying for minutes."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_TICK))[0]:
            # Python joins a pool's threads before it says in a public place that it ends.
            if getattr(threading, "_SHUTTING_DOWN", False) or not threading.main_thread().is_alive():
                raise UserError("the search was given up: the program is ending", exit_code=1)
    finally:
        task.cancel()
        await asyncio.wait({task})
    return task.result()


def _end(
    loop: asyncio.AbstractEventLoop, client: "httpx2.AsyncClient", failed: list[int], say: Callable[[str], None]
) -> None:
    """In whatever thread and at whatever time; so it may not fail."""
    with suppress(Exception):
        if failed[0]:
            say(f"{failed[0]} searches failed; each is marked in the records" if failed[0] > 1 else "1 search failed")
    with suppress(Exception):
        if asyncio._get_running_loop() is None:
            loop.run_until_complete(client.aclose())
        loop.close()
