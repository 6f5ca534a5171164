"""The rounds: GRPO, fresh rollouts, OFSD, and an evaluation after each stage.

Read `run` top to bottom: it is the method. Every stage is seeded by the run's seed and its own name, so a run that was
interrupted and resumed after any stage gives the same figures as one that was not.
"""

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.benchmarks import load_run_questions
from searche1_lite.checkpoint import RunFolder
from searche1_lite.config import Config, SearchConfig
from searche1_lite.evaluate import evaluate
from searche1_lite.grpo import train_grpo
from searche1_lite.model import load_adapter_weights, load_policy
from searche1_lite.ofsd import Pair, select_pairs, teacher_prompts, train_ofsd
from searche1_lite.protocol import Protocol as TagProtocol
from searche1_lite.rollout import rollout
from searche1_lite.search.base import Retriever
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.index import cache_folder, ensure_index
from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Question, Trajectory


class Progress(Protocol):
    """Where a run tells how far it is."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A part of the run with `total` units; the function it gives is told how many more are done."""
        ...


def open_retriever(config: SearchConfig) -> Retriever:
    """The configured search engine; its index is built first if need be."""
    if config.index is not None:
        index = Path(config.index)
    elif config.corpus == "demo":
        from searche1_lite.demo.world import DEMO_WORLD_SEED, write_demo_corpus

        corpus = cache_folder() / f"demo-{DEMO_WORLD_SEED}.jsonl"
        corpus.parent.mkdir(parents=True, exist_ok=True)
        write_demo_corpus(corpus)
        index = ensure_index(corpus, threads=config.threads)
    else:
        index = ensure_index(Path(config.corpus), threads=config.threads)
    return BM25Retriever(index, config.k1, config.b, config.threads)


class Run:
    """The things a run works with, loaded once."""

    def __init__(self, config: Config, progress: Progress, adapter: Path | None = None) -> None:
        self.config, self.progress = config, progress
        self.retriever = open_retriever(config.search)
        self.model: PeftModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_policy(config.model, adapter=adapter, seed=config.seed)
        self.protocol = TagProtocol(self.tokenizer, config.protocol)

    def answer(
        self,
        name: str,
        questions: Sequence[Question],
        n: int,
        seed_parts: Sequence[int | str],
        greedy: bool,
        prompts: Sequence[list[int]] | None = None,
    ) -> list[Trajectory]:
        """`rollout` with this run's settings, shown as the task `name`."""
        with self.progress.task(name, len(questions) * n) as advance:
            return rollout(
                self.model,
                self.tokenizer,
                self.retriever,
                self.protocol,
                questions,
                n,
                engine=self.config.engine,
                k=self.config.search.k,
                seed_parts=seed_parts,
                greedy=greedy,
                prompts=prompts,
                on_progress=advance,
            )


def run(config: Config, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """A whole run, from where `folder` is; returns the summary that it also keeps in `summary.json`."""
    train_questions, test_questions = load_run_questions(config)
    work = Run(config, progress)
    folder.start()
    summary: dict[str, Any] = {
        "seed": config.seed,
        "model": config.model.name,
        "retriever": work.retriever.name,
        "evaluation": {"data": config.data.evaluation, "n": len(test_questions), "decoding": "greedy"},
        "stages": [],
    }
    if (latest := folder.latest()) is not None:
        checkpoint, summary = latest
        load_adapter_weights(work.model, checkpoint)
        folder.save_summary(summary)  # a run may have died between its checkpoint and its summary
    done = [stage["name"] for stage in summary["stages"]]
    folder.rewind(done[-1] if done else None)

    def finish(name: str, train_seconds: float, extra: dict[str, Any]) -> None:
        """Evaluates the policy as it stands, and saves it with its figures."""
        began = time.monotonic()
        trajectories = work.answer(f"{name}: evaluate", test_questions, 1, (config.seed, "evaluate"), greedy=True)
        metrics = evaluate(trajectories, config.seed)
        stage = {
            "name": name,
            **metrics,
            "seconds": round(train_seconds, 1),
            "evaluation_seconds": round(time.monotonic() - began, 1),
            "peak_memory_mb": peak_memory_mb(),
            **extra,
        }
        summary["stages"].append(stage)
        folder.save_trajectories(f"{name}.evaluation", [t.to_dict() for t in trajectories])
        folder.log({"stage": "evaluate", "name": name, **metrics})
        folder.save_checkpoint(name, work.model, summary)
        folder.save_summary(summary)

    if "base" not in done:
        finish("base", 0.0, {})
    for index in range(1, config.rounds + 1):
        if f"round{index}.grpo" not in done:
            began = time.monotonic()
            with progress.task(f"round{index}: GRPO", config.grpo.steps) as advance:
                result = train_grpo(
                    work.model, work.tokenizer, work.retriever, work.protocol, train_questions, config,
                    run_seed=config.seed, round_index=index, output_dir=folder.path / "checkpoints",
                    on_step=lambda record, advance=advance: (folder.log(record), advance(1)),
                )  # fmt: skip
            finish(f"round{index}.grpo", time.monotonic() - began, result)
        if config.ofsd.enabled and f"round{index}.ofsd" not in done:
            began = time.monotonic()
            name = f"round{index}.ofsd"
            asked = _choose(train_questions, config.ofsd.questions, derive_seed(config.seed, "ofsd-questions", index))
            seed_parts = (config.seed, "ofsd-rollouts", index)
            rollouts = work.answer(f"round{index}: roll out", asked, config.ofsd.rollouts, seed_parts, greedy=False)
            folder.save_trajectories(f"{name}.rollouts", [t.to_dict() for t in rollouts])
            pairs, counts = select_pairs(rollouts, config.ofsd.students)
            privilege = compare_teacher(work, pairs, f"round{index}: teacher", (config.seed, "teacher", index))
            with progress.task(
                f"round{index}: OFSD", -(-config.ofsd.epochs * len(pairs) // config.ofsd.batch_size)
            ) as advance:
                result = train_ofsd(
                    work.model, work.tokenizer, work.protocol, pairs, config,
                    run_seed=config.seed, round_index=index, output_dir=folder.path / "checkpoints",
                    on_step=lambda record, advance=advance: (folder.log(record), advance(1)),
                )  # fmt: skip
            finish(name, time.monotonic() - began, {"pairs": counts, "privilege": privilege, **result})
    return summary


def compare_teacher(
    work: Run, pairs: Sequence[Pair], name: str, seed_parts: Sequence[int | str], limit: int = 64
) -> dict[str, dict[str, float]]:
    """Is the teacher better than the student? Fresh sampled answers to the pairs' questions under both prompts.

    The weights are the same for both, as at the beginning of an OFSD stage.

    Returns:
        `{"teacher", "student"}`, each with `em` and `searches_per_question`; empty where there are no pairs.
    """
    shown = pairs[:limit]
    kinds = {"student": "plain", "teacher": "privileged"}
    result: dict[str, dict[str, float]] = {}
    for who, kind in kinds.items() if shown else ():
        prompts = teacher_prompts(work.protocol, shown, kind, work.config.ofsd.reference_documents)
        questions = [pair.reference.question for pair in shown]
        episodes = work.answer(f"{name} ({kind})", questions, 1, seed_parts, greedy=False, prompts=prompts)
        metrics = evaluate(episodes, work.config.seed)
        result[who] = {key: metrics[key] for key in ("em", "searches_per_question")}
    return result


def _choose(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    return Random(seed).sample(list(questions), min(count, len(questions)))


def peak_memory_mb() -> float:
    """Peak so far: of the GPU's allocator where there is one, else of the process (resident)."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
