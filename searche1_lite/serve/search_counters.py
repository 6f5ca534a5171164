"""What the workers of a search server have done, in memory that they share, as Prometheus reads it."""

import mmap
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO

_COUNTED = ("2xx", "4xx", "5xx", "queries", "seconds", "deaths", "connections")
_NUMBER = 8
"""Bytes."""


@dataclass
class Counters:
    """A row of numbers for each worker, which it alone writes. A worker that takes a dead one's place goes on with it.

    Args:
        workers: rows.
        row: the one that this process adds to.
        file: what the rows are shared through; default: nobody else has them.
    """

    workers: int = 1
    row: int = 0
    file: IO[bytes] | None = None
    _numbers: "memoryview[float]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        size = self.workers * len(_COUNTED) * _NUMBER
        shared = mmap.mmap(-1 if self.file is None else self.file.fileno(), size)
        self._numbers = memoryview(shared).cast("d")

    def add(self, what: str, amount: float = 1.0) -> None:
        self._numbers[self.row * len(_COUNTED) + _COUNTED.index(what)] += amount

    def put(self, what: str, value: float) -> None:
        """In place of what this worker had there."""
        self._numbers[self.row * len(_COUNTED) + _COUNTED.index(what)] = value

    def of_others(self, what: str) -> list[float]:
        """What each of the other workers has."""
        found = list(self._numbers[_COUNTED.index(what) :: len(_COUNTED)])
        return found[: self.row] + found[self.row + 1 :]

    def total(self, what: str) -> float:
        """Over all workers."""
        return sum(self._numbers[_COUNTED.index(what) :: len(_COUNTED)])

    def as_text(self, retriever: str) -> str:
        """In Prometheus's text format, summed over the workers, dead ones included."""
        name = retriever.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        lines = [
            *_described("search_requests_total", "counter", "Answered requests to /retrieve, by class of status."),
            *(f'searche1_search_requests_total{{status="{s}"}} {self.total(s):.0f}' for s in ("2xx", "4xx", "5xx")),
            *_described("search_queries_total", "counter", "Queries that were searched for."),
            f"searche1_search_queries_total {self.total('queries'):.0f}",
            *_described("search_seconds_total", "counter", "Seconds that the workers spent searching."),
            f"searche1_search_seconds_total {self.total('seconds'):.6f}",
            *_described("search_workers", "gauge", "Processes that search."),
            f"searche1_search_workers {self.workers}",
            *_described("search_worker_deaths_total", "counter", "Workers that died and were replaced."),
            f"searche1_search_worker_deaths_total {self.total('deaths'):.0f}",
            *_described("search_info", "gauge", "What searches."),
            f'searche1_search_info{{retriever="{name}"}} 1',
        ]
        return "\n".join(lines) + "\n"


def shared_file(workers: int) -> IO[bytes]:
    """For the counters of so many workers; to be inherited."""
    file = TemporaryFile()  # noqa: SIM115
    file.truncate(workers * len(_COUNTED) * _NUMBER)
    return file


def _described(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP searche1_{name} {text}", f"# TYPE searche1_{name} {kind}"]
