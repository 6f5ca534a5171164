"""The report of one run: what it was, how its stages did, the charts, and the trajectory viewer."""

from pathlib import Path
from typing import Any

from searche1_lite.report.escaping import escape
from searche1_lite.report.page import cards, header, notes, page, section, table, tiles
from searche1_lite.report.record import RunRecord, interval_text, number, read_run, seconds_text
from searche1_lite.report.run_charts import run_charts, time_parts
from searche1_lite.report.trajectories import TrajectoryFile, read_trajectories


def build_run_report(folder: Path) -> str:
    """The HTML report of a run's folder, of as much as is there."""
    run, trajectories = read_run(folder), read_trajectories(folder)
    charts = run_charts(run, trajectories)
    sections = {}
    if run.stages:
        sections["stages"] = "Stages"
    if charts:
        sections["charts"] = "Charts"
    if trajectories.groups:
        sections["trajectories"] = "Trajectories"
    if run.changed_settings:
        sections["settings"] = "Settings"
    body = [header("searche1-lite run", run.name, _facts(run), sections, run.unfinished), "<main>"]
    if run.stages:
        body.append(section("stages", "Stages", tiles(_tiles(run)), _stage_table(run, trajectories.files)))
    if charts:
        body.append(section("charts", "Charts", cards(charts)))
    if trajectories.groups:
        body.append(section("trajectories", "Trajectories", VIEWER))
    if run.changed_settings:
        body.append(section("settings", "Settings", _settings(run)))
    body += [notes(run.notes + trajectories.notes), "</main>"]
    return page(f"{run.name}: searche1-lite", body, trajectories if trajectories.groups else None)


VIEWER = '<div id="viewer"><noscript>The viewer needs JavaScript; nothing is loaded from elsewhere.</noscript></div>'


def _facts(run: RunRecord) -> dict[str, object]:
    config, summary = run.config, run.summary
    searched = config and (config.search.url or config.search.index or config.search.corpus)

    def data(part: str) -> str | None:
        found = summary.get(part)
        if isinstance(found, dict) and found.get("data") is not None:
            return f"{found['data']} ({found.get('n', '?')} questions)"
        if config is None:
            return None
        return config.data.train if part == "training" else config.data.evaluation

    return {
        "model": summary.get("model", config and config.model.name),
        "retriever": summary.get("retriever", searched),
        "seed": summary.get("seed", config and config.seed),
        "trained on": data("training"),
        "evaluated on": data("evaluation"),
    }


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    first, last = run.stages[0], run.stages[-1]
    shown = []
    for key, what, form in (
        ("em", "Exact match", "{:.3f}"),
        ("searches_per_question", "Searches a question", "{:.2f}"),
        ("searches_per_correct", "Searches per right answer", "{:.2f}"),
    ):
        before, after = number(first, key), number(last, key)
        if after is None:
            continue
        if first is last or before is None:
            shown.append((what, form.format(after), last["name"]))
        else:
            shown.append((what, f"{form.format(before)} → {form.format(after)}", f"{first['name']} to {last['name']}"))
    spent = sum(sum(time_parts(stage).values()) for stage in run.stages)
    if spent:
        shown.append(("Time", seconds_text(spent), f"{len(run.stages)} stages, evaluation included"))
    peaks = [peak for stage in run.stages if (peak := number(stage, "peak_memory_mb")) is not None]
    if peaks:
        shown.append(("Peak memory", f"{max(peaks) / 1024:.2f} GiB", "over all stages"))
    return shown


def _stage_table(run: RunRecord, files: list[TrajectoryFile]) -> str:
    columns = (
        "stage", "EM", "95% interval", "F1", "improved", "got worse", "searches", "per right", "no search", "invalid",
        "no answer", "pairs", "train", "evaluate", "GiB",
    )  # fmt: skip
    changes = {file.stage: file for file in files if file.kind == "evaluation"}
    rows = [[escape(cell) for cell in _stage_row(stage, changes.get(stage["name"]))] for stage in run.stages]
    caption = (
        "Each stage, evaluated greedily. Improved and got worse count questions since the stage before; searches are a "
        "question's, then those spent per right answer; GiB is peak memory."
    )
    return table(columns, rows, caption)


def _stage_row(stage: dict[str, Any], file: TrajectoryFile | None) -> list[str]:
    def shown(form: str, *keys: str, factor: float = 1.0) -> str:
        value = number(stage, *keys)
        return "-" if value is None else form.format(value * factor)

    return [
        stage["name"],
        shown("{:.3f}", "em"),
        interval_text(stage, "em_ci95"),
        shown("{:.3f}", "f1"),
        "-" if file is None or file.improved is None else f"+{file.improved}",
        "-" if file is None or file.worse is None else f"−{file.worse}",
        shown("{:.2f}", "searches_per_question"),
        shown("{:.2f}", "searches_per_correct"),
        shown("{:.1%}", "no_search_rate"),
        shown("{:.1%}", "invalid_rate"),
        shown("{:.1%}", "unanswered_rate"),
        shown("{:.0f}", "pairs", "pairs"),
        seconds_text(number(stage, "seconds")),
        seconds_text(number(stage, "evaluation_seconds")),
        shown("{:.2f}", "peak_memory_mb", factor=1 / 1024),
    ]


def _settings(run: RunRecord) -> str:
    rows = [
        [f"<code>{escape(cell)}</code>" for cell in (key, _value(value), _value(default))]
        for key, (value, default) in run.changed_settings.items()
    ]
    found = table(("setting", "here", "default"), rows, "Settings that differ from the defaults")
    return f"<details><summary>{len(rows)} settings differ from the defaults</summary>{found}</details>"


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
