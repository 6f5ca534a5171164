"""Tables of the commands' results, printed on stdout without `--json`."""

from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

Parts = list[Table | str]
"""Tables, and lines in rich's markup."""


def stage_table(summary: dict[str, Any]) -> Table:
    """A row per stage: exact match with its interval, searches, and seconds of training and evaluation."""
    table = _table(
        f"{summary['model']}, {summary['retriever']}, seed {summary['seed']}",
        "stage", "EM", "95% interval", "searches/\nquestion", "searches/\ncorrect", "train\ns", "eval\ns",
    )  # fmt: skip
    for stage in summary["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['em']:.3f}",
            f"{stage['em_ci95'][0]:.3f}-{stage['em_ci95'][1]:.3f}",
            f"{stage['searches_per_question']:.2f}",
            _number(stage["searches_per_correct"], ".2f"),
            f"{stage['seconds']:.0f}",
            f"{stage['evaluation_seconds']:.0f}",
        )
    return table


def sweep_table(result: dict[str, Any]) -> Table:
    """A row per variant: mean exact match over seeds, and its difference from the baseline."""
    table = _table(
        f"{result['name']}, seeds {', '.join(map(str, result['seeds']))}",
        "variant", "EM", "95%\ninterval", "search-\nes", "differ-\nence", "p", "up-\ndates", "train\ns",
        box=SIMPLE, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.columns[0].no_wrap = False
    for row in result["variants"]:
        interval, baseline = row["em_ci95"], row["name"] == result["baseline"]
        failed = sum(run["state"] == "failed" for run in row["runs"])
        notes = [
            "baseline" if baseline else "",
            f"{len(row['seeds'])} of {len(row['runs'])} runs" if len(row["seeds"]) < len(row["runs"]) else "",
            f"{failed} failed" if failed else "",
        ]
        note = ", ".join(filter(None, notes))
        table.add_row(
            escape(row["title"]) + (f" ({note})" if note else ""),
            _number(row["em_mean"], ".3f"),
            "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
            _number(row["searches_mean"], ".2f"),
            "" if baseline else _number(row["em_diff"], "+.3f"),
            "" if baseline else _number(row["p_value"], ".2g"),
            _number(row["updates"], ".0f"),
            _number(row["seconds"], ".0f"),
        )
    tests = sorted({row["p_test"] for row in result["variants"] if row["p_test"]})
    if tests:
        table.caption = f"p: {' or '.join(tests)}, paired with the baseline, not adjusted (p_holm in sweep.json is)"
    return table


def settings_tables(found: dict[str, Any]) -> Parts:
    """A table per section of `list_settings`, with values other than the default in bold."""
    from searche1_lite.config.listing import one_line_value

    parts: Parts = []
    for section in found["sections"]:
        if section.name:
            parts.append(f"[bold cyan]{section.name}[/]: {escape(section.meaning)}")
        table = Table(box=SIMPLE, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", max_width=24)
        table.add_column(ratio=1)
        for setting in section.settings:
            value, same = one_line_value(setting.value), setting.value == setting.default
            kind = setting.kind if same else f"{setting.kind}; default: {one_line_value(setting.default)}"
            table.add_row(
                f"{section.name}.{setting.name}" if section.name else setting.name,
                escape(value) if same else f"[bold]{escape(value)}[/]",
                f"{escape(setting.meaning)} [dim]({escape(kind)})[/]",
            )
        parts.append(table)
    return parts


def doctor_tables(found: dict[str, Any]) -> Parts:
    """The result of `doctor.examine`: the checks, the memory plan with a row per part, and advice."""
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
    checks = Table(show_header=False, box=None)
    for check in found["checks"]:
        checks.add_row(marks[check["status"]], check["name"], escape(check["detail"]))
    if (memory := found["memory"]) is None:
        return [checks]
    gib, stages = 2**30, memory["stages"]
    plan = _table(f"memory plan in GiB, {memory['device']} ({memory['dtype']})", "", *stages)
    for name in dict.fromkeys(name for stage in stages.values() for name in stage):
        plan.add_row(name, *(f"{stage[name] / gib:.2f}" if name in stage else "" for stage in stages.values()))
    plan.add_section()
    plan.add_row("peak", *(f"{peak / gib:.2f}" for peak in memory["peaks"].values()), style="bold")
    verdict = "fits" if memory["fits"] else "does not fit"
    line = f"{verdict} into the {memory['capacity_bytes'] / gib:.1f} GiB that can be used, at full length"
    return [checks, plan, line, *map(escape, memory["advice"])]


def bench_tables(found: dict[str, Any]) -> Parts:
    """The results of `bench`, a table per part."""
    device = found["machine"]["gpu"] or "CPU"
    parts: Parts = []
    if "memory" in found:
        parts.append(_memory_table(found["memory"], device))
    if "rollout" in found:
        parts += _rollout_tables(found["rollout"], device)
    if "search" in found:
        parts.append(_search_table(found["search"]))
    if "round" in found:
        shares = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in found["round"]["shares"].items()]
        parts.append(f"a round of the demo: {', '.join(shares)}")
    return parts


def _memory_table(memory: dict[str, Any], device: str) -> Table:
    """A row per stage: measured, planned, and relative to the dense step."""
    table = _table(
        f"peak memory in MB, {device}, {memory['workload']}",
        "stage", "measured", "plan", "plan/\nmeasured", "dense\nstep", "ours/\ndense", "seconds,\nours/dense",
    )  # fmt: skip
    for name in ("rollout", "grpo", "ofsd"):
        if f"{name}_plan_bytes" not in memory:
            continue
        sizes = [memory.get(f"{name}_{kind}") for kind in ("bytes", "plan_bytes", "dense_bytes")]
        measured, plan, dense = (_number(size and size / 1e6, ".0f") for size in sizes)
        if memory[f"{name}_bytes"] is None:
            measured = "out of memory"
        ratios = [memory.get(f"{name}_{kind}") for kind in ("plan_vs_measured", "vs_dense", "seconds_vs_dense")]
        planned, beside, seconds = (_number(ratio, ".3f") for ratio in ratios)
        table.add_row(name, measured, plan, planned, dense, beside, seconds)
    return table


def _rollout_tables(workloads: dict[str, Any], device: str) -> Parts:
    """A row per workload and loop, and a line with the engine's time shares and its saturation."""
    table = _table(
        f"rollouts, {device}", "workload", "loop", "seconds", "episodes/s", "tokens/s", "speedup", left=2
    )  # fmt: skip
    lines: Parts = []
    for name, found in workloads.items():
        if found is None:
            table.add_row(name, "all", "out of memory")
            continue
        for loop, label in (("ours", "engine"), ("trl", "TRL's loop"), ("reprefill", "re-prefill")):
            speed, speedup = found[loop], found.get(f"speedup_vs_{loop}")
            cells = ["out of memory"]
            if speed is not None:
                cells = [
                    f"{speed['seconds']:.2f}",
                    f"{speed['trajectories_per_second']:.2f}",
                    f"{speed['tokens_per_second']:.1f}",
                    "" if speedup is None else f"{speedup:.2f}",
                ]
            table.add_row(name if loop == "ours" else "", label, *cells)
        notes = [f"{found['trajectories']} episodes, {found['tokens']} tokens written, {found['searches']} searches"]
        if found["same_tokens"] is not None:
            notes.append(f"{found['same_tokens']:.1%} alike in all three")
        notes += [f"{part.replace('_', ' ')} {share:.0%}" for part, share in (found["shares"] or {}).items()]
        if found["bandwidth_fraction"] is not None:
            notes.append(f"{found['bandwidth_fraction']:.0%} of the limit of bandwidth and arithmetic")
        lines.append(f"{name}: {', '.join(notes)}")
        if growth := found.get("growth"):
            times = growth["seconds_per_trajectory"].items()
            curve = ", ".join(f"{rows}: {'out of memory' if s is None else f'{1000 * s:.1f}'}" for rows, s in times)
            lines.append(f"{name}: ms per episode by number of parallel episodes: {curve}; knee at {growth['knee']}")
    return [table, *lines]


def _search_table(found: dict[str, Any]) -> Table:
    """A row per batch size: queries per second and milliseconds per call, with bare Pyserini's."""
    title = f"search, k = {found['k']}, {found['same_results']:.1%} the same results as bare Pyserini"
    headings = ("batch", "queries/s", "theirs", "ratio", "p50 ms", "theirs", "p99 ms", "theirs")
    table = _table(title, *headings, left=0)
    for size in (1, 64):
        part = found[f"batch_{size}"]
        ours, theirs = part["ours"], part["pyserini"]
        row = [str(size), f"{ours['qps']:.0f}", f"{theirs['qps']:.0f}", f"{part['qps_vs_pyserini']:.2f}"]
        row += [f"{side[key]:.2f}" for key in ("p50_ms", "p99_ms") for side in (ours, theirs)]
        table.add_row(*row)
    return table


def _table(title: str, *headings: str, left: int = 1, **options: Any) -> Table:
    """A table whose columns are right-aligned except the first `left`."""
    table = Table(title=title, **options)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
