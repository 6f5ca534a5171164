"""What `eval` prints for a reader: a row a data set, their average, and what the rest of the figures say."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from searche1_lite.runtime.terminal import one_line


def print_evaluation(result: dict[str, Any]) -> None:
    """On stdout; as wide as the table where no terminal says how wide it may be."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for part in evaluation_parts(result):
        console.print(part, highlight=False)


def evaluation_parts(result: dict[str, Any]) -> list[Table | str]:
    """The table, at most 100 columns wide for the usual names, and lines of what does not go into it.

    Args:
        result: what `eval --json` prints.
    """
    title = (result["model"], result["adapter"] or "no adapter", result["method"], result["retriever"])
    table = Table(title=escape(", ".join(filter(None, title))))
    headings = ("data", "n", "EM", "95% interval", "F1", "searches/\nquestion", "no\nsearch", "recall")
    for heading in headings:
        left = heading == "data"
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    sets = result.get("by_data_set", {})
    rows = sets if len(sets) > 1 else {result["data"]: result}
    for name, figures in rows.items():
        table.add_row(_shown(name), *_cells(figures))
    if len(sets) > 1:
        table.add_section()
        table.add_row("all questions", *_cells(result))
        table.add_row(
            "average of sets", "", f"{result['em_average']:.3f}", _interval(result["em_average_ci95"]),
            f"{result['f1_average']:.3f}", style="bold",
        )  # fmt: skip
    parts: list[Table | str] = [table]
    if result["method"] == "rag":
        parts.append("one search a question was made for the policy; the table counts its own, and recall both")
    for name, figures in rows.items():
        if by_hops := figures.get("em_by_hops"):
            by_hop = ", ".join(f"{_shown(hops)}: {em:.3f}" for hops, em in by_hops.items())
            parts.append(f"EM by hops, {_shown(name)}: {by_hop}")
    if failed := result.get("failed_searches"):
        parts.append(f"{failed} {'search' if failed == 1 else 'searches'} failed and found nothing for it")
    spent = f"{result['tokens_per_answer']:.0f} tokens and {result['seconds_per_question']:.2f} s a question"
    return [*parts, _misses(result["misses"]), spent]


def _shown(name: str) -> str:
    """A name from a question file, which can neither format nor steer the terminal."""
    return escape(one_line(str(name), 40))


def _cells(figures: dict[str, Any]) -> list[str]:
    recall = figures["retriever_recall"]
    return [
        str(figures["n"]),
        f"{figures['em']:.3f}",
        _interval(figures["em_ci95"]),
        f"{figures['f1']:.3f}",
        f"{figures['searches_per_question']:.2f}",
        f"{figures['no_search_rate']:.2f}",
        "-" if recall is None else f"{recall:.3f}",
    ]


def _interval(ends: list[float]) -> str:
    return f"{ends[0]:.3f}-{ends[1]:.3f}"


def _misses(misses: dict[str, int]) -> str:
    if not (total := sum(misses.values())):
        return "no wrong answer"
    causes = {
        "search": "no passage held the answer",
        "reasoning": "a passage held it",
        "no_search": "nothing was looked up",
        "undecided": "yes or no, so it cannot be told",
    }
    return f"{total} wrong: " + ", ".join(f"{misses[key]} where {what}" for key, what in causes.items() if misses[key])
