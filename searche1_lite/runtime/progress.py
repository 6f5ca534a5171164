"""How long work tells how far it is: the part of a run's progress that search needs, and a silent one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from searche1_lite.runtime.ranks import is_first

_SHOWN_FROM = 8_000_000
"""Bytes; less than this is done before a bar could be read."""


class Progress(Protocol):
    """Where long work tells how far it is."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A part of the work with `total` units; the function it gives is told how many more are done."""
        ...

    def show(self, what: Any) -> None:
        """Something to read while the work goes on: text, or a table of Rich's."""
        ...


class SilentProgress:
    """A `Progress` that shows nothing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def show(self, what: Any) -> None:
        pass


SILENT = SilentProgress()


@contextmanager
def megabytes(progress: Progress, name: str, size: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A task in megabytes; the function it gives is told bytes. Nothing is shown for what is small.

    Args:
        size: bytes of the whole, `done` of which were done before.
    """
    if size < _SHOWN_FROM:
        yield lambda count: None
        return
    with progress.task(f"{name}, MB", size // 1_000_000) as advance:
        seen = shown = 0

        def count_bytes(count: int) -> None:
            nonlocal seen, shown
            seen += count
            if (whole := min(seen, size) // 1_000_000) > shown:
                advance(whole - shown)
                shown = whole

        count_bytes(done)
        yield count_bytes


def say_on_stderr(message: str, by_any: bool = False) -> None:
    """Tells the user one line, apart from the results on stdout. Of several processes the first one speaks, or any."""
    if by_any or is_first():
        print(message, file=sys.stderr)
