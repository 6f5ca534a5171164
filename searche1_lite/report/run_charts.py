"""The charts of one run. Each function gives a chart, or None where the run has not come so far."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from searche1_lite.report.record import RunRecord, interval, interval_text, number, seconds_text
from searche1_lite.report.svg import BAND, INK, MUTED, SERIES, Chart, draw, label, tip
from searche1_lite.report.trajectories import Trajectories, TrajectoryFile


def run_charts(run: RunRecord, trajectories: Trajectories) -> list[Chart]:
    """All charts that there are figures for."""
    stages, steps = run.stages, run.steps
    grpo = [step for step in steps if step.get("stage") == "grpo"]
    ofsd = [step for step in steps if step.get("stage") == "ofsd"]
    charts = [
        exact_match_chart(stages),
        searches_chart(stages),
        hops_chart(stages),
        rates_chart(stages),
        curve("reward", "GRPO: reward", grpo, {"reward": "mean reward"}, "Share of right rollouts at each step."),
        spread_chart([file for file in trajectories.files if file.kind == "rollouts"]),
        curve(
            "zero-spread", "GRPO: groups without spread", grpo, {"zero_std_fraction": "share of groups"},
            "All siblings earned the same, so the group teaches nothing.",
        ),
        curve("kl-reference", "GRPO: KL to the reference", grpo, {"kl": "KL (nats a token)"}, zero=True),
        curve("ofsd-loss", "OFSD: loss", ofsd, {"loss": "nats a token"}, zero=True),
        curve("grad-norm", "Gradient norm", [*grpo, *ofsd], {"grad_norm": "norm"}, zero=True),
        grouped(
            "kl-controls", "KL of the pairs, and its controls", stages, ("kl",),
            {"pairs": "own reference", "foreign": "another's", "plain": "plain prompt"}, "nats a token",
            "Teacher to student as each OFSD stage began. Plain is zero but for rounding.",
        ),
        kl_parts_chart(trajectories),
        privilege_chart(stages),
        time_chart(stages),
        memory_chart(stages),
        curve("speed", "GRPO: rollout speed", grpo, {"tokens_per_second": "tokens/s"}, zero=True),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def stage_labels(names: Sequence[str]) -> list[str]:
    """Short enough to stand side by side."""
    if len(names) <= 6:
        return [label(name, 14).replace(".", "\n") for name in names]
    return [label(name.replace("round", "").replace(".grpo", "G").replace(".ofsd", "D"), 6) for name in names]


def _stage_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), stage_labels(names))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="x", visible=False)


def _line(axes: Axes, points: Sequence[tuple[float, float, str]], colour: str, name: str | None = None) -> None:
    """A line through (x, y, tip) points."""
    axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, label=name)
    for x, y, text in points:
        tip(axes.plot([x], [y], "o", color=colour)[0], text)


def exact_match_chart(stages: list[dict[str, Any]]) -> Chart | None:
    found = [(s, em) for s in stages if (em := number(s, "em")) is not None]
    if not found:
        return None

    def plot(axes: Axes) -> None:
        points = []
        for index, (stage, em) in enumerate(found):
            low, high = interval(stage, "em_ci95") or (em, em)
            axes.plot([index, index], [low, high], "_-", color=SERIES[0], markersize=9, linewidth=1.4)
            points.append((index, em, f"{stage['name']}: EM {em:.3f}, 95% interval {low:.3f} to {high:.3f}"))
            axes.annotate(
                f"{em:.3f}", (index, high), (0, 5), textcoords="offset points", ha="center", fontsize=11, color=INK
            )
        _line(axes, points, SERIES[0])
        _stage_axis(axes, [stage["name"] for stage, _ in found])
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])

    rows = [(stage["name"], f"{em:.3f}", interval_text(stage, "em_ci95")) for stage, em in found]
    return draw("em", "Exact match by stage", plot, ("stage", "EM", "95% interval"), rows, "With 95% intervals.")


def lines_by_stage(
    key: str, title: str, stages: list[dict[str, Any]], series: dict[str, tuple[str, ...]], form: str = "{:.2f}",
    note: str = "", top: float | None = None,
) -> Chart | None:  # fmt: skip
    """A line a series; `series` gives where its figure is in a stage."""
    names = [stage["name"] for stage in stages]
    found = {name: [number(stage, *path) for stage in stages] for name, path in series.items()}
    found = {name: values for name, values in found.items() if any(value is not None for value in values)}
    if not found:
        return None

    def plot(axes: Axes) -> None:
        for colour, (name, values) in zip(cycle(SERIES), found.items(), strict=False):
            points = [
                (index, value, f"{names[index]}, {name}: {form.format(value)}")
                for index, value in enumerate(values)
                if value is not None
            ]
            _line(axes, points, colour, label(name))
        _stage_axis(axes, names)
        axes.set_ylim(0, top)

    rows = [
        (name, *("-" if value is None else form.format(value) for value in values))
        for name, *values in zip(names, *found.values(), strict=True)
    ]
    return draw(key, title, plot, ("stage", *found), rows, note)


def searches_chart(stages: list[dict[str, Any]]) -> Chart | None:
    series: dict[str, tuple[str, ...]] = {
        "a question": ("searches_per_question",),
        "per right answer": ("searches_per_correct",),
    }
    return lines_by_stage("searches", "Searches by stage", stages, series)


def hops_chart(stages: list[dict[str, Any]]) -> Chart | None:
    hops = sorted({h for s in stages if isinstance(s.get("em_by_hops"), dict) for h in s["em_by_hops"]})[:6]
    series: dict[str, tuple[str, ...]] = {f"{h} hop{'' if h == '1' else 's'}": ("em_by_hops", h) for h in hops}
    return lines_by_stage("hops", "Exact match by hops", stages, series, "{:.3f}", top=1.04)


def rates_chart(stages: list[dict[str, Any]]) -> Chart | None:
    series = {"no search": "no_search_rate", "invalid turn": "invalid_rate", "no answer": "unanswered_rate"}
    shares = [number(stage, key) or 0.0 for stage in stages for key in series.values()]
    return lines_by_stage(
        "rates", "Answers gone wrong in form", stages, {name: (key,) for name, key in series.items()}, "{:.3f}",
        "Shares of the questions evaluated; low is good.", top=max(0.05, 1.15 * max(shares, default=0.0)),
    )  # fmt: skip


def curve(
    key: str, title: str, steps: list[dict[str, Any]], series: dict[str, str], note: str = "", zero: bool = False
) -> Chart | None:
    """A figure of every training step, stage after stage, with the stages as bands.

    Args:
        series: field of `metrics.jsonl` -> what it is.
        zero: begin the axis at 0 and leave its end open; else both ends are those of a share.
    """
    steps = sorted((s for s in steps if isinstance(s.get("round"), int)), key=lambda s: (s["round"], s["stage"]))
    stages = list(dict.fromkeys(f"round{step['round']}.{step['stage']}" for step in steps))
    values = {name: [number(step, field) for step in steps] for field, name in series.items()}
    if not any(value is not None for of_field in values.values() for value in of_field):
        return None

    def plot(axes: Axes) -> None:
        for place, stage in enumerate(stages):
            inside = [i for i, s in enumerate(steps) if f"round{s['round']}.{s['stage']}" == stage]
            if place % 2:
                axes.axvspan(inside[0] + 0.5, inside[-1] + 1.5, color=BAND, linewidth=0)
            if len(stages) <= 6:
                axes.annotate(
                    label(stage, 14), ((inside[0] + inside[-1]) / 2 + 1, 1), (0, 2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", color=MUTED, fontsize=10,
                )  # fmt: skip
        for colour, (name, of_field) in zip(SERIES, values.items(), strict=False):
            pairs = [(index + 1, value) for index, value in enumerate(of_field) if value is not None]
            style = "o-" if len(pairs) <= 60 else "-"
            [line] = axes.plot(*zip(*pairs, strict=True), style, color=colour, markersize=3.5, linewidth=1.4)
            last = pairs[-1]
            tip(line, f"{name}: {_short(pairs[0][1])} at first, {_short(last[1])} last")
        axes.set_xlabel("step")
        axes.set_ylabel(", ".join(values))
        axes.set_xlim(0.5, len(steps) + 0.5)
        axes.set_ylim(0, None if zero else 1.02)

    rows = [
        (f"round{s['round']}.{s['stage']}", str(s.get("step", "-")), *(_short(v[index]) for v in values.values()))
        for index, s in enumerate(steps)
    ]
    return draw(key, title, plot, ("stage", "step", *values), rows, note)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bars(
    axes: Axes, groups: Sequence[str], series: dict[str, list[float | None]], say: Callable[[float], str]
) -> None:
    """Bars side by side, a group a stage."""
    width = 0.8 / max(1, len(series))
    for place, (colour, (name, values)) in enumerate(zip(cycle(SERIES), series.items(), strict=False)):
        first = next((index for index, value in enumerate(values) if value is not None), None)
        for index, value in enumerate(values):
            if value is not None:
                x = index + (place - (len(series) - 1) / 2) * width
                [bar] = axes.bar([x], [value], width * 0.92, color=colour, label=name if index == first else None)
                tip(bar, f"{groups[index]}, {name}: {say(value)}")
                axes.annotate(
                    say(value), (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=10, color=INK
                )
    axes.margins(y=0.15)
    _stage_axis(axes, groups)


def grouped(
    key: str, title: str, stages: list[dict[str, Any]], path: tuple[str, ...], series: dict[str, str], unit: str,
    note: str = "", form: str = "{:.3f}",
) -> Chart | None:  # fmt: skip
    """Bars of figures that lie together in a stage, for the stages that have them."""
    having = [s for s in stages if any(number(s, *path, field) is not None for field in series)]
    if not having:
        return None
    names = [stage["name"] for stage in having]
    values = {name: [number(stage, *path, field) for stage in having] for field, name in series.items()}

    def plot(axes: Axes) -> None:
        _bars(axes, names, values, form.format)
        axes.set_ylabel(unit)

    rows = [
        (name, *("-" if value is None else form.format(value) for value in found))
        for name, *found in zip(names, *values.values(), strict=True)
    ]
    return draw(key, title, plot, ("stage", *values), rows, note)


def privilege_chart(stages: list[dict[str, Any]]) -> Chart | None:
    """Is the teacher better? EM of the same weights under both prompts."""
    flat = [
        {"name": s["name"], "em": {who: number(s, "privilege", who, "em") for who in ("student", "teacher")}}
        for s in stages
    ]
    return grouped(
        "privilege", "Is the teacher better?", flat, ("em",),
        {"student": "plain prompt", "teacher": "shown a reference"}, "EM",
        "Fresh answers to the pairs' questions, the same weights under both prompts.",
    )  # fmt: skip


def spread_chart(files: list[TrajectoryFile]) -> Chart | None:
    """Of each stage's groups, how many have something to tell siblings apart by."""
    files = [file for file in files if sum(file.spread.values())]
    if not files:
        return None
    kinds = {"all": "all right", "some": "some right", "none": "none right"}
    names = [file.stage for file in files]

    def plot(axes: Axes) -> None:
        below = [0.0] * len(files)
        for colour, (key, name) in zip((SERIES[2], SERIES[0], SERIES[4]), kinds.items(), strict=True):
            for index, file in enumerate(files):
                share = file.spread.get(key, 0) / sum(file.spread.values())
                [bar] = axes.bar([index], [share], 0.62, below[index], color=colour, label=name if index == 0 else None)
                tip(bar, f"{names[index]}, {name}: {share:.0%} of {sum(file.spread.values())} groups")
                below[index] += share
        _stage_axis(axes, names)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of groups")

    rows = [(file.stage, *(str(file.spread.get(key, 0)) for key in kinds)) for file in files]
    note = "Only groups with some right and some wrong siblings teach GRPO."
    return draw("spread", "Reward spread among siblings", plot, ("stage", *kinds.values()), rows, note)


