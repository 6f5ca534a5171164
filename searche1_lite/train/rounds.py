"""The rounds: GRPO, fresh rollouts, OFSD, and an evaluation after each stage.

Read `_run` top to bottom: it is the method. Every stage is seeded by the run's seed and its own name, and how far it is
is kept (`training_state.py`), so on a CPU a run that was interrupted anywhere and resumed gives the same figures, bit
for bit, as one that was not.
"""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch

from searche1_lite.config import Config
from searche1_lite.data.questions import load_run_questions
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import load_adapter_weights
from searche1_lite.policy.divergence import try_losses
from searche1_lite.policy.model import tell_of_missing_bf16
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.reward import Reward, reward_name
from searche1_lite.rollout.samples import is_due
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.interrupt import Interrupted
from searche1_lite.runtime.progress import SILENT, Progress, say_on_stderr
from searche1_lite.runtime.ranks import (
    agreeing,
    check_alike,
    from_first,
    gather,
    is_first,
    one_first,
    telling_of_losses,
    wait_for_all,
)
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.search.base import Retriever, fingerprint_of
from searche1_lite.train.checkpoint import RunFolder
from searche1_lite.train.diagnostics import WATCHED, watch
from searche1_lite.train.grpo import train_grpo
from searche1_lite.train.ofsd import ofsd_steps, train_ofsd
from searche1_lite.train.pairs import Pair, select_pairs, teacher_prompts
from searche1_lite.train.processes import join, shared_folder
from searche1_lite.train.schedule import Stage, best_stage, next_stage
from searche1_lite.train.session import Run
from searche1_lite.train.stage_trainer import OnStep
from searche1_lite.train.tracking import Tracked, check_trackers, report_evaluations
from searche1_lite.train.training_state import Resumed


def run(
    config: Config,
    folder: RunFolder,
    progress: Progress,
    questions: tuple[list[Question], list[Question]] | None = None,
    retriever: Retriever | None = None,
    reward: Reward | None = None,
) -> dict[str, Any]:
    """A whole run, from where `folder` is; returns the summary that it also keeps in `summary.json`.

    Several processes run it together, if `accelerate launch` started them: see `distributed.py`.

    Args:
        questions: what `load_run_questions(config)` gave, if it was called already.
        retriever: searched in the place of what `config.search` names.
        reward: what GRPO rewards in the place of exact match; figures and OFSD's pairs stay by exact match.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; all that was done is kept.
        UserError: for what can be mended; so is then what was done.
    """
    try:
        with telling_of_losses():
            join(config)
            shown = progress if is_first() else SILENT
            return _run(config, shared_folder(folder), shown, questions, retriever, reward)
    except Interrupted:
        wait_for_all()  # before the first one ends: a launcher ends the others then, whatever they are at
        raise
    finally:
        folder.release()


