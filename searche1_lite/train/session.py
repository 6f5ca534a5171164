"""What a run, an evaluation or a session works with: model, search engine, protocol, loaded once."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig, what_counts
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import adapter_digest
from searche1_lite.policy.engine import Decoder, RolloutDecoder, uses_shadow
from searche1_lite.policy.model import load_policy, shadow_bytes
from searche1_lite.policy.shrinking import Limit
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.reward import Reward
from searche1_lite.rollout.samples import sample_table
from searche1_lite.rollout.scheduler import rollout
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.progress import Progress, say_on_stderr
from searche1_lite.runtime.ranks import agreeing, gather, share, world_size
from searche1_lite.search.base import Retriever
from searche1_lite.search.catalog import open_retriever
from searche1_lite.train.checkpoint import RunFolder
from searche1_lite.train.schedule import Stage
from searche1_lite.train.training_state import Resumed, StageKeeper

EPISODES_AT_ONCE = 16
"""Times `engine.batch_size` episodes are played, then kept: the most that an interruption can cost. Each time ends with
fewer and fewer of them side by side, so it should not be few."""


class Run:
    """The things a run works with, loaded once.

    Args:
        retriever: the search engine, if it is open already; or one that is being opened while the model is loaded.
        reward: what GRPO rewards in the place of exact match.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        adapter: Path | None = None,
        retriever: "Retriever | Future[Retriever] | None" = None,
        reward: Reward | None = None,
    ) -> None:
        self.config, self.progress, self.reward, self.stop = config, progress, reward, Stop()
        if config.engine.backend == "vllm":
            from searche1_lite.policy.vllm_engine import VllmEngine, check_installed

            check_installed()
        retriever = retriever or open_retriever(config.search, progress=progress)
        self.model: PeftModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_policy(config.model, adapter=adapter, seed=config.seed)
        self.retriever = retriever.result() if isinstance(retriever, Future) else retriever
        self.protocol = Protocol(self.tokenizer, config.protocol)
        self.engine = fitting_engine(config, self.model)
        self.slots = Limit("engine.batch_size", config.engine.batch_size)
        if self.model.device.type == "cpu" and is_crowded(torch.get_num_threads()):
            say_on_stderr("this machine is busy with other work; OMP_NUM_THREADS=1 may make this many times faster")
        self.decoder: Callable[..., RolloutDecoder] = Decoder
        if config.engine.backend == "vllm":
            self.decoder = VllmEngine(config, self.model, self.tokenizer).decoder

    def rollout(
        self, questions: Sequence[Question], n: int, seed_parts: Sequence[int | str], **how: Any
    ) -> list[Trajectory]:
        """`rollout` with this run's settings."""
        return rollout(
            self.model,
            self.tokenizer,
            self.retriever,
            self.protocol,
            questions,
            n,
            engine=self.engine,
            k=self.config.search.k,
            seed_parts=seed_parts,
            check=self.stop.check,
            slots=self.slots,
            decoder=self.decoder,
            **how,
        )

    def answer_shared(
        self,
        questions: Sequence[Question],
        n: int,
        seed_parts: Sequence[int | str],
        *,
        prompts: Sequence[list[int]] | None = None,
        on_progress: Callable[[int], None],
        **how: Any,
    ) -> list[Trajectory]:
        """`rollout`, each process playing its share of the questions; all have all the trajectories afterwards."""
        own = share(len(questions))
        with agreeing(self.stop):
            played = self.rollout(
                questions[own],
                n,
                seed_parts,
                prompts=None if prompts is None else prompts[own],
                on_progress=on_progress,
                **how,
            )
        trajectories = played
        if world_size() > 1:
            trajectories = [Trajectory.from_dict(record) for record in gather([t.to_dict() for t in played])]
        on_progress(len(trajectories) - len(played))
        return trajectories

    def answer(
        self,
        name: str,
        questions: Sequence[Question],
        n: int,
        seed_parts: Sequence[int | str],
        greedy: bool,
        prompts: Sequence[list[int]] | None = None,
    ) -> list[Trajectory]:
        """`answer_shared`, shown as the task `name`."""
        with self.progress.task(name, len(questions) * n) as advance:
            return self.answer_shared(questions, n, seed_parts, greedy=greedy, prompts=prompts, on_progress=advance)

    def answer_once(
        self,
        folder: RunFolder,
        file: str,
        name: str,
        questions: Sequence[Question],
        n: int,
        seed_parts: Sequence[int | str],
        greedy: bool,
    ) -> tuple[list[Trajectory], float]:
        """`answer`, kept in `trajectories/FILE.jsonl`, and the seconds that it took.

        Taken from there, as far as the same answers were given before: by this run, had it been interrupted, or by
        another one of its sweep. They are the same if the policy computes the same and was asked the same in the same
        way.
        """
        config = self.config
        asked = {
            "policy": (config.model.name, config.model.revision, config.model.quantization, adapter_digest(self.model)),
            "environment": {k: v for k, v in what_counts(config).items() if k.startswith(("search.", "protocol."))},
            "arithmetic": (config.engine.backend, config.engine.batch_size, config.engine.shadow),
            "decoding": "greedy" if greedy else (config.engine.temperature, *seed_parts),
            "questions": [(question.id, question.question, question.golden_answers) for question in questions],
            "n": n,
        }
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if (kept := folder.kept_answers(file, key)) is not None:
            return [Trajectory.from_dict(record) for record in kept[0]], kept[1]
        records, seconds = folder.begun_answers(file, key)
        trajectories = [Trajectory.from_dict(record) for record in records]
        at_once = max(1, EPISODES_AT_ONCE * config.engine.batch_size * world_size() // n)
        with self.progress.task(name, len(questions) * n) as advance:
            advance(len(trajectories))
            # Cut where a run that was never interrupted cuts.
            for start in range(len(trajectories) // n, len(questions), at_once):
                began = time.monotonic()
                asked_now = questions[start : start + at_once]
                fresh = self.answer_shared(asked_now, n, seed_parts, greedy=greedy, on_progress=advance)
                seconds = round(seconds + time.monotonic() - began, 3)
                trajectories += fresh
                if start + at_once < len(questions):
                    folder.add_answers(file, key, [t.to_dict() for t in fresh], seconds)
        folder.keep_answers(file, key, [t.to_dict() for t in trajectories], seconds)
        return trajectories, seconds

    def keeper(
        self,
        folder: RunFolder,
        stage: Stage,
        summary: dict[str, Any],
        resumed: "Resumed | None",
        grown: Sequence[str] = (),
    ) -> StageKeeper:
        """What keeps this stage's training; the policy is as the stage begins."""
        every = self.config.checkpoint.every_steps
        keeper = StageKeeper(folder, stage.name, self.model, every=every, state=summary, grown=grown, resumed=resumed)
        keeper.hold(slots=self.slots)
        return keeper

    def show_samples(self, title: str, trajectories: Sequence[Trajectory]) -> None:
        """A table of some of these, unless the run is watched without."""
        if self.config.logging.samples:
            self.progress.show(sample_table(title, trajectories, self.config.logging.samples))


def is_crowded(threads: int) -> bool:
    """Are there too few idle cores for so many threads? One then waits for the other at every operation."""
    return threads > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] + threads > 2 * (os.cpu_count() or 1)


def fitting_engine(config: Config, model: PeftModel) -> EngineConfig:
    """The engine's settings; where `shadow=auto` finds no room for plain weights, with `shadow=never`."""
    if config.engine.shadow == "auto" and not _has_room_for_shadow(config, model):
        return replace(config.engine, shadow="never")
    return config.engine


def _has_room_for_shadow(config: Config, model: PeftModel) -> bool:
    """Asked once a run: on a GPU of the memory plan, else of what is free. The user is told."""
    if not uses_shadow(config.engine, model.device.type, config.engine.batch_size):
        return True
    size = shadow_bytes(model)
    if model.device.type == "cuda":
        from searche1_lite.policy.capacity import gpu_capacity
        from searche1_lite.policy.memory import plan_memory

        dtype = model.get_input_embeddings().weight.dtype
        plan = plan_memory(config, model.get_base_model().config, "cuda", dtype, gpu_capacity())
        room = "shadow weights" in plan.stages["rollout"]
    else:
        room = size <= psutil.virtual_memory().available // 2
        if room:
            return True
    kind = "plain weights" if room else "the 4-bit weights: there is no room for plain ones"
    say_on_stderr(f"rollouts compute with {kind} ({size / 2**30:.1f} GiB)")
    return room
