"""Terminal output: progress and the tables. Results go to stdout, everything else to stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table


class RichTasks:
    """An `evolve.Progress` that draws bars with the time left; silent when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self._console) as bars:
            bar = bars.add_task(name, total=total)
            yield lambda count: bars.advance(bar, count)


def stage_table(summary: dict[str, Any]) -> Table:
    """A row a stage: exact match with its interval, searches, and the seconds spent training and evaluating."""
    table = Table(title=f"{summary['model']}, {summary['retriever']}, seed {summary['seed']}")
    headings = ("stage", "EM", "95% interval", "searches/\nquestion", "searches/\ncorrect", "train\ns", "eval\ns")
    for heading in headings:  # fits 80 columns
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in summary["stages"]:
        per_correct = stage["searches_per_correct"]
        table.add_row(
            stage["name"],
            f"{stage['em']:.3f}",
            f"{stage['em_ci95'][0]:.3f}-{stage['em_ci95'][1]:.3f}",
            f"{stage['searches_per_question']:.2f}",
            "-" if per_correct is None else f"{per_correct:.2f}",
            f"{stage['seconds']:.0f}",
            f"{stage['evaluation_seconds']:.0f}",
        )
    return table
