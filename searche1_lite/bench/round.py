"""Where the time of a round goes: a short round of the demo, through the same `run` as `train`."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searche1_lite.config import load_config
from searche1_lite.search.index import cache_folder
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder


class TaskTimer:
    """A `Progress` that draws nothing and keeps how long each task took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        yield lambda count: None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def show(self, what: Any) -> None:
        pass


def measure_round(quick: bool = False, on_part: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """One round of the demo, a quarter as long as the preset's; `quick`: as short as it can be.

    Returns:
        What `round_shares` does.
    """
    on_part("round: a short round of the demo")
    steps, asked, evaluated = (1, 16, 32) if quick else (2, 64, 250)
    settings = [f"grpo.steps={steps}", f"ofsd.questions={asked}", f"data.evaluation_limit={evaluated}", "rounds=1"]
    config, timer = load_config("demo", None, settings), TaskTimer()
    cache_folder().mkdir(parents=True, exist_ok=True)  # /tmp may lie in memory
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        summary = run_training(config, RunFolder(Path(folder) / "run", config, False), timer)
    return round_shares(timer.seconds, summary["stages"][1]["rollout_seconds"])


def round_shares(tasks: dict[str, float], grpo_rollout: float) -> dict[str, Any]:
    """The parts of the first round.

    Args:
        tasks: seconds by the names that `run` gives its tasks.
        grpo_rollout: seconds of the GRPO stage that went into rollouts.

    Returns:
        `seconds` and `shares` of `grpo_rollout`, `grpo_update`, `ofsd_rollout`, `ofsd_update`, `evaluation` (of both
        stages) and `diagnostics` (the teacher's answers, which are only looked at). Loading and files are left out.
    """
    seconds = {
        "grpo_rollout": grpo_rollout,
        "grpo_update": tasks["round1: GRPO"] - grpo_rollout,
        "ofsd_rollout": tasks["round1: roll out"],
        "ofsd_update": tasks["round1: OFSD"],
        "evaluation": sum(tasks[f"round1.{stage}: evaluate"] for stage in ("grpo", "ofsd")),
        "diagnostics": sum(taken for name, taken in tasks.items() if name.startswith("round1: teacher")),
    }
    total = sum(seconds.values())
    return {
        "seconds": {part: round(taken, 2) for part, taken in seconds.items()},
        "shares": {part: round(taken / total, 4) for part, taken in seconds.items()},
    }
