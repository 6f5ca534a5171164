"""What the commands print on stdout when nobody asks for JSON: tables."""

from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table


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


def sweep_table(result: dict[str, Any]) -> Table:
    """A row a variant: exact match over seeds, and what it is beside the baseline's."""
    table = Table(
        title=f"{result['name']}, seeds {', '.join(map(str, result['seeds']))}", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    headings = ("variant", "EM", "95%\ninterval", "search-\nes", "differ-\nence", "p", "up-\ndates", "train\ns")
    for heading in headings:  # fits 80 columns
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=heading != "variant")

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

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
            shown(row["em_mean"], ".3f"),
            "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
            shown(row["searches_mean"], ".2f"),
            "" if baseline else shown(row["em_diff"], "+.3f"),
            "" if baseline else shown(row["p_value"], ".2g"),
            shown(row["updates"], ".0f"),
            shown(row["seconds"], ".0f"),
        )
    tests = sorted({row["p_test"] for row in result["variants"] if row["p_test"]})
    if tests:
        table.caption = f"p: {' or '.join(tests)}, paired with the baseline, not adjusted (p_holm in sweep.json is)"
    return table


def settings_tables(found: dict[str, Any]) -> list[Table | str]:
    """A table a section, from `settings_listing.list_settings`: what is not the default is bold."""
    from searche1_lite.config.listing import one_line_value

    parts: list[Table | str] = []
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


def doctor_tables(found: dict[str, Any]) -> list[Table | str]:
    """What `doctor.examine` found: the checks, the memory plan with a row a part, and what to change."""
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
    checks = Table(show_header=False, box=None)
    for check in found["checks"]:
        checks.add_row(marks[check["status"]], check["name"], escape(check["detail"]))
    parts: list[Table | str] = [checks]
    if (memory := found["memory"]) is None:
        return parts
    gib = 2**30
    plan = Table(title=f"memory plan in GiB, {memory['device']} ({memory['dtype']})")
    plan.add_column("")
    for stage in memory["stages"]:
        plan.add_column(stage, justify="right")
    stages = memory["stages"].values()
    for name in dict.fromkeys(name for stage in stages for name in stage):
        plan.add_row(name, *(f"{stage[name] / gib:.2f}" if name in stage else "" for stage in stages))
    plan.add_section()
    plan.add_row("peak", *(f"{peak / gib:.2f}" for peak in memory["peaks"].values()), style="bold")
    parts.append(plan)
    verdict = "fits" if memory["fits"] else "does not fit"
    parts.append(f"{verdict} into the {memory['capacity_bytes'] / gib:.1f} GiB that can be used, at full length")
    return parts + [escape(line) for line in memory["advice"]]


def bench_tables(found: dict[str, Any]) -> list[Table | str]:
    """What `bench` measured, a table a part."""
    device = found["machine"]["gpu"] or "CPU"
    parts: list[Table | str] = []
    if "memory" in found:
        parts.append(memory_table(found["memory"], device))
    if "rollout" in found:
        parts += rollout_tables(found["rollout"], device)
    if "search" in found:
        parts.append(search_table(found["search"]))
    if "round" in found:
        shares = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in found["round"]["shares"].items()]
        parts.append(f"a round of the demo: {', '.join(shares)}")
    return parts


def memory_table(memory: dict[str, Any], device: str) -> Table:
    """A row a stage: measured, planned, and beside the dense step."""
    table = Table(title=f"peak memory in MB, {device}, {memory['workload']}")
    headings = ("stage", "measured", "plan", "plan/\nmeasured", "dense\nstep", "ours/\ndense", "seconds,\nours/dense")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name in ("rollout", "grpo", "ofsd"):
        if f"{name}_plan_bytes" not in memory:
            continue
        sizes = [memory.get(f"{name}_{kind}") for kind in ("bytes", "plan_bytes", "dense_bytes")]
        measured, plan, dense = ("-" if size is None else f"{size / 1e6:.0f}" for size in sizes)
        if memory[f"{name}_bytes"] is None:
            measured = "out of memory"
        ratios = [memory.get(f"{name}_{kind}") for kind in ("plan_vs_measured", "vs_dense", "seconds_vs_dense")]
        planned, beside, seconds = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        table.add_row(name, measured, plan, planned, dense, beside, seconds)
    return table


def rollout_tables(workloads: dict[str, Any], device: str) -> list[Table | str]:
    """A row a workload and loop, and a line for what the engine does with its time and where it is full."""
    table = Table(title=f"rollouts, {device}")
    for heading in ("workload", "loop", "seconds", "episodes/s", "tokens/s", "speedup"):
        table.add_column(heading, justify="left" if heading in ("workload", "loop") else "right", no_wrap=True)
    lines: list[Table | str] = []
    for name, found in workloads.items():
        if found is None:
            table.add_row(name, "all", "out of memory")
            continue
        for loop, label in (("ours", "engine"), ("trl", "TRL's loop"), ("reprefill", "re-prefill")):
            speed, speedup = found[loop], found.get(f"speedup_vs_{loop}")
            figures = ["out of memory"]
            if speed is not None:
                figures = [
                    f"{speed['seconds']:.2f}",
                    f"{speed['trajectories_per_second']:.2f}",
                    f"{speed['tokens_per_second']:.1f}",
                    "" if speedup is None else f"{speedup:.2f}",
                ]
            table.add_row(name if loop == "ours" else "", label, *figures)
        told = [f"{found['trajectories']} episodes, {found['tokens']} tokens written, {found['searches']} searches"]
        if found["same_tokens"] is not None:
            told.append(f"{found['same_tokens']:.1%} alike in all three")
        told += [f"{part.replace('_', ' ')} {share:.0%}" for part, share in (found["shares"] or {}).items()]
        if found["bandwidth_fraction"] is not None:
            told.append(f"{found['bandwidth_fraction']:.0%} of the limit of bandwidth and arithmetic")
        lines.append(f"{name}: {', '.join(told)}")
        if growth := found.get("growth"):
            taken = growth["seconds_per_trajectory"].items()
            curve = ", ".join(f"{rows}: {'out of memory' if s is None else f'{1000 * s:.1f}'}" for rows, s in taken)
            lines.append(f"{name}: ms an episode by how many are side by side: {curve}; knee at {growth['knee']}")
    return [table, *lines]


def search_table(found: dict[str, Any]) -> Table:
    """A row a batch size: queries a second and milliseconds a call, beside bare Pyserini's."""
    table = Table(title=f"search, k = {found['k']}, {found['same_results']:.1%} the same results as bare Pyserini")
    for heading in ("batch", "queries/s", "theirs", "ratio", "p50 ms", "theirs", "p99 ms", "theirs"):
        table.add_column(heading, justify="right")
    for size in (1, 64):
        part = found[f"batch_{size}"]
        ours, theirs = part["ours"], part["pyserini"]
        row: list[str] = [str(size), f"{ours['qps']:.0f}", f"{theirs['qps']:.0f}", f"{part['qps_vs_pyserini']:.2f}"]
        for figure in ("p50_ms", "p99_ms"):
            row += [f"{ours[figure]:.2f}", f"{theirs[figure]:.2f}"]
        table.add_row(*row)
    return table
