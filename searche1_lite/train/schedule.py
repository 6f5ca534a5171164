"""What comes next in a run, and what its budget leaves for it. Pure functions of settings and finished stages."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from searche1_lite.config import Config


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that is about to begin."""

    kind: Literal["grpo", "ofsd"]
    round: int
    """From 1."""
    updates: int | None
    """Optimizer updates that the budget leaves, at least 1; None: no limit."""
    seconds: float | None
    """Seconds that it leaves, more than 0; None: no limit."""

    @property
    def name(self) -> str:
        return f"round{self.round}.{self.kind}"

    def steps(self, planned: int) -> int:
        """As many of the `planned` updates as are left."""
        return planned if self.updates is None else min(planned, self.updates)

    def deadline(self, spent: float = 0.0) -> float | None:
        """On `time.monotonic()`'s clock, for what begins now, after the stage has `spent` some seconds."""
        return None if self.seconds is None else time.monotonic() + self.seconds - spent


def next_stage(config: Config, done: Sequence[dict[str, Any]]) -> Stage | None:
    """The stage after those that are `done`, or None if the rounds or the budget are at their end, or a collapse made
    one.

    Args:
        done: a summary's stages: `name`, `seconds` and, where something was trained, `steps`; `ended` where the watch
            for a collapse ended one.
    """
    if any(stage.get("ended") == "stop" for stage in done):
        return None
    names = {stage["name"] for stage in done}
    updates = seconds = None
    if config.budget.updates:
        updates = config.budget.updates - sum(stage.get("steps", 0) for stage in done)
    if config.budget.seconds:
        seconds = config.budget.seconds - sum(stage["seconds"] for stage in done)
    if any(left is not None and left <= 0 for left in (updates, seconds)):
        return None
    kinds: tuple[Literal["grpo", "ofsd"], ...] = ("grpo", "ofsd") if config.ofsd.enabled else ("grpo",)
    for index in range(1, config.rounds + 1):
        for kind in kinds:
            if f"round{index}.{kind}" not in names:
                return Stage(kind, index, updates, seconds)
    return None


def best_stage(stages: Sequence[Mapping[str, Any]]) -> str:
    """The name of the evaluated stage with the highest exact match; of several, the last."""
    return max(enumerate(stages), key=lambda item: (item[1]["em"], item[0]))[1]["name"]
