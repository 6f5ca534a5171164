"""Where an answer stands: the passages found whose text holds it, each with the sentence it stands in."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from searche1_lite.data.trajectory import Search
from searche1_lite.rollout.reward import UNINFORMATIVE, normalize_answer, plain_words

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[^\sa-z])|\n\s*|[。！？]\s*")
_NO_END = re.compile(r"(?:^|[\s(])(?:\w|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|Gen|Col|Sgt|No|vs|Mt|Ft)\.\s+$")
"""What looks like a sentence's end and is an initial, a title or the like."""


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that holds the answer. `number` counts an answer's sources from 1."""

    number: int
    id: str
    title: str
    sentence: str


def find_sources(answer: str | None, searches: Iterable[Search]) -> list[Source]:
    """The passages in whose text the answer stands, in the order in which they were first found, each once.

    The whole text counts, also what `max_document_tokens` may have kept from the policy. None of them where the answer
    is yes, no or nothing once normalised: those words tell nothing wherever they stand.
    """
    if answer is None or normalize_answer(answer) in UNINFORMATIVE:
        return []
    passages = {passage.id: passage for search in searches for passage in search.passages}
    sources: list[Source] = []
    for passage in passages.values():
        if (place := stands_at(answer, passage.text)) is not None:
            sentence = sentence_around(passage.text, *place)
            sources.append(Source(len(sources) + 1, passage.id, passage.title, sentence))
    return sources


def stands_at(answer: str, text: str) -> tuple[int, int] | None:
    """Where `answer` first stands in `text`, word for word, by either of the rules of `evaluate.holds_gold`.

    Returns:
        The place in `text` as it is, from the first character of the first word to the last of the last; or None.
    """
    # Normalising drops punctuation without dividing, so it can be done by what white space divides.
    for split, word in ((normalize_answer, r"\S+"), (plain_words, r"\w+")):
        wanted = split(answer).split()
        words = [(match.span(), part) for match in re.finditer(word, text) for part in split(match.group()).split()]
        tokens = [part for _, part in words]
        for start in range(len(tokens) - len(wanted) + 1 if wanted else 0):
            if tokens[start : start + len(wanted)] == wanted:
                return words[start][0][0], words[start + len(wanted) - 1][0][1]
    return None


def sentence_around(text: str, start: int, end: int) -> str:
    """The sentence or sentences of `text` that `text[start:end]` stands in, whole."""
    ends = [m.end() for m in _SENTENCE_END.finditer(text) if not _NO_END.search(text, max(0, m.start() - 8), m.end())]
    first = max((place for place in ends if place <= start), default=0)
    last = min((place for place in ends if place >= end), default=len(text))
    return text[first:last].strip()


def picked_out(answer: str, sentence: str, most: int = 300) -> tuple[str, str, str]:
    """The sentence in three: before the answer, the answer as it stands there, after it.

    Of a sentence of more than `most` characters, what is around the answer. White space and line breaks stay.
    """
    start, end = stands_at(answer, sentence) or (0, 0)
    if sentence[:end].endswith((".", ",", ";", ":", "!", "?")) and sentence[end - 1] != answer.strip()[-1]:
        end -= 1  # the sentence's own
    room = max(0, most - (end - start)) // 2
    before, after = sentence[max(0, start - room) : start], sentence[end : end + room]
    return (
        ("… " if start > room else "") + before,
        sentence[start:end],
        after + (" …" if end + room < len(sentence) else ""),
    )
