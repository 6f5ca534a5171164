"""One thread that searches, and that nobody has to wait for."""

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any

_GRACE = 5.0
"""Seconds that a search is given to end, as the interpreter does."""

_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class SearchThread(Executor):
    """Calls what it is given one after the other, in a thread of its own that lasts as long as the process.

    A ThreadPoolExecutor's thread is joined as the interpreter ends: a search that hangs would keep the process from
    ending. This one is given a few seconds, as Java does not like to be left in the middle of a call.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, fn, args, kwargs))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="search", daemon=True)
                self._thread.start()
                atexit.register(self._end)
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            _call(*task)
            del task  # what was found is the caller's alone

    def _end(self) -> None:
        """What waits is not begun any more."""
        while not self._tasks.empty():
            if (task := self._tasks.get()) is not None:
                task[0].cancel()
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join(_GRACE)


def _call(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