def _run(
    config: Config,
    folder: RunFolder,
    progress: Progress,
    questions: tuple[list[Question], list[Question]] | None,
    retriever: Retriever | None,
    reward: Reward | None,
) -> dict[str, Any]:
    check_trackers(config.logging)
    train_questions, test_questions = questions or load_run_questions(config)
    with one_first():
        work = Run(config, progress, retriever=retriever, reward=reward)
    tell_of_missing_bf16(work.model.device)
    work.protocol.check_prompts([*train_questions, *test_questions])
    read = {
        "questions": _digest([*train_questions, *test_questions]),
        "passages": fingerprint_of(work.retriever),
    }
    check_alike(read | {"retriever": work.retriever.name, "reward": reward_name(reward)})
    try_losses(work.model.device)  # now, not after the first hour of rollouts
    folder.start()
    summary: dict[str, Any] = {
        "seed": config.seed,
        "model": config.model.name,
        "retriever": work.retriever.name,
        "reward": reward_name(reward),
        "training": {"data": config.data.train, "n": len(train_questions)},
        "evaluation": {"data": config.data.evaluation, "n": len(test_questions), "decoding": "greedy"},
        **read,
        "stages": [],
    }

    def keep(name: str, seconds: float, figures: dict[str, Any]) -> None:
        """Saves the policy as the stage `name` left it, before anything else can go wrong, then evaluates it."""
        peak = max(gather([peak_memory_mb()]))
        stage = from_first(lambda: {"name": name, "seconds": round(seconds, 1), "peak_memory_mb": peak, **figures})
        folder.save_checkpoint(
            name, work.model, summary | {"unevaluated": stage, "metrics_size": folder.metrics_size()}
        )
        measure(stage)

    def measure(stage: dict[str, Any]) -> None:
        """Evaluates the policy as it stands and adds its figures to the summary."""
        name = stage["name"]
        file, task, seed_parts = f"{name}.evaluation", f"{name}: evaluate", (config.seed, "evaluate")
        trajectories, seconds = work.answer_once(folder, file, task, test_questions, 1, seed_parts, greedy=True)
        metrics = evaluate(trajectories, config.seed)
        summary["stages"].append({"name": name} | metrics | stage | {"evaluation_seconds": round(seconds, 1)})
        folder.log({"stage": "evaluate", "name": name, **metrics})
        folder.update_checkpoint(name, summary | {"metrics_size": folder.metrics_size()})
        folder.save_summary(summary)
        report_evaluations(config, folder.path, summary["stages"])

    resumed: Resumed | None = None
    with work.stop.listening():
        if (latest := folder.latest()) is not None:
            checkpoint, summary = latest
            _check_same_parts(summary, work, read)
            if (within := summary.pop("within", None)) is not None:
                resumed = checkpoint, within
            load_adapter_weights(work.model, checkpoint if resumed is None else checkpoint / "start")
            folder.rewind(summary.pop("metrics_size"))
            if (unevaluated := summary.pop("unevaluated", None)) is not None:
                measure(unevaluated)
            folder.save_summary(summary)
            report_evaluations(config, folder.path, summary["stages"])  # one may have been lost with the last session
        else:
            folder.rewind(0)
        if not summary["stages"]:
            keep("base", 0.0, {})
        while (stage := next_stage(config, summary["stages"])) is not None:
            begin_peak()
            work.slots.reset()
            run_stage = _run_grpo if stage.kind == "grpo" else _run_ofsd
            seconds, figures = run_stage(work, train_questions, folder, stage, summary, resumed)
            resumed = None
            if figures.get("ended") == "rollback":
                figures["rolled_back_to"] = _go_back(work, folder, summary["stages"])
            keep(stage.name, seconds, figures | work.slots.figures())
    return summary


