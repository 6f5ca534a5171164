"""One question, one answer, with the searches that led to it."""

import time
from typing import Any

from searche1_lite.errors import UserError
from searche1_lite.evolve import Run
from searche1_lite.trajectory import Question


def ask(work: Run, question: str) -> dict[str, Any]:
    """Answers greedily.

    Returns:
        `question`, `answer` (None if the policy gave none), `searches` (`[{query, passages}]`), `text` (all the policy
        wrote), `tokens` (how many of them), `seconds`, and `stopped` (why it ended).

    Raises:
        UserError: for an empty question or one that exceeds the prompt budget.
    """
    if not question.strip():
        raise UserError('the question is empty; write one, such as searche1-lite ask "Who wrote Emma?"')
    began = time.monotonic()
    asked = Question("question", question, [""])
    trajectory = work.answer("ask", [asked], 1, (work.config.seed, "ask"), greedy=True)[0]
    record = trajectory.to_dict()
    return {
        "question": question,
        "answer": trajectory.answer,
        "searches": record["searches"],
        "text": "\n".join(turn.text for turn in trajectory.turns),
        "tokens": trajectory.n_model_tokens,
        "seconds": round(time.monotonic() - began, 3),
        "stopped": trajectory.stopped,
    }
