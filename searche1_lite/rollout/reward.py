"""Exact match and token F1 of the answer in model-written text, and custom rewards.

Normalisation is SQuAD's, as Search-R1 and FlashRAG use it: lower-case, drop punctuation, drop a/an/the, squeeze spaces.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searche1_lite.data.trajectory import Trajectory
from searche1_lite.rollout.protocol import last_block
from searche1_lite.runtime.errors import UserError

UNINFORMATIVE = {"", "yes", "no", "noanswer"}
"""Normalised answers whose presence in a passage says nothing about the retrieval."""

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """`text` normalised for comparison (SQuAD v1.1's `normalize_answer`)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def plain_words(text: str) -> str:
    """`text` in lower case, split at every character that is neither letter nor digit: `Nolan's` is `nolan s`."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0. None or a blank earns 0.0."""
    if prediction is None or not prediction.strip():
        return 0.0
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(gold) for gold in golds))


def f1_score(prediction: str | None, golds: Sequence[str]) -> float:
    """The best token F1 against any gold answer, in [0, 1].

    As in HotpotQA's metric, `yes`, `no` and `noanswer` earn all or nothing. None or a blank earns 0.0.
    """
    if prediction is None or not prediction.strip():
        return 0.0
    return max((_f1(normalize_answer(prediction), normalize_answer(gold)) for gold in golds), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    if prediction == gold:
        return 1.0
    if {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    predicted, expected = prediction.split(), gold.split()
    shared = (Counter(predicted) & Counter(expected)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class Written:
    """The part of an episode that a custom reward sees: the question and model-written text, never a document."""

    question: str
    golden_answers: tuple[str, ...]
    turns: tuple[str, ...]
    """The decoded model turns, in order, tags included."""
    queries: tuple[str, ...]
    """The searches' queries."""
    answer: str | None
    """The last complete `<answer>`, or None."""


Reward = Callable[[Written], float]
"""A custom reward for GRPO: any finite number; only differences within a group of rollouts count."""


def written_by_policy(trajectory: Trajectory) -> Written:
    """An episode without its environment text."""
    return Written(
        trajectory.question.question,
        tuple(trajectory.question.golden_answers),
        tuple(turn.text for turn in trajectory.turns),
        tuple(search.query for search in trajectory.searches),
        trajectory.answer,
    )


def earned(reward: Reward, trajectory: Trajectory) -> float:
    """A custom reward's value; raises a UserError if it is not a finite number."""
    value = reward(written_by_policy(trajectory))
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"{reward_name(reward)} gave {value!r} for the question {trajectory.question.id!r}; a reward is a finite "
            "number; have it return one"
        )
    return float(value)


def reward_name(reward: Reward | None) -> str:
    """Its name in a run's summary."""
    return "exact match" if reward is None else getattr(reward, "__qualname__", type(reward).__qualname__)


def extract_answer(turn_texts: Sequence[str]) -> str | None:
    """The last complete `<answer>` block within a single model turn, or None.

    Args:
        turn_texts: the decoded model turns of an episode, in order, without environment text. A tag opened in one turn
            is never closed by another.
    """
    for text in reversed(turn_texts):
        answer = last_block(text, "answer")
        if answer is not None:
            return answer
    return None
