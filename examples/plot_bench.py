"""Plots a bench result: each ratio next to 1, and the engine's time by number of concurrent episodes.

searche1-lite bench --json > bench.json
python examples/plot_bench.py bench.json bench.png
"""

import json
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """How many times better than its baseline each figure is, by what it is; above 1 the toolkit is ahead."""
    better: dict[str, float | None] = {}
    for stage in ("grpo", "ofsd"):
        share = found.get("memory", {}).get(f"{stage}_vs_dense")
        better[f"{stage.upper()} step's memory: dense"] = share and 1 / share
    for name, workload in _played(found).items():
        better[f"rollouts, {name}: TRL's loop"] = workload["speedup_vs_trl"]
        better[f"rollouts, {name}: prefill again"] = workload["speedup_vs_reprefill"]
    for size in (1, 64):
        if batch := found.get("search", {}).get(f"batch_{size}"):
            better[f"searches, {size} at once: Pyserini"] = batch["qps_vs_pyserini"]
    return {name: ratio for name, ratio in better.items() if ratio}


def _played(found: dict[str, Any]) -> dict[str, Any]:
    """The rollouts by workload, without those that the memory did not suffice for."""
    return {name: workload for name, workload in found.get("rollout", {}).items() if workload is not None}


def save_plot(found: dict[str, Any], file: str) -> None:
    """Writes the picture, with a panel for each kind of result."""
    bars = ratios(found)
    curves = {name: workload["growth"] for name, workload in _played(found).items() if "growth" in workload}
    if not bars and not curves:
        sys.exit("nothing to plot: measure memory, rollout or search")
    figure, axes = pyplot.subplots(
        1, bool(bars) + bool(curves), figsize=(6.4 * (bool(bars) + bool(curves)), 1.6 + 0.4 * max(6, len(bars))),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = list(axes[0])
    if bars:
        panel = panels.pop(0)
        colours = ["C0" if ratio >= 1 else "C3" for ratio in bars.values()]
        drawn = panel.barh(list(bars), [ratio - 1 for ratio in bars.values()], left=1, color=colours)
        panel.bar_label(drawn, [f"{ratio:.2f}" for ratio in bars.values()], padding=3)
        panel.axvline(1, color="black", linewidth=1)
        panel.margins(x=0.15)
        panel.invert_yaxis()
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("times better than the baseline behind the colon")
    if curves:
        panel = panels.pop(0)
        for name, growth in curves.items():
            points = {int(rows): taken for rows, taken in growth["seconds_per_trajectory"].items() if taken is not None}
            [line] = panel.plot(list(points), list(points.values()), marker="o", label=name)
            if growth["knee"] is not None:
                panel.axvline(growth["knee"], color=line.get_color(), linestyle=":", label=f"knee: {growth['knee']}")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("episodes side by side")
        panel.set_ylabel("seconds an episode")
        panel.legend()
    machine = found["machine"]
    figure.suptitle(machine["gpu"] or f"CPU, threads: {machine['threads']}")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as result:
        save_plot(json.load(result), sys.argv[2])
