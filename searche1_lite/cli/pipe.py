"""Questions from a pipe, one a line, answered side by side and given as JSON lines in their order.

Light to import: the command line looks for a first question before anything heavy is loaded.
"""

import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from searche1_lite.serve.ask import Answer, Asker, Comparison

LONGEST_LINE = 2**20
"""Bytes; what a longer line has beyond them is not kept."""


class QuestionLines:
    """The lines of a stream that are not blank, read ahead by a thread: never more than `ahead` of them.

    Args:
        stream: UTF-8 text. It is left open: the thread may still be reading when nobody waits for it any more.
    """

    def __init__(self, stream: BinaryIO, ahead: int) -> None:
        self._stream = stream
        self._queue: Queue[str | Exception | None] = Queue(ahead)
        self._first: str | None = None
        self._over = False
        threading.Thread(target=self._read, name="questions", daemon=True).start()

    def wait(self) -> bool:
        """Waits for the first question; is there one?"""
        if self._first is None:
            self._first = self._next()
        return self._first is not None

    def batches(self, size: int) -> Iterator[list[str]]:
        """At most `size` at a time: those that have come by the time that one has. So one who waits for the answer
        before asking again gets it."""
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
    """The answers, in the order of the questions. No more than a batch of either is held."""
    for batch in lines.batches(asker.work.engine.batch_size):
        yield from asker.compare_all(batch) if compare else asker.answers(batch)
