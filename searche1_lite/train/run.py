"""One training run: its questions, what is done so far, and what makes it safe to stop and resume.

Every stage is seeded by the run's seed and the stage's name, and its position is kept with its optimizer and random
states, so on a CPU an interrupted and resumed run gives the same figures, bit for bit, as an uninterrupted one.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from searche1_lite.config import what_counts
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import adapter_digest, load_adapter_weights
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.reward import Reward, reward_name
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.ranks import from_first, gather, world_size
from searche1_lite.search.base import fingerprint_of
from searche1_lite.train.peak_memory import peak_memory_mb, reset_peak_memory
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.schedule import Stage, best_stage, next_stage
from searche1_lite.train.session import Session
from searche1_lite.train.stage_checkpoint import Resumed, StageKeeper
from searche1_lite.train.stage_trainer import StageTraining
from searche1_lite.train.tracking import Tracked, report_evaluations

EPISODES_AT_ONCE = 16
"""Times `engine.batch_size` episodes are played between two saves: the most that an interruption can cost. Fewer and
fewer of them run side by side towards the end of each batch, so it should not be small."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    trajectories: list[Trajectory]
    seconds: float


@dataclass(frozen=True, slots=True)
class StageResult:
    seconds: float = 0.0
    """Of rollouts and training, without diagnostics."""
    figures: dict[str, Any] = field(default_factory=dict)


