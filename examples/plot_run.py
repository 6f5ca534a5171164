"""Plots a run from its files: exact match and searches by stage, and the curves of its training steps.

The SVG has no background; its greys are legible on light and dark pages.

python examples/plot_run.py runs/demo runs/demo/picture.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "#757d87", "#3b82f6", "#e0762b"  # each at least 3 to 1 against white and against near-black
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "searche1-lite", "font.family": "sans-serif", "font.size": 11,
    "text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "axes.titlesize": 12,
    "xtick.color": GREY, "ytick.color": GREY, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip


def exact_match(axes: Axes, stages: list[dict[str, Any]]) -> None:
    """Exact match of each stage with its 95% interval."""
    for place, stage in enumerate(stages):
        low, high = stage["em_ci95"]
        axes.plot([place, place], [low, high], "_-", color=BLUE)
        axes.annotate(f"{stage['em']:.3f}", (place, high), (0, 4), textcoords="offset points", ha="center")
    axes.plot([stage["em"] for stage in stages], "o-", color=BLUE)
    axes.set_ylim(0, 1.1)
    axes.set_title(f"exact match, {stages[0]['n']} questions")


def searches(axes: Axes, stages: list[dict[str, Any]]) -> None:
    """Searches spent per right answer; none where nothing was right."""
    values = [stage["searches_per_correct"] for stage in stages]
    for place, value in enumerate(values):
        if value is not None:
            axes.annotate(f"{value:.2f}", (place, value), (3, 5), textcoords="offset points")
    axes.plot(values, "o-", color=ORANGE)
    axes.set_ylim(0, 1.15 * max((value for value in values if value is not None), default=1))
    axes.set_title("searches per right answer")


def training(axes: Axes, steps: list[dict[str, Any]]) -> None:
    """Of each step what it optimises: GRPO's mean reward, OFSD's loss."""
    for stage, field, colour, name in (
        ("grpo", "reward", BLUE, "GRPO: mean reward"), ("ofsd", "loss", ORANGE, "OFSD: loss, nats a token"),
    ):  # fmt: skip
        points = [(place, step[field]) for place, step in enumerate(steps, start=1) if step["stage"] == stage]
        axes.plot(*zip(*points, strict=True), ".", color=colour, label=name) if points else None
    axes.set_ylim(0, 1)
    axes.set_xlabel("training step")
    axes.set_title("while it trains")
    axes.legend(fontsize=10)


def main(run: str, picture: str) -> None:
    stages = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))["stages"]
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if step["stage"] in ("grpo", "ofsd")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        one, two, three = figure.subplots(1, 3)
        exact_match(one, stages)
        searches(two, stages)
        training(three, steps)
        for axes in (one, two):
            axes.set_xticks(range(len(stages)), [stage["name"].replace(".", "\n") for stage in stages])
            axes.margins(x=0.15)
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
