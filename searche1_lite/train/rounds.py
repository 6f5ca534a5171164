"""The method: rounds of GRPO and offline self-distillation (OFSD), with an evaluation after each stage.

Read `rounds` top to bottom. What a stage does is in `grpo.py`, `pairs.py` and `ofsd.py`; what makes a run safe to stop
and resume, bit for bit on a CPU, is in `run.py`.
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from random import Random
from typing import Any

from searche1_lite.config import Config
from searche1_lite.data.questions import load_run_questions
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.losses import try_losses
from searche1_lite.policy.model import tell_of_missing_bf16
from searche1_lite.rollout.reward import Reward, reward_name
from searche1_lite.rollout.samples import is_due
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.interrupt import Interrupted
from searche1_lite.runtime.progress import SILENT, Progress, say_on_stderr
from searche1_lite.runtime.ranks import (
    check_same,
    detect_lost_process,
    fail_together,
    is_first,
    local_main_first,
    wait_for_all,
)
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.search.base import Retriever
from searche1_lite.train.diagnostics import compare_teacher, watch
from searche1_lite.train.grpo import train_grpo
from searche1_lite.train.ofsd import ofsd_steps, train_ofsd
from searche1_lite.train.pairs import Pairs, select_pairs
from searche1_lite.train.processes import join
from searche1_lite.train.run import Rollouts, Run, StageResult
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.schedule import Stage
from searche1_lite.train.session import Session
from searche1_lite.train.tracking import check_trackers


def rounds(run: Run) -> None:
    """The stages that `run` has not done yet. By default two rounds of GRPO and OFSD."""
    if not run.stages:
        run.keep("base", StageResult())
    for stage in run.remaining_stages():
        if stage.kind == "grpo":
            result = reinforce(run, stage)
        else:
            rollouts = roll_out(run, stage)
            pairs = choose_pairs(run, stage, rollouts)
            result = distil(run, stage, rollouts, pairs)
        run.keep(stage.name, result)  # the checkpoint first, then its evaluation


def reinforce(run: Run, stage: Stage) -> StageResult:
    """GRPO: fresh rollouts of the training questions, exact match as reward, one update a step."""
    session, config = run.session, run.config
    file = f"{stage.name}.rollouts"
    keeper = run.keeper(stage, grown=(file,))
    steps, numbers = stage.steps(config.grpo.steps), count(keeper.steps + 1)

    def answer(questions: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
        return session.rollout(questions, n, Sampling(seed_parts, logprobs=True))

    def keep_rollouts(rollouts: Sequence[Trajectory]) -> None:
        run.folder.add_trajectories(file, [t.to_dict() for t in rollouts])
        if is_due(step := next(numbers), steps, config.logging.samples_every):
            session.show_samples(f"{stage.name}, step {step}", rollouts)

    with run.training(f"round{stage.round}: GRPO", stage, keeper, steps) as training:
        figures = train_grpo(
            session.model, session.tokenizer, answer, run.questions, training, on_rollouts=keep_rollouts,
            reward=run.reward,
        )  # fmt: skip
    return StageResult(keeper.seconds, figures)


def roll_out(run: Run, stage: Stage) -> Rollouts:
    """The policy answers its own training questions again, `ofsd.rollouts` times each."""
    settings, seed, index = run.config.ofsd, run.config.seed, stage.round
    chooser = Random(derive_seed(seed, "ofsd-questions", index))
    questions = chooser.sample(run.questions, min(settings.questions, len(run.questions)))
    sampling = Sampling((seed, "ofsd-rollouts", index))
    rollouts = run.rollouts_once(
        f"{stage.name}.rollouts", f"round{index}: roll out", questions, settings.rollouts, sampling
    )
    run.session.show_samples(f"{stage.name}, fresh rollouts", rollouts.trajectories)
    return rollouts


def choose_pairs(run: Run, stage: Stage, rollouts: Rollouts) -> Pairs:
    """Where one rollout is right and more efficient than a sibling, the two are a pair."""
    settings = run.config.ofsd
    seed = derive_seed(run.config.seed, "ofsd-reference", stage.round)
    pairs = select_pairs(rollouts.trajectories, settings.students, settings.reference, seed)
    if not pairs.chosen:
        why = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in pairs.counts.items())
        say_on_stderr(f"{stage.name}: there are no pairs to learn from ({why}); nothing is trained")
    return pairs


def distil(run: Run, stage: Stage, rollouts: Rollouts, pairs: Pairs) -> StageResult:
    """OFSD: token-level forward KL towards the same model shown the better rollout, adapter frozen."""
    session, index = run.session, stage.round
    identity = [[p.student.question.id, p.reference.sample, p.student.sample] for p in pairs.chosen]
    keeper = run.keeper(stage, data=identity)
    diagnosis = keeper.once("diagnosis", partial(diagnose, run, stage, rollouts, pairs))
    steps = ofsd_steps(pairs.chosen, run.config.ofsd)
    with run.training(f"round{index}: OFSD", stage, keeper, steps, spent=rollouts.seconds) as training:
        figures = train_ofsd(session.model, session.tokenizer, session.protocol, pairs.chosen, training)
    figures = {"pairs": pairs.counts, **diagnosis, **figures, "rollout_seconds": rollouts.seconds}
    return StageResult(rollouts.seconds + keeper.seconds, figures)


def diagnose(run: Run, stage: Stage, rollouts: Rollouts, pairs: Pairs) -> dict[str, Any]:
    """How far the teacher differs from the student before any update; measured only, nothing is trained by it."""
    session, began, seed_parts = run.session, time.monotonic(), (run.config.seed, "teacher", stage.round)
    privilege = compare_teacher(session, pairs.chosen, f"round{stage.round}: teacher", seed_parts)
    with fail_together(session.stop):
        kl, token_records = watch(
            session.model, session.protocol, rollouts.trajectories, pairs.chosen, run.config, session.stop
        )
    run.folder.save_trajectories(f"{stage.name}.kl", token_records)
    return {"privilege": privilege, "kl": kl, "diagnostic_seconds": round(time.monotonic() - began, 1)}


def run_training(
    config: Config,
    folder: RunFolder,
    progress: Progress,
    questions: tuple[list[Question], list[Question]] | None = None,
    retriever: Retriever | None = None,
    reward: Reward | None = None,
) -> dict[str, Any]:
    """A whole run, from the state of `folder`; returns the summary that it also keeps in `summary.json`.

    Several processes run it together if `accelerate launch` started them (`runtime/ranks.py`).

    Args:
        questions: the result of `load_run_questions(config)`, if it was called already.
        retriever: a search engine in place of `config.search`'s.
        reward: replaces exact match in GRPO; metrics and OFSD's pairs stay by exact match.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; everything done is kept.
        UserError: for errors that the user can fix; everything done is kept.
    """
    try:
        with detect_lost_process():
            join(config)
            check_trackers(config.logging)
            train_questions, test_questions = questions or load_run_questions(config)
            with local_main_first():
                session = Session(config, progress if is_first() else SILENT, retriever=retriever)
            tell_of_missing_bf16(session.model.device)
            session.protocol.check_prompts([*train_questions, *test_questions])
            run = Run(session, train_questions, test_questions, folder, reward)
            check_same(run.inputs | {"retriever": session.retriever.name, "reward": reward_name(reward)})
            try_losses(session.model.device)  # fails now, not after an hour of rollouts
            run.folder.start()
            with session.stop.listening():
                run.restore()
                rounds(run)
            return run.summary
    except Interrupted:
        wait_for_all()  # a launcher ends all processes as soon as the first one ends
        raise
    finally:
        folder.release()
