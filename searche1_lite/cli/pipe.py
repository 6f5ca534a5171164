"""Questions from a pipe, one a line, answered in batches and in order.

Light to import: the command line waits for a first question before it loads anything heavy.
"""

import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from searche1_lite.serve.ask import Answer, Asker, Comparison

LONGEST_LINE = 2**20
"""Bytes; a longer line is cut."""


class QuestionLines:
    """The non-blank lines of a stream, read by a thread, at most `ahead` of them in advance.

    Args:
        stream: UTF-8 text. It stays open, since the thread may still be reading at exit.
    """

    def __init__(self, stream: BinaryIO, ahead: int) -> None:
        self._stream = stream
        self._queue: Queue[str | Exception | None] = Queue(ahead)
        self._first: str | None = None
        self._over = False
        threading.Thread(target=self._read, name="questions", daemon=True).start()

    def wait(self) -> bool:
        """Waits for the next question; False at the end of the stream."""
        if self._first is None:
            self._first = self._next()
        return self._first is not None

    def batches(self, size: int) -> Iterator[list[str]]:
        """Up to `size` lines at a time, without waiting for more than one: an interactive client gets each answer."""
        while self.wait():
            batch = [self._first or ""]
            self._first = None
            while len(batch) < size and not self._over:
                try:
                    line = self._next(block=False)
                except Empty:
                    break
                if line is not None:
                    batch.append(line)
            yield batch

    def _next(self, block: bool = True) -> str | None:
        if self._over:
            return None
        line = self._queue.get(block)
        if isinstance(line, Exception):
            raise line
        self._over = line is None
        return line

    def _read(self) -> None:
        try:
            first = True
            while line := self._stream.readline(LONGEST_LINE):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._stream.readline(LONGEST_LINE)
                if text := line.decode("utf-8-sig" if first else "utf-8", "replace").strip():
                    self._queue.put(text)
                first = False
            self._queue.put(None)
        except (OSError, ValueError) as error:
            self._queue.put(error)


def answer_lines(asker: "Asker", lines: QuestionLines, compare: bool) -> "Iterator[Answer | Comparison]":
    """The answers, in the order of the questions; at most one batch is in memory."""
    for batch in lines.batches(asker.work.engine.batch_size):
        yield from asker.compare_all(batch) if compare else asker.answers(batch)