def kl_parts_chart(trajectories: Trajectories) -> Chart | None:
    """Where in the students' text the teacher disagrees."""
    stages = dict(list(trajectories.kl_by_part.items())[-len(SERIES) :])
    parts = [p for p in ("think", "search", "answer", "tags", "other") if any(p in found for found in stages.values())]
    if not parts:
        return None
    means = {
        stage: [found[part][0] / found[part][1] if part in found else None for part in parts]
        for stage, found in stages.items()
    }
    rows = [
        (part, *("-" if means[stage][index] is None else f"{means[stage][index]:.3f}" for stage in means))
        for index, part in enumerate(parts)
    ]
    plot = partial(_bars, groups=parts, series=means, say="{:.2f}".format)

    def labelled(axes: Axes) -> None:
        plot(axes)
        axes.set_ylabel("nats a token")

    note = "Mean KL of the watched students' tokens, by the part of the text they stand in."
    note += " The last stages only." if len(stages) < len(trajectories.kl_by_part) else ""
    return draw("kl-parts", "Where self-distillation teaches", labelled, ("part", *means), rows, note)


def time_parts(stage: dict[str, Any]) -> dict[str, float]:
    """Seconds of a stage by part; `rollouts` where they were timed apart from training."""
    spent, rollouts = number(stage, "seconds") or 0.0, number(stage, "rollout_seconds")
    return {
        "rollouts": rollouts or 0.0,
        "training": max(0.0, spent - (rollouts or 0.0)),
        "diagnostics": number(stage, "diagnostic_seconds") or 0.0,
        "evaluation": number(stage, "evaluation_seconds") or 0.0,
    }


