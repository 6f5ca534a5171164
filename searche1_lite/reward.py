"""What an episode earns: exact match and token F1 of the answer in model-written text.

Normalisation is SQuAD's, as Search-R1 and FlashRAG use it: lower-case, drop punctuation, drop a/an/the, squeeze spaces.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from searche1_lite.protocol import last_block

UNTELLING = {"", "yes", "no", "noanswer"}
"""Normalised answers that stand in nearly every passage, or in none, whatever was found."""

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """`text` as answers are compared (SQuAD v1.1's `normalize_answer`)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def plain_words(text: str) -> str:
    """`text` in lower case, split at whatever is neither letter nor digit: `Nolan's` is `nolan s`."""
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


def extract_answer(turn_texts: Sequence[str]) -> str | None:
    """The last complete `<answer>` block within a single model turn, or None.

    Args:
        turn_texts: the decoded model turns of an episode, in order. Environment text must not be among them; turns are
            looked at one by one, so that a tag opened in one turn is never closed by another.
    """
    for text in reversed(turn_texts):
        answer = last_block(text, "answer")
        if answer is not None:
            return answer
    return None
