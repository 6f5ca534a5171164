"""A policy and its search engine, loaded once: what training, evaluations and interactive sessions work with."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.engine import Decoder, RolloutDecoder, uses_shadow
from searche1_lite.policy.model import load_policy, shadow_bytes
from searche1_lite.policy.shrinking import Limit
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.samples import sample_table
from searche1_lite.rollout.scheduler import Agent, Hooks, Sampling, rollout
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.progress import Progress, say_on_stderr
from searche1_lite.runtime.ranks import fail_together, gather, share, world_size
from searche1_lite.search.base import Retriever
from searche1_lite.search.catalog import open_retriever


class Session:
    """The model, the search engine and the protocol of one config.

    Args:
        adapter: folder of the adapter to load; None: a fresh one.
        retriever: the search engine if it is already open, or a future of one that is opened while the model loads.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        adapter: Path | None = None,
        retriever: "Retriever | Future[Retriever] | None" = None,
    ) -> None:
        self.config, self.progress, self.stop = config, progress, Stop()
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

    @property
    def agent(self) -> Agent:
        return Agent(
            self.model,
            self.tokenizer,
            self.retriever,
            self.protocol,
            self.engine,
            self.config.search.k,
            self.slots,
            self.decoder,
        )

    def rollout(
        self,
        questions: Sequence[Question],
        n: int,
        sampling: Sampling,
        prompts: Sequence[list[int]] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """Episodes of this process alone; see `rollout.scheduler.rollout`."""
        hooks = Hooks(on_progress=on_progress, check=self.stop.check)
        return rollout(self.agent, questions, n, sampling, prompts=prompts, hooks=hooks)

    def rollout_shared(
        self,
        questions: Sequence[Question],
        n: int,
        sampling: Sampling,
        prompts: Sequence[list[int]] | None,
        on_progress: Callable[[int], None],
    ) -> list[Trajectory]:
        """`rollout` with the questions split among the processes; each of them returns all the trajectories."""
        own = share(len(questions))
        own_prompts = None if prompts is None else prompts[own]
        with fail_together(self.stop):
            played = self.rollout(questions[own], n, sampling, own_prompts, on_progress)
        trajectories = gather_trajectories(played)
        on_progress(len(trajectories) - len(played))
        return trajectories

    def rollout_task(
        self,
        name: str,
        questions: Sequence[Question],
        n: int,
        sampling: Sampling,
        prompts: Sequence[list[int]] | None = None,
    ) -> list[Trajectory]:
        """`rollout_shared`, with its progress shown as the task `name`."""
        with self.progress.task(name, len(questions) * n) as advance:
            return self.rollout_shared(questions, n, sampling, prompts, advance)

    def show_samples(self, title: str, trajectories: Sequence[Trajectory]) -> None:
        """A table of `logging.samples` of these, if that is not 0."""
        if self.config.logging.samples:
            self.progress.show(sample_table(title, trajectories, self.config.logging.samples))


def gather_trajectories(trajectories: list[Trajectory]) -> list[Trajectory]:
    """The trajectories of all processes, in the order of the processes."""
    if world_size() == 1:
        return trajectories
    return [Trajectory.from_dict(record) for record in gather([t.to_dict() for t in trajectories])]


def is_crowded(threads: int) -> bool:
    """Whether there are too few idle cores for so many threads, which then wait for each other at every operation."""
    return threads > 1 and hasattr(os, "getloadavg") and os.getloadavg()[0] + threads > 2 * (os.cpu_count() or 1)


def fitting_engine(config: Config, model: PeftModel) -> EngineConfig:
    """The engine's settings; `shadow=never` in place of `shadow=auto` where plain weights do not fit."""
    if config.engine.shadow == "auto" and not _has_room_for_shadow(config, model):
        return replace(config.engine, shadow="never")
    return config.engine


def _has_room_for_shadow(config: Config, model: PeftModel) -> bool:
    """By the memory plan on a GPU, by what is free on a CPU."""
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
