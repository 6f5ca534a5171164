"""Progress bars at a terminal, on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from searche1_lite.runtime.ranks import is_first


class RichTasks:
    """A `Progress` that draws bars with the remaining time or, without a terminal, prints a line per finished task.

    Silent if `quiet`, and in all but the first of several processes.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet or not is_first())

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        if not self._console.is_terminal:
            began = time.monotonic()
            yield lambda count: None
            self._console.print(
                f"{name}: {total} in {time.monotonic() - began:.0f} s", soft_wrap=True, highlight=False, markup=False
            )
            return
        columns = (
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self._console) as bars:
            bar = bars.add_task(escape(name), total=total)
            yield lambda count: bars.advance(bar, count)

    def show(self, what: Any) -> None:
        """Prints above the bars, without tearing them."""
        self._console.print(what)
