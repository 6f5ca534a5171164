"""Several processes that answer for one search server, each with a Java machine of its own over the same index.

They take connections from one listening socket, whoever has the fewest the next one. One that dies is replaced, and the
connections that it held are lost: clients ask again. If the process that started them goes, they go.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from searche1_lite.config import SearchConfig
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.serve.guards import GuardedServer, Place, serve
from searche1_lite.serve.search_counters import Counters, shared_file

_DEATHS, _WITHIN = 5, 60.0
"""So many workers lost in so many seconds are not replaced any more."""
_TICK = 0.2
"""Seconds between two looks at the workers."""
_QUEUE = 1024
"""Connections that may wait to be taken."""
_COURTESY = 0.1
"""Seconds for which a connection is left to another worker that has fewer."""
_PATIENCE = 10.0
"""Seconds in which a worker is to end."""


def serve_search(search: SearchConfig, place: Place, workers: int) -> None:
    """Serves what `search` names until Ctrl-C or SIGTERM.

    Args:
        search: its index is there; it is not built or fetched here.

    Raises:
        UserError: if it cannot be opened, or workers die again and again.
    """
    if search.url is not None:
        raise UserError(f"search.url={search.url} is a search server already; name an index or a corpus")
    if workers == 1:
        from searche1_lite.search.catalog import open_retriever
        from searche1_lite.serve.search_server import create_app

        serve(create_app(open_retriever(search), search.k), place)
        return
    if os.name != "posix":
        raise UserError("several workers need Linux or macOS; leave --workers out")
    _Workers(search, place, workers).run()


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    row: int


class _Workers:
    """The processes, and what they are told."""

    def __init__(self, search: SearchConfig, place: Place, count: int) -> None:
        self._search, self._place, self._count = search, place, count
        self._file = shared_file(count)
        self._counters = Counters(count, 0, self._file)
        self._workers: list[_Worker] = []
        self._stop = threading.Event()
        self._deaths: deque[float] = deque(maxlen=_DEATHS)

    def run(self) -> None:
        try:
            self._workers.append(self._start(0))
            self._await(self._workers[0])  # what is wrong with the index is told once
            self._workers += [self._start(row) for row in range(1, self._count)]
            for worker in self._workers[1:]:
                self._await(worker)
            before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                say_on_stderr(f"serving on {self._place.url} with {self._count} workers (Ctrl-C ends it)")
                while not self._stop.wait(_TICK):
                    self._replace_dead()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        finally:
            self._end_all()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _start(self, row: int) -> _Worker:
        place = self._place
        told = {
            "search": asdict(self._search) | {"threads": 1},  # workers side by side take the cores, not threads
            "place": {"host": place.host, "port": place.port, "token": place.token, "loopback": place.loopback},
            "socket": place.bound.fileno(),
            "counters": self._file.fileno(),
            "workers": self._count,
            "row": row,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "searche1_lite.serve.search_workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(place.bound.fileno(), self._file.fileno()),
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")  # not an argument: the token is seen by nobody
        process.stdin.flush()
        return _Worker(process, row)

    def _await(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        if not worker.process.stdout.readline():
            ended = _ended(worker.process.wait())
            raise UserError(f"a search worker did not start ({ended}); see above, and try --workers 1", exit_code=1)

    def _replace_dead(self) -> None:
        for place, worker in enumerate(self._workers):
            if (code := worker.process.poll()) is None:
                continue
            self._counters.add("deaths")
            self._deaths.append(now := time.monotonic())
            what = f"search worker {worker.row + 1} (process {worker.process.pid}) {_ended(code)}"
            if len(self._deaths) == _DEATHS and now - self._deaths[0] < _WITHIN:
                often = f"the {_DEATHS}th in {_WITHIN:g} s"
                raise UserError(f"{what}, {often}; give fewer --workers if memory is short", exit_code=1)
            say_on_stderr(f"{what}; another one takes its place")
            _close(worker)
            self._workers[place] = self._start(worker.row)

    def _end_all(self) -> None:
        for worker in self._workers:
            _close(worker)  # it ends when there is nobody to listen to
        deadline = time.monotonic() + _PATIENCE
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._place.bound.close()
        self._file.close()


def _close(worker: _Worker) -> None:
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            pipe.close()


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class FairSocket(socket.socket):
    """A listening socket of several processes whose connections go to whichever has the fewest.

    Else the first to wake would take all that come together, and with clients that keep their connections the others
    would stay idle. An event loop takes a refusal for "nobody is there", and looks again at once.

    Args:
        bound: the socket; it is taken over.
        counters: what each process has, as of its last look.
        held: how many connections this process has.
    """

    def __init__(self, bound: int, counters: Counters, held: Callable[[], int]) -> None:
        super().__init__(fileno=bound)
        self._counters, self._held = counters, held
        self._left_since: float | None = None

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: if there is none, or if another process is to have it.
        """
        self._counters.put("connections", held := self._held())
        now = time.monotonic()
        if held > min(self._counters.of_others("connections")):
            if self._left_since is None:
                self._left_since = now
            if now - self._left_since < _COURTESY:
                time.sleep(0.0005)  # the other one may need this core
                raise BlockingIOError
        self._left_since = None
        taken = super().accept()
        self._counters.put("connections", held + 1)
        return taken


def work(told: dict[str, Any]) -> None:
    """A worker's life: opens the engine, says so on stdout, and answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending: list[GuardedServer] = []

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: Python cannot end while a thread holds that
            pass
        if ending:
            ending[0].stop()
        else:
            os._exit(1)  # while the engine is being opened

    threading.Thread(target=watch, daemon=True).start()
    from searche1_lite.search.catalog import open_retriever
    from searche1_lite.serve.search_server import create_app

    search = SearchConfig(**told["search"])
    counters = Counters(told["workers"], told["row"], os.fdopen(told["counters"], "r+b"))
    app = create_app(open_retriever(search), search.k, counters)
    bound = FairSocket(told["socket"], counters, lambda: len(ending[0].server_state.connections))
    place = Place(bound=bound, **told["place"])

    def started(url: str) -> None:
        bound.listen(_QUEUE)
        print("ready", flush=True)

    server = GuardedServer(app, place, on_start=started)
    # One connection is taken at a time, so that each is counted before the next; how many may wait is set above.
    server.config.backlog = 1
    ending.append(server)
    server.start()


if __name__ == "__main__":
    try:
        work(json.loads(sys.stdin.buffer.readline()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