def _digest(questions: Sequence[Question]) -> str:
    """Tells whether questions and their answers are the same."""
    told = [(question.id, question.question, question.golden_answers) for question in questions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _check_same_parts(summary: dict[str, Any], work: Run, read: dict[str, str | None]) -> None:
    """What is no setting makes another run too."""
    for what, now in (("retriever", work.retriever.name), ("reward", reward_name(work.reward))):
        if (there := summary.get(what, now)) != now:
            raise UserError(f"the run was begun with the {what} {there!r}, not {now!r}; go on with that one")
    for what, content in read.items():
        if summary.get(what, content) != content:
            raise UserError(f"the {what} have changed since the run was begun; put them back, or choose another --out")


def _run_grpo(
    work: Run,
    questions: Sequence[Question],
    folder: RunFolder,
    stage: Stage,
    summary: dict[str, Any],
    resumed: Resumed | None,
) -> tuple[float, dict[str, Any]]:
    """Seconds and figures of one GRPO stage."""
    file = f"{stage.name}.rollouts"
    if resumed is None:
        folder.save_trajectories(file, [])
    keeper = work.keeper(folder, stage, summary, resumed, grown=(file,))
    steps, numbers = stage.steps(work.config.grpo.steps), count(keeper.steps + 1)

    def keep_rollouts(rollouts: Sequence[Trajectory]) -> None:
        folder.add_trajectories(file, [t.to_dict() for t in rollouts])
        if is_due(step := next(numbers), steps, work.config.logging.samples_every):
            work.show_samples(f"{stage.name}, step {step}", rollouts)

    with work.progress.task(f"round{stage.round}: GRPO", steps) as advance:
        advance(keeper.steps)
        result = train_grpo(
            work.model, work.tokenizer, partial(work.rollout, logprobs=True), questions, work.config,
            run_seed=work.config.seed, round_index=stage.round, output_dir=folder.path / "checkpoints",
            on_step=_step_done(folder, advance),
            on_rollouts=keep_rollouts, tracked=Tracked(work.config, folder.path, stage.name),
            deadline=stage.deadline(keeper.spent), limit=steps, keeper=keeper, stop=work.stop, reward=work.reward,
        )  # fmt: skip
    return keeper.seconds, result


def _run_ofsd(
    work: Run,
    questions: Sequence[Question],
    folder: RunFolder,
    stage: Stage,
    summary: dict[str, Any],
    resumed: Resumed | None,
) -> tuple[float, dict[str, Any]]:
    """Seconds and figures of one OFSD stage. What is only looked at, not needed to train, is timed apart."""
    config, settings, name, index = work.config, work.config.ofsd, stage.name, stage.round
    asked = _choose(questions, settings.questions, derive_seed(config.seed, "ofsd-questions", index))
    file, seed_parts = f"{name}.rollouts", (config.seed, "ofsd-rollouts", index)
    rollouts, rolled = work.answer_once(
        folder, file, f"round{index}: roll out", asked, settings.rollouts, seed_parts, greedy=False
    )
    work.show_samples(f"{name}, fresh rollouts", rollouts)
    pairs, counts = select_pairs(
        rollouts, settings.students, settings.reference, derive_seed(config.seed, "ofsd-reference", index)
    )
    chosen = [[pair.student.question.id, pair.reference.sample, pair.student.sample] for pair in pairs]
    if resumed is not None and resumed[1].get("figures", {}).get("chosen") != chosen:
        # Its rollouts are lost, and this machine has not given the same ones again.
        say_on_stderr(f"{name} begins anew: its rollouts had to be done again, and gave other pairs")
        folder.rewind(resumed[1].get("metrics_began", 0))
        folder.drop_within(name)
        resumed = None

    if not pairs:
        told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        say_on_stderr(f"{name}: there are no pairs to learn from ({told}); nothing is trained")
    if resumed is None:
        began = time.monotonic()
        privilege = compare_teacher(work, pairs, f"round{index}: teacher", (config.seed, "teacher", index))
        with agreeing(work.stop):
            kl, token_records = watch(work.model, work.protocol, rollouts, pairs, config, work.stop)
        folder.save_trajectories(f"{name}.kl", token_records)
        diagnostics = round(time.monotonic() - began, 1)
        figures = {"pairs": counts, "privilege": privilege, "kl": kl, "diagnostic_seconds": diagnostics}

    keeper = work.keeper(folder, stage, summary, resumed)
    if resumed is None:
        keeper.figures = {"stage": figures, "chosen": chosen}
    steps = stage.steps(ofsd_steps(pairs, settings))
    with work.progress.task(f"round{index}: OFSD", steps) as advance:
        advance(keeper.steps)
        result = train_ofsd(
            work.model, work.tokenizer, work.protocol, pairs, config,
            run_seed=config.seed, round_index=index, output_dir=folder.path / "checkpoints",
            on_step=_step_done(folder, advance), tracked=Tracked(config, folder.path, name),
            deadline=stage.deadline(rolled + keeper.spent), limit=steps, keeper=keeper, stop=work.stop,
        )  # fmt: skip
    return rolled + keeper.seconds, keeper.figures["stage"] | result | {"rollout_seconds": rolled}


def _go_back(work: Run, folder: RunFolder, stages: Sequence[dict[str, Any]]) -> str | None:
    """Makes the adapter that of the best evaluated stage whose checkpoint is whole, and tells which that is, if any."""
    kept = [stage for stage in stages if folder.is_whole(stage["name"])]
    if not kept:
        say_on_stderr("no earlier checkpoint is whole, so there is none to go back to; the policy stays as it is")
        return None
    name = best_stage(kept)
    load_adapter_weights(work.model, folder.path / "checkpoints" / name)
    say_on_stderr(f"the policy is again that of {name}")
    return name


def compare_teacher(
    work: Run, pairs: Sequence[Pair], name: str, seed_parts: Sequence[int | str], limit: int = WATCHED
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


def begin_peak() -> None:
    """From here on `peak_memory_mb` counts; without a GPU on Linux only, elsewhere it counts from the start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak since `begin_peak`: of the GPU's allocator where there is one, else of the process (resident)."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**10, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def _step_done(folder: RunFolder, advance: Callable[[int], None]) -> OnStep:
    """What is told of each training step."""

    def step_done(record: dict[str, Any]) -> None:
        folder.log(record)
        advance(1)

    return step_done