def time_chart(stages: list[dict[str, Any]]) -> Chart | None:
    parts = [time_parts(stage) for stage in stages]
    if not any(sum(part.values()) for part in parts):
        return None
    names = [stage["name"] for stage in stages]
    rows = [(name, *(f"{seconds:.1f}" for seconds in part.values())) for name, part in zip(names, parts, strict=True)]
    # Where rollouts were not timed apart, training holds them; the note says so.
    apart = all(number(stage, "rollout_seconds") is not None for stage in stages if number(stage, "seconds"))
    note = "" if apart else "Where rollouts were not timed apart, they are in training."
    return draw(
        "time", "Time by part", partial(_time, names=names, parts=parts), ("stage", *parts[0]), rows, note,
        height=max(200, 90 + 26 * len(stages)),
    )  # fmt: skip


def _time(axes: Axes, names: list[str], parts: list[dict[str, float]]) -> None:
    scale, unit = (60, "minutes") if max(sum(part.values()) for part in parts) > 300 else (1, "seconds")
    left = [0.0] * len(parts)
    for colour, name in zip((SERIES[0], SERIES[1], SERIES[3], SERIES[4]), parts[0], strict=True):
        if not any(part[name] for part in parts):
            continue
        for index, part in enumerate(parts):
            [bar] = axes.barh(
                [index], [part[name] / scale], 0.62, [left[index]], color=colour, label=name if index == 0 else None
            )
            tip(bar, f"{names[index]}, {name}: {seconds_text(part[name])}")
            left[index] += part[name] / scale
    axes.set_yticks(range(len(names)), [label(name, 14) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)


def memory_chart(stages: list[dict[str, Any]]) -> Chart | None:
    having = [(s["name"], peak / 1024) for s in stages if (peak := number(s, "peak_memory_mb")) is not None]
    if not having:
        return None
    names = [name for name, _ in having]

    def plot(axes: Axes) -> None:
        for index, (name, peak) in enumerate(having):
            [bar] = axes.barh([index], [peak], 0.62, color=SERIES[0])
            tip(bar, f"{name}: {peak:.2f} GiB")
            axes.annotate(
                f"{peak:.2f}", (peak, index), (4, 0), textcoords="offset points", va="center", fontsize=11, color=INK
            )
        axes.set_yticks(range(len(names)), [label(name, 14) for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GiB")

    rows = [(name, f"{peak:.2f}") for name, peak in having]
    return draw("memory", "Peak memory by stage", plot, ("stage", "GiB"), rows, height=max(200, 90 + 26 * len(names)))