class Run:
    """A run in progress.

    Args:
        questions: for training.
        test_questions: for the evaluation after each stage.
        reward: replaces exact match in GRPO.
    """

    def __init__(
        self,
        session: Session,
        questions: list[Question],
        test_questions: list[Question],
        folder: RunFolder,
        reward: Reward | None = None,
    ) -> None:
        self.session, self.config, self.folder, self.reward = session, session.config, folder, reward
        self.questions, self.test_questions = questions, test_questions
        self.inputs = {
            "questions": _digest([*questions, *test_questions]),
            "passages": fingerprint_of(session.retriever),
        }
        data = self.config.data
        self.summary: dict[str, Any] = {
            "seed": self.config.seed,
            "model": self.config.model.name,
            "retriever": session.retriever.name,
            "reward": reward_name(reward),
            "training": {"data": data.train, "n": len(questions)},
            "evaluation": {"data": data.evaluation, "n": len(test_questions), "decoding": "greedy"},
            **self.inputs,
            "stages": [],
        }
        self._interrupted: Resumed | None = None
        """The checkpoint within the stage that was interrupted, until that stage takes it."""

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The finished stages' figures."""
        return self.summary["stages"]

    def restore(self) -> None:
        """Loads the state of the last session from the folder, if there is one."""
        if (latest := self.folder.latest()) is None:
            self.folder.rewind(0)
            return
        checkpoint, self.summary = latest
        self._check_same_inputs()
        if (within := self.summary.pop("within", None)) is not None:
            self._interrupted = checkpoint, within
        load_adapter_weights(self.session.model, checkpoint / "start" if within is not None else checkpoint)
        self.folder.rewind(self.summary.pop("metrics_size"))
        if (unevaluated := self.summary.pop("unevaluated", None)) is not None:
            self._evaluate(unevaluated)
        self.folder.save_summary(self.summary)
        report_evaluations(self.config, self.folder.path, self.stages)  # the last session may have lost one

    def _check_same_inputs(self) -> None:
        """Inputs that are not settings, but change what a run is."""
        for what, now in (("retriever", self.session.retriever.name), ("reward", reward_name(self.reward))):
            if (then := self.summary.get(what, now)) != now:
                raise UserError(f"the run was begun with the {what} {then!r}, not {now!r}; go on with that one")
        for what, content in self.inputs.items():
            if self.summary.get(what, content) != content:
                raise UserError(
                    f"the {what} have changed since the run was begun; put them back, or choose another --out"
                )

    def remaining_stages(self) -> Iterator[Stage]:
        """The stages that rounds and budget still leave; each must be kept before the next is asked for."""
        while (stage := next_stage(self.config, self.stages)) is not None:
            reset_peak_memory()
            self.session.slots.reset()
            yield stage

    def keeper(self, stage: Stage, grown: Sequence[str] = (), data: Any = None) -> StageKeeper:
        """Keeps this stage's training on disk, and restores it if the stage was interrupted.

        Args:
            grown: trajectory files that grow during the stage.
            data: identifies what the stage trains on. If an interrupted stage trained on something else, because its
                rollouts were lost and this machine gives others, the stage begins anew.
        """
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and interrupted[1].get("figures", {}).get("data") != data:
            say_on_stderr(f"{stage.name} begins anew: its rollouts had to be done again, and gave other pairs")
            self.folder.rewind(interrupted[1].get("metrics_began", 0))
            self.folder.drop_within(stage.name)
            interrupted = None
        if interrupted is None:
            for file in grown:
                self.folder.save_trajectories(file, [])
        keeper = StageKeeper(
            self.folder, stage.name, self.session.model, every=self.config.checkpoint.every_steps, state=self.summary,
            grown=grown, resumed=interrupted,
        )  # fmt: skip
        keeper.hold(slots=self.session.slots)
        if data is not None:
            keeper.figures["data"] = data
        return keeper

    @contextmanager
    def training(
        self, name: str, stage: Stage, keeper: StageKeeper, steps: int, spent: float = 0.0
    ) -> Iterator[StageTraining]:
        """What a stage's trainer needs beside its data, with a progress bar for its `steps`.

        Args:
            spent: seconds of the stage's budget that were used before training.
        """
        limit = stage.steps(steps)
        with self.session.progress.task(name, limit) as advance:
            advance(keeper.steps)

            def on_step(record: dict[str, Any]) -> None:
                self.folder.log(record)
                advance(1)

            yield StageTraining(
                self.config,
                stage.round,
                self.folder.path / "checkpoints",
                on_step,
                deadline=stage.deadline(spent + keeper.spent),
                limit=limit,
                tracked=Tracked(self.config, self.folder.path, stage.name),
                keeper=keeper,
                stop=self.session.stop,
            )

    def keep(self, name: str, result: StageResult) -> None:
        """Saves the policy as the stage `name` left it, before anything else can go wrong, then evaluates it."""
        figures = result.figures | self.session.slots.figures()
        if figures.get("ended") == "rollback":
            figures["rolled_back_to"] = self._roll_back()
        peak = max(gather([peak_memory_mb()]))
        stage = from_first(
            lambda: {"name": name, "seconds": round(result.seconds, 1), "peak_memory_mb": peak, **figures}
        )
        state = self.summary | {"unevaluated": stage, "metrics_size": self.folder.metrics_size()}
        self.folder.save_checkpoint(name, self.session.model, state)
        self._evaluate(stage)

    def _evaluate(self, stage: dict[str, Any]) -> None:
        """Evaluates the policy as it is now and adds its figures to the summary."""
        name, seed = stage["name"], self.config.seed
        evaluation = self.rollouts_once(
            f"{name}.evaluation", f"{name}: evaluate", self.test_questions, 1, Sampling((seed, "evaluate"), greedy=True)
        )
        metrics = evaluate(evaluation.trajectories, seed)
        self.stages.append({"name": name} | metrics | stage | {"evaluation_seconds": round(evaluation.seconds, 1)})
        self.folder.log({"stage": "evaluate", "name": name, **metrics})
        self.folder.update_checkpoint(name, self.summary | {"metrics_size": self.folder.metrics_size()})
        self.folder.save_summary(self.summary)
        report_evaluations(self.config, self.folder.path, self.stages)

    def _roll_back(self) -> str | None:
        """Restores the adapter of the best evaluated stage whose checkpoint is whole; its name, if there is one."""
        kept = [stage for stage in self.stages if self.folder.is_whole(stage["name"])]
        if not kept:
            say_on_stderr("no earlier checkpoint is whole, so there is none to go back to; the policy stays as it is")
            return None
        name = best_stage(kept)
        load_adapter_weights(self.session.model, self.folder.path / "checkpoints" / name)
        say_on_stderr(f"the policy is again that of {name}")
        return name

    def rollouts_once(
        self, file: str, task: str, questions: Sequence[Question], n: int, sampling: Sampling
    ) -> Rollouts:
        """Rollouts that are kept in `trajectories/FILE.jsonl`.

        They are read from there as far as they exist: from this run, had it been interrupted, or from another run of
        its sweep with the same policy, settings and questions.
        """
        config, folder = self.config, self.folder
        asked = {
            "policy": (
                config.model.name,
                config.model.revision,
                config.model.quantization,
                adapter_digest(self.session.model),
            ),
            "environment": {k: v for k, v in what_counts(config).items() if k.startswith(("search.", "protocol."))},
            "arithmetic": (config.engine.backend, config.engine.batch_size, config.engine.shadow),
            "decoding": "greedy" if sampling.greedy else (config.engine.temperature, *sampling.seed_parts),
            "questions": [(question.id, question.question, question.golden_answers) for question in questions],
            "n": n,
        }
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if (kept := folder.kept_answers(file, key)) is not None:
            return Rollouts([Trajectory.from_dict(record) for record in kept[0]], kept[1])
        records, seconds = folder.begun_answers(file, key)
        trajectories = [Trajectory.from_dict(record) for record in records]
        at_once = max(1, EPISODES_AT_ONCE * config.engine.batch_size * world_size() // n)
        with self.session.progress.task(task, len(questions) * n) as advance:
            advance(len(trajectories))
            # Batches begin where those of an uninterrupted run do.
            for start in range(len(trajectories) // n, len(questions), at_once):
                began = time.monotonic()
                batch = questions[start : start + at_once]
                fresh = self.session.rollout_shared(batch, n, sampling, None, advance)
                seconds = round(seconds + time.monotonic() - began, 3)
                trajectories += fresh
                if start + at_once < len(questions):
                    folder.add_answers(file, key, [t.to_dict() for t in fresh], seconds)
        folder.keep_answers(file, key, [t.to_dict() for t in trajectories], seconds)
        return Rollouts(trajectories, seconds)


def _digest(questions: Sequence[Question]) -> str:
    """Identifies questions and their answers."""
    content = [(question.id, question.question, question.golden_answers) for question in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
