"""Progress of long work, and one-line notices on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from searche1_lite.runtime.ranks import is_first

_SHOWN_FROM = 8_000_000
"""Bytes; a smaller task gets no bar."""


class Progress(Protocol):
    """Receives the progress of long work."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A task of `total` units; call the returned function with the number of units just done."""
        ...

    def show(self, what: Any) -> None:
        """Shows text or a Rich table while the work continues."""
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
    """A task in megabytes; the returned function takes bytes. Small tasks show nothing.

    Args:
        size: total bytes, `done` of which are done already.
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
    """Prints one line on stderr. Of several processes only the first prints, unless `by_any`."""
    if by_any or is_first():
        print(message, file=sys.stderr)
