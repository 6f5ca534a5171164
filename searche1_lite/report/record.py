"""What a run's folder holds besides trajectories, read as far as it goes: a run that goes on has written part of it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searche1_lite.config import Config, flatten, load_config
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import JsonFault, bounded_lines, parse_json, read_json
from searche1_lite.train.schedule import next_stage

_LARGEST = sys.float_info.max
"""A whole number may be larger, and no float."""


@dataclass
class RunRecord:
    """A run's settings and figures."""

    name: str
    config: Config | None
    """None where `config.yaml` is missing or does not fit this version."""
    summary: dict[str, Any]
    stages: list[dict[str, Any]]
    """The summary's stages, then those that only `metrics.jsonl` tells of yet."""
    steps: list[dict[str, Any]]
    """The training steps' lines of `metrics.jsonl`."""
    notes: list[str]
    """What could not be read, a sentence each."""

    @property
    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> (its value, its default), for those that differ."""
        if self.config is None:
            return {}
        defaults = flatten(Config())
        return {key: (value, defaults[key]) for key, value in flatten(self.config).items() if value != defaults[key]}

    @property
    def unfinished(self) -> str:
        """What is said of a run with stages to come; "" for one that is done, or whose settings are not known."""
        if self.config is None:
            return ""
        kept = [stage for stage in stages_of(self.summary) if number(stage, "seconds") is not None]
        if kept and next_stage(self.config, kept) is None:
            return ""
        rounds, kinds = self.config.rounds, 2 if self.config.ofsd.enabled else 1
        limited = self.config.budget.updates or self.config.budget.seconds
        of = "" if limited else f" of {1 + rounds * kinds}"
        return f"{len(self.stages)}{of} stages done: the run is going on, or was stopped"


def is_run(folder: Path) -> bool:
    """Whether a run has begun here; its summary comes with its first evaluation."""
    return (folder / "config.yaml").is_file() and (folder / "trajectories").is_dir()


class Lines:
    """The objects of a JSONL file that may still be written to; `faulty` counts lines that are none.

    A last line without its end is not counted: it is being written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.faulty = path, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for _, line in bounded_lines(file):
                try:
                    record = None if line is None else parse_json(line.decode("utf-8", "replace"))
                except JsonFault:
                    record = None
                if isinstance(record, dict):
                    yield record
                elif line is None or (line.strip() and line.endswith(b"\n")):
                    self.faulty += 1

    def note(self) -> list[str]:
        """A sentence if lines were left out; to be asked when all are read."""
        if not self.faulty:
            return []
        return [f"{self.path.name}: {self.faulty} {'line' if self.faulty == 1 else 'lines'} could not be read."]


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json`, or nothing where there is none or it is broken."""
    try:
        return read_json(folder / "summary.json", "")
    except UserError:
        return {}


def stages_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The summary's stages that have a name."""
    stages = summary.get("stages")
    found = stages if isinstance(stages, list) else []
    return [stage for stage in found if isinstance(stage, dict) and isinstance(stage.get("name"), str)]


def read_run(folder: Path) -> RunRecord:
    """Reads what is there; what is not is empty."""
    notes: list[str] = []
    config = None
    if (folder / "config.yaml").is_file():
        try:
            config = load_config(file=folder / "config.yaml")
        except UserError as error:
            notes.append(f"The settings are left out: {error}.")
    summary = read_summary(folder)
    if not summary and (folder / "summary.json").is_file():
        notes.append("summary.json could not be read.")
    stages = stages_of(summary)
    known = {stage["name"] for stage in stages}
    lines, steps = Lines(folder / "metrics.jsonl"), []
    for record in lines:
        if record.get("stage") != "evaluate":
            steps.append(record)
        elif isinstance(name := record.get("name"), str) and name not in known:
            known.add(name)
            stages.append(record | {"name": name})
    return RunRecord(folder.resolve().name, config, summary, stages, steps, notes + lines.note())


def number(record: dict[str, Any], *keys: str) -> float | None:
    """The figure under nested keys, None where it is missing or is not a finite number."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return finite(value)


def finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST else None


def interval(record: dict[str, Any], key: str) -> tuple[float, float] | None:
    """[low, high] under `key`, None where it is missing."""
    value = record.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def interval_text(record: dict[str, Any], key: str) -> str:
    low_high = interval(record, key)
    return "-" if low_high is None else f"{low_high[0]:.3f}–{low_high[1]:.3f}"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
