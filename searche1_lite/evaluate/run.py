"""Answering the questions of an evaluation, some at a time, and going on where one was interrupted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from searche1_lite.data.questions import data_set_of
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.evaluate.baselines import Method, ask_by, check_questions
from searche1_lite.evaluate.saved import EvaluationFolder
from searche1_lite.rollout.metrics import Outcome, outcome, summarize
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.errors import UserError
from searche1_lite.train.session import Session

BATCHES_AT_ONCE = 4
"""Times `engine.batch_size` questions are answered, then kept: the most that an interruption can cost. Each time ends
with fewer and fewer episodes side by side, so it should not be few questions either."""


def run_evaluation(
    work: Session, questions: Sequence[Question], method: Method, folder: EvaluationFolder | None = None
) -> dict[str, Any]:
    """Greedy answers to `questions`, and what `summarize` makes of them.

    Trajectories are not held on to: with `folder` they are kept there, and questions that are done there are not
    answered again. On a CPU the figures do not depend on where an evaluation was interrupted, seconds apart.

    Args:
        work: loaded with the settings of `method_settings`.
        questions: each data set's together, as `order_by_data_set` gives them.

    Raises:
        UserError: for a question that exceeds the prompt budget, before the first is answered; as `folder.start` does.
        Interrupted: by Ctrl-C or SIGTERM; what `folder` was given is kept.
    """
    check_questions(method, questions, work.protocol)
    try:
        with work.stop.listening():
            return summarize(_outcomes(work, questions, method, folder), work.config.seed)
    finally:
        if folder:
            folder.release()


def _outcomes(
    work: Session, questions: Sequence[Question], method: Method, folder: EvaluationFolder | None
) -> list[Outcome]:
    """Of all questions, those that were answered before among them."""
    outcomes: list[Outcome] = []
    if folder:
        try:
            outcomes = [Outcome(**record) for record in folder.start()]
        except TypeError as error:
            raise UserError(f"{folder.path} does not fit this version ({error}); choose another --out") from error
    at_once = BATCHES_AT_ONCE * work.engine.batch_size
    for name, group in groupby(questions, data_set_of):
        asked = list(group)
        # Cut where an evaluation that was never interrupted cuts.
        chunks = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]
        done = {item.id for item in outcomes}
        left = [[question for question in chunk if question.id not in done] for chunk in chunks]
        if not any(left):
            continue
        with work.progress.task(f"evaluate {name}" if name else "evaluate", sum(map(len, left))) as advance:
            for chunk in filter(None, left):
                began = time.monotonic()
                trajectories = _answer(work, chunk, method, advance)
                seconds = (time.monotonic() - began) / len(chunk)
                fresh = [outcome(trajectory, round(seconds, 6)) for trajectory in trajectories]
                if folder:
                    folder.add([asdict(item) for item in fresh], [t.to_dict() for t in trajectories])
                outcomes += fresh
    return outcomes


def _answer(
    work: Session, questions: Sequence[Question], method: Method, advance: Callable[[int], None]
) -> list[Trajectory]:
    asked = ask_by(method, questions, work.protocol, work.retriever, work.config.search.k)
    trajectories = work.rollout(
        questions, 1, Sampling((work.config.seed, "evaluate"), greedy=True), asked.prompts, advance
    )
    for trajectory, given in zip(trajectories, asked.given, strict=True):
        trajectory.given = given
    return trajectories
