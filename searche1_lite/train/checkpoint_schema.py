"""What a run's checkpoint says of the run, before any of it is believed.

    stages         of the summary, each with its name and exact match, and with seconds and steps where it was trained
    metrics_size   bytes of `metrics.jsonl` then
    unevaluated    the stage that was trained and is yet to be evaluated, if there is one
    within         how far a stage was, in a checkpoint within one

A checksum tells that it is as it was written, not who wrote it. Names become paths, so they are looked at too.
"""

import re
from collections.abc import Iterator
from typing import Any

_STAGE = re.compile(r"base|round[0-9]{1,9}\.(grpo|ofsd)")
_TRAJECTORIES = re.compile(r"[a-z0-9.]{1,100}")

_FIGURES = {"em": None, "seconds": 0, "steps": 0}
"""Of a stage, and what is taken where one is not there."""


def misfit(state: dict[str, Any]) -> str | None:
    """What in it no run can go on from, as one name; None if it will do."""
    return next(_misfits(state), None)


def _misfits(state: dict[str, Any]) -> Iterator[str]:
    stages = state.get("stages")
    if not isinstance(stages, list):
        yield "stages"
        return
    for place, stage in enumerate(stages):
        if not (_is_named(stage) and all(_is_number(stage.get(key, of)) for key, of in _FIGURES.items())):
            yield f"stages[{place}]"
    if not _is_count(state.get("metrics_size")):
        yield "metrics_size"
    if "unevaluated" in state and not _is_named(state["unevaluated"]):
        yield "unevaluated"
    if "within" in state:
        yield from (f"within.{name}" for name in _misfits_within(state["within"]))


def _misfits_within(within: Any) -> Iterator[str]:
    if not isinstance(within, dict):
        yield "stage"
        return
    if not _is_named({"name": within.get("stage")}):
        yield "stage"
    if not _is_count(within.get("step")):
        yield "step"
    if not _is_number(within.get("seconds", 0.0)):
        yield "seconds"
    if not _is_count(within.get("metrics_began", 0)):
        yield "metrics_began"
    for name in ("figures", "parts", "sizes"):
        if not isinstance(within.get(name, {}), dict):
            yield name
            return
    if not all(isinstance(part, dict) for part in within.get("parts", {}).values()):
        yield "parts"
    if not all(_TRAJECTORIES.fullmatch(name) and _is_count(size) for name, size in within.get("sizes", {}).items()):
        yield "sizes"


def _is_named(stage: Any) -> bool:
    return isinstance(stage, dict) and isinstance(name := stage.get("name"), str) and bool(_STAGE.fullmatch(name))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
