"""The report of a sweep: its variants side by side, the runs behind them, and what failed."""

import os
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from matplotlib.axes import Axes

from searche1_lite.report import FILE_NAME
from searche1_lite.report.escaping import escape
from searche1_lite.report.page import cards, header, notes, page, section, table
from searche1_lite.report.record import interval, interval_text, is_run, number, read_summary, seconds_text, stages_of
from searche1_lite.report.run_charts import stage_labels
from searche1_lite.report.svg import GRID, INK, MUTED, SERIES, Chart, draw, label, tip
from searche1_lite.report.trajectories import stage_order
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import read_json

_DASHES = ("-", "--", ":", "-.")


def read_sweep(folder: Path) -> dict[str, Any]:
    """`sweep.json`, with every variant and run a dictionary.

    Raises:
        UserError: if it cannot be read.
    """
    path = folder / "sweep.json"
    try:
        sweep = read_json(path, "run the sweep again")
        sweep["variants"] = [variant | {"name": str(variant["name"])} for variant in sweep["variants"]]
        for variant in sweep["variants"]:
            variant["runs"] = [run | {"folder": _inside(str(run["folder"]))} for run in variant["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); run the sweep again") from error
    return sweep


def _inside(folder: str) -> str:
    """A run's folder as `sweep.json` names it; ValueError if that is not below the sweep's own."""
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in folder or "\\" in folder:
        raise ValueError(f"{folder[:60]!r} is no folder of the sweep")
    return folder


def run_folders(folder: Path) -> list[Path]:
    """The folders of the sweep's runs that are there."""
    runs = [folder / run["folder"] for variant in read_sweep(folder)["variants"] for run in variant["runs"]]
    return [run for run in runs if run.is_dir() and is_run(run)]


def build_sweep_report(folder: Path, place: Path) -> str:
    """The HTML report of a sweep's folder; its links to the runs' reports are relative to `place`."""
    sweep = read_sweep(folder)
    variants = sweep["variants"]
    runs = [run for variant in variants for run in variant["runs"]]
    charts = [chart for chart in sweep_charts(sweep, folder) if chart is not None]
    failed = [(v["name"], run) for v in variants for run in v["runs"] if run.get("state") == "failed"]
    name = str(sweep.get("name") or folder.resolve().name)
    facts = {"baseline": sweep.get("baseline"), "seeds": ", ".join(map(str, sweep.get("seeds") or [])) or None}
    facts |= {"variants": len(variants), "runs": len(runs)}
    sections = {"variants": "Variants", **({"charts": "Charts"} if charts else {}), "runs": "Runs"}
    if failed:
        sections["failed"] = "Failed"
    done = sum(run.get("state") == "done" for run in runs)
    state = "" if done == len(runs) else f"{done} of {len(runs)} runs done, {len(failed)} failed"
    body = [header("searche1-lite sweep", name, facts, sections, state), "<main>"]
    body.append(section("variants", "Variants", _variant_table(sweep)))
    if charts:
        body.append(section("charts", "Charts", cards(charts)))
    body.append(section("runs", "Runs", _run_table(variants, folder, place)))
    if failed:
        rows = [[escape(v), escape(run.get("seed")), _cell(run.get("error") or "no message")] for v, run in failed]
        found = table(("variant", "seed", "error"), rows, "Runs that ended with an error")
        body.append(section("failed", "Failed", found.replace("<td><span", '<td class="text"><span')))
    body += [notes(_remarks(variants)), "</main>"]
    return page(f"{name}: searche1-lite sweep", body)


def _cell(text: object) -> str:
    return f"<span>{escape(text)}</span>"


def _remarks(variants: list[dict[str, Any]]) -> list[str]:
    if not any(number(variant, "p_value") is not None for variant in variants):
        return []
    tests = sorted({str(v["p_test"]) for v in variants if v.get("p_test")})
    return [
        "Differences are paired by seed with the baseline; p (Holm) allows for the number of variants compared."
        + (f" p is of a {', or of a '.join(tests)}." if tests else "")
    ]


def _variant_table(sweep: dict[str, Any]) -> str:
    columns = (
        "variant", "what it is", "seeds", "EM", "95% interval", "EM − baseline", "p", "p (Holm)", "searches", "updates",
        "time a run",
    )  # fmt: skip
    rows = []
    for variant in sweep["variants"]:
        baseline = variant["name"] == sweep.get("baseline")
        cells = [
            variant["name"] + (" (baseline)" if baseline else ""),
            str(variant.get("title") or ""),
            str(len(variant.get("seeds") or [])),
            _form(variant, "em_mean", "{:.3f}"),
            interval_text(variant, "em_ci95"),
            "-" if baseline else _form(variant, "em_diff", "{:+.3f}"),
            _form(variant, "p_value", "{:.3g}"),
            _form(variant, "p_holm", "{:.3g}"),
            _form(variant, "searches_mean", "{:.2f}"),
            _form(variant, "updates", "{:.0f}"),
            seconds_text(number(variant, "seconds")),
        ]
        rows.append([escape(cell) for cell in cells])
    return table(columns, rows, "Means over seeds, with the interval of the mean over seeds")


def _form(record: dict[str, Any], key: str, form: str) -> str:
    value = number(record, key)
    return "-" if value is None else form.format(value)


def _run_table(variants: list[dict[str, Any]], folder: Path, place: Path) -> str:
    rows = []
    for variant in variants:
        for run in variant["runs"]:
            cells = [escape(cell) for cell in (
                variant["name"], run.get("seed"), run.get("state"), _form(run, "em", "{:.3f}"),
                _form(run, "searches", "{:.2f}"), _form(run, "updates", "{:.0f}"), seconds_text(number(run, "seconds")),
            )]  # fmt: skip
            rows.append([*cells, _link(folder / run["folder"] / FILE_NAME, place)])
    columns = ("variant", "seed", "state", "EM", "searches", "updates", "time", "report")
    return table(columns, rows, "Each run; a report is linked where there is one (report DIR --runs writes them)")


def _link(report: Path, place: Path) -> str:
    if not report.is_file():
        return "-"
    relative = Path(os.path.relpath(report.absolute(), place.absolute())).as_posix()
    return f'<a href="./{escape(quote(relative))}">open</a>'


def sweep_charts(sweep: dict[str, Any], folder: Path) -> list[Chart | None]:
    """EM, paired differences, searches against EM, EM by stage, and time."""
    variants = sweep["variants"]
    return [
        _em_chart(variants),
        _difference_chart(sweep),
        _searches_chart(variants),
        _stages_chart(variants, folder),
        _time_chart(variants),
    ]


def _rows_axis(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _height(rows: int) -> float:
    return max(200, 70 + 28 * rows)


def _run_figures(variant: dict[str, Any], key: str) -> list[tuple[Any, float]]:
    """(seed, figure) of the runs that are done."""
    return [
        (run.get("seed"), value)
        for run in variant["runs"]
        if run.get("state") == "done" and (value := number(run, key)) is not None
    ]


def _dots(axes: Axes, row: int, dots: list[tuple[Any, float]], name: str, what: str) -> None:
    """A variant's seeds, small, a little below its mean."""
    for seed, value in dots:
        [dot] = axes.plot([value], [row + 0.2], "o", color=SERIES[1], markersize=3.5, alpha=0.85)
        tip(dot, f"{name}, seed {seed}: {what} {value:.3f}")


def _em_chart(variants: list[dict[str, Any]]) -> Chart | None:
    having = [v for v in variants if number(v, "em_mean") is not None]
    if not having:
        return None

    def plot(axes: Axes) -> None:
        for row, variant in enumerate(having):
            mean, low_high = number(variant, "em_mean") or 0.0, interval(variant, "em_ci95")
            if low_high is not None:
                axes.plot(low_high, [row, row], color=SERIES[0], linewidth=2.2)
            _dots(axes, row, _run_figures(variant, "em"), variant["name"], "EM")
            [point] = axes.plot([mean], [row], "o", color=SERIES[0], markersize=7)
            tip(point, f"{variant['name']}: mean EM {mean:.3f}")
        _rows_axis(axes, [variant["name"] for variant in having])
        axes.set_xlabel("EM")

    rows = []
    for variant in having:
        seeds = ", ".join(f"{em:.3f}" for _, em in _run_figures(variant, "em"))
        rows.append((variant["name"], _form(variant, "em_mean", "{:.3f}"), interval_text(variant, "em_ci95"), seeds))
    note = "Mean with its interval over seeds (large), and the seeds (small)."
    return draw("em", "Exact match", plot, ("variant", "mean", "95% interval", "seeds"), rows, note, _height(len(rows)))


def _difference_chart(sweep: dict[str, Any]) -> Chart | None:
    variants, baseline = sweep["variants"], sweep.get("baseline")
    against = dict(next((_run_figures(v, "em") for v in variants if v["name"] == baseline), []))
    having = [v for v in variants if v["name"] != baseline and number(v, "em_diff") is not None]
    if not having:
        return None
    pairs = [[(s, em - against[s]) for s, em in _run_figures(v, "em") if s in against] for v in having]

    def plot(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, variant in enumerate(having):
            mean = number(variant, "em_diff") or 0.0
            axes.plot([0, mean], [row, row], color=GRID, linewidth=2.2)
            _dots(axes, row, pairs[row], variant["name"], "difference")
            [point] = axes.plot([mean], [row], "D", color=SERIES[0], markersize=6)
            tip(point, f"{variant['name']}: {mean:+.3f}, p {_form(variant, 'p_value', '{:.3g}')}")
        _rows_axis(axes, [variant["name"] for variant in having])
        axes.margins(x=0.1)
        axes.set_xlabel(label(f"EM − {baseline}", 40))

    rows = [
        (v["name"], _form(v, "em_diff", "{:+.3f}"), _form(v, "p_value", "{:.3g}"), _form(v, "p_holm", "{:.3g}"))
        for v in having
    ]
    columns = ("variant", "difference", "p", "p (Holm)")
    note = "Paired by seed: mean (diamond) and the seeds (dots)."
    return draw("difference", "Difference to the baseline", plot, columns, rows, note, _height(len(rows)))


def _searches_chart(variants: list[dict[str, Any]]) -> Chart | None:
    found = [
        (v["name"], searches, em)
        for v in variants
        if (searches := number(v, "searches_mean")) is not None and (em := number(v, "em_mean")) is not None
    ]
    if not found:
        return None

    def plot(axes: Axes) -> None:
        for name, searches, em in found:
            [point] = axes.plot([searches], [em], "o", color=SERIES[0], markersize=7)
            tip(point, f"{name}: {searches:.2f} searches, EM {em:.3f}")
            if len(found) <= 8:
                axes.annotate(
                    label(name, 18), (searches, em), (0, 7), textcoords="offset points", ha="center", fontsize=10,
                    color=INK,
                )  # fmt: skip
        axes.margins(0.22)
        axes.set_xlabel("searches a question")
        axes.set_ylabel("EM")

    rows = [(name, f"{searches:.2f}", f"{em:.3f}") for name, searches, em in found]
    note = "Up and to the left is better."
    return draw("searches", "Searches against exact match", plot, ("variant", "searches", "EM"), rows, note, 280)


def _stages_chart(variants: list[dict[str, Any]], folder: Path) -> Chart | None:
    """Each stage's EM, the mean over the runs that are done; a stage that some of them never had is left out."""
    means: dict[str, dict[str, float]] = {}
    for variant in variants:
        ems: dict[str, list[float]] = {}
        done = [run for run in variant["runs"] if run.get("state") == "done"] or variant["runs"]
        for run in done:
            for stage in stages_of(read_summary(folder / run["folder"])):
                if (em := number(stage, "em")) is not None:
                    ems.setdefault(stage["name"], []).append(em)
        if ems:
            most = max(map(len, ems.values()))
            means[variant["name"]] = {s: sum(values) / most for s, values in ems.items() if len(values) == most}
    if not means:
        return None
    stages = sorted({stage for of_stage in means.values() for stage in of_stage}, key=stage_order)

    def plot(axes: Axes) -> None:
        for place, (name, of_stage) in enumerate(means.items()):
            colour, dash = SERIES[place % len(SERIES)], _DASHES[place // len(SERIES) % len(_DASHES)]
            points = [(index, of_stage[stage]) for index, stage in enumerate(stages) if stage in of_stage]
            axes.plot(*zip(*points, strict=True), dash, color=colour, label=label(name, 18))
            for index, em in points:
                tip(
                    axes.plot([index], [em], "o", color=colour, markersize=4.5)[0],
                    f"{name}, {stages[index]}: mean EM {em:.3f}",
                )
        axes.set_xticks(range(len(stages)), stage_labels(stages))
        axes.set_ylabel("EM")

    rows = [
        (name, *(f"{of_stage[stage]:.3f}" if stage in of_stage else "-" for stage in stages))
        for name, of_stage in means.items()
    ]
    height = 250 + 18 * (len(means) // 2)
    return draw("stages", "Exact match by stage", plot, ("variant", *stages), rows, "Means over seeds.", height)


def _time_chart(variants: list[dict[str, Any]]) -> Chart | None:
    having = [(v["name"], seconds) for v in variants if (seconds := number(v, "seconds")) is not None]
    if not having:
        return None
    scale, unit = (60, "minutes") if max(seconds for _, seconds in having) > 300 else (1, "seconds")

    def plot(axes: Axes) -> None:
        for row, (name, seconds) in enumerate(having):
            [bar] = axes.barh([row], [seconds / scale], 0.6, color=SERIES[0])
            tip(bar, f"{name}: {seconds_text(seconds)}")
        _rows_axis(axes, [name for name, _ in having])
        axes.set_xlabel(unit)

    rows = [(name, seconds_text(seconds)) for name, seconds in having]
    return draw("time", "Time a run", plot, ("variant", "time"), rows, height=_height(len(rows)))
