"""A run that is stopped anywhere and resumed comes to the same end as one that was not, bit for bit.

Its learning rate is another one in each step, and its reward draws from torch's, numpy's and python's generators, so
that whatever is lost of a schedule or of a random state gives another adapter.
"""

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import pytest
import torch

from searche1_lite.config import Config, load_config
from searche1_lite.rollout.reward import Written, exact_match
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.interrupt import Interrupted, Stop
from searche1_lite.train import session as loaded_run
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder

SETTINGS = [
    "rounds=1",
    "engine.batch_size=4",  # 16 times as many episodes are a part of the rollouts: 12 of 14 questions
    "grpo.steps=3",
    "grpo.questions_per_step=4",
    "grpo.micro_batch_tokens=400",
    "grpo.warmup_ratio=1.0",  # another rate in each step: where it stands counts
    "ofsd.questions=14",
    "ofsd.batch_size=4",
    "ofsd.micro_batch_tokens=400",
    "ofsd.warmup_ratio=1.0",
    "data.evaluation_limit=12",
    "seed=3",
]
TIMES = (
    "seconds",
    "evaluation_seconds",
    "diagnostic_seconds",
    "rollout_seconds",
    "tokens_per_second",
    "peak_memory_mb",
)


def drawn(written: Written) -> float:
    """Exact match, and on a right answer a little more or less by what is drawn."""
    drawn = float(torch.rand(())) + numpy.random.random() + random.random()  # noqa: NPY002 - the state that is kept
    return exact_match(written.answer, written.golden_answers) * (1 + 0.1 * drawn)


class Tasks(RichTasks):
    """Progress that knows which task is going on."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.now = "between"

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.now = name
        with super().task(name, total) as advance:
            yield advance
        self.now = "between"


class KeepsAll(RunFolder):
    """A run's folder from which no checkpoint goes, to be compared."""

    def drop_within(self, name: str) -> None:
        pass


def play(
    path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int] | None = None
) -> list[str]:
    """Runs to the end, or to the n-th point of a kind where a run can be stopped, where a SIGTERM comes.

    A task has more such points where searches are waited for long, so a point is counted within its own.

    Returns:
        The kind of each point: the task that was going on, and in a training step whether it was before its first pass
        or a later one.
    """
    tasks, points, steps = Tasks(), [], [None]

    class Counting(Stop):
        def check(self) -> None:
            caller = sys._getframe(1)
            points.append(tasks.now + passes_done(caller, steps))
            if stop_at == (points[-1], points.count(points[-1])):
                signal.raise_signal(signal.SIGTERM)
            super().check()

    monkeypatch.setattr(loaded_run, "Stop", Counting)
    folder = KeepsAll(path, config, resume=True)
    if stop_at is None:
        run_training(config, folder, tasks, reward=drawn)
    else:
        with pytest.raises(Interrupted) as caught:
            run_training(config, folder, tasks, reward=drawn)
        assert caught.value.exit_code == 143
    return points


def passes_done(caller: FrameType, steps: list[FrameType | None]) -> str:
    """Where in a training step its code is; outside of one, nothing. `steps` has the last such code."""
    if caller.f_code.co_name != "_passes":
        return ""
    begins, steps[0] = caller is not steps[0], caller
    gradients = [p.grad for p in caller.f_locals["model"].parameters() if p.requires_grad and p.grad is not None]
    assert any(bool(gradient.any()) for gradient in gradients) != begins, "gradients are added up within a step"
    return ", first pass" if begins else ", later pass"


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def results(path: Path) -> dict[str, Any]:
    """All that a run comes to, times left out: file by file, byte by byte where no times are in it."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.suffix == ".safetensors" and "step-" not in name:
            found[name] = file.read_bytes()
        elif file.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in file.read_text().splitlines()]
        elif name == "summary.json":
            found[name] = timeless(json.loads(file.read_text()))
    return found


def optimizers(path: Path) -> dict[str, bytes]:
    """The optimizer's state after each step that was kept."""
    files = sorted((path / "checkpoints").glob("*.step-*/optimizer.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = tmp_path_factory.mktemp("unbroken") / "run"
        config = load_config("demo", None, [*SETTINGS, "checkpoint.every_steps=1"])
        return path, play(path, config, monkeypatch)


POINTS = [
    ("base: evaluate", 0.3),
    ("base: evaluate", 0.9),
    ("round1: GRPO", 0.4),
    ("round1: GRPO, first pass", 0.0),
    ("round1: GRPO, later pass", 0.5),
    ("round1: GRPO, later pass", 0.99),
    ("round1.grpo: evaluate", 0.5),
    ("round1: roll out", 0.1),
    ("round1: roll out", 0.95),
    ("round1: teacher (plain)", 0.5),
    ("between", 0.6),
    ("round1: OFSD, first pass", 0.0),
    ("round1: OFSD, later pass", 0.5),
    ("round1: OFSD, later pass", 0.99),
    ("round1.ofsd: evaluate", 0.4),
]
"""Where runs are stopped: in a task, and how far in it."""

OFTEN = [("round1: GRPO, later pass", 0.5), ("round1: roll out", 0.1), ("round1: OFSD, first pass", 0.0)]
"""Those that are not marked slow."""


@pytest.mark.parametrize(
    ("task", "place"),
    [point if point in OFTEN else pytest.param(*point, marks=pytest.mark.slow) for point in POINTS],
)
def test_a_run_stopped_anywhere_and_resumed_comes_to_the_same_end_bit_for_bit(
    unbroken: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, place: float
) -> None:
    whole, points = unbroken
    config = load_config("demo", None, [*SETTINGS, "checkpoint.every_steps=0"])
    done = play(tmp_path / "run", config, monkeypatch, stop_at=(task, int(place * points.count(task)) + 1))
    config = load_config("demo", None, [*SETTINGS, "checkpoint.every_steps=1"])
    again = play(tmp_path / "run", config, monkeypatch)
    assert results(tmp_path / "run") == results(whole)
    kept = optimizers(tmp_path / "run")
    there = optimizers(whole)
    common = kept.keys() & there.keys()
    assert common or task == "round1.ofsd: evaluate"
    assert all(kept[step] == there[step] for step in common)
    assert done[-1] == task
    assert len(again) < len(points) or task == "base: evaluate", "what was done is not done again"


@pytest.mark.slow
def test_rollouts_damaged_while_a_run_is_interrupted_are_made_again_to_the_same_end(
    unbroken: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, points = unbroken
    config = load_config("demo", None, [*SETTINGS, "checkpoint.every_steps=1"])
    play(tmp_path / "run", config, monkeypatch, stop_at=("round1: OFSD, later pass", 2))
    rollouts = tmp_path / "run" / "trajectories" / "round1.ofsd.rollouts.jsonl"
    first, *others = map(json.loads, rollouts.read_text().splitlines())
    first["completion_ids"][0] ^= 1
    rollouts.write_text("".join(json.dumps(record) + "\n" for record in [first, *others]))
    again = play(tmp_path / "run", config, monkeypatch)
    assert "round1: roll out" in again
    assert f"{rollouts} has changed since it was written" in capsys.readouterr().err
    assert results(tmp_path / "run") == results(whole)
