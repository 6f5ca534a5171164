"""The record that flows end to end: a question, the policy's turns and searches, and the reward.

Plain data. Token ids are the truth: `completion_ids` holds the sampled ids as sampled and the environment's ids as
inserted; `loss_mask` tells them apart. Nothing downstream decodes and re-tokenises.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

TurnKind = Literal["search", "answer", "invalid"]
Stopped = Literal["answer", "end", "turn_budget", "token_budget"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved passage. `score` is the engine's own (BM25: higher is better)."""

    id: str
    title: str
    text: str
    score: float = 0.0


class FailedSearch(list[Passage]):
    """The empty result of a failed search, as opposed to a search without results.

    Args:
        reason: the error, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


@dataclass(slots=True)
class Question:
    """A question and its accepted answers (FlashRAG's columns)."""

    id: str
    question: str
    golden_answers: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free-form; the demo puts `hops` here."""


@dataclass(slots=True)
class Turn:
    """One stretch of model-written tokens: `completion_ids[start:end]`."""

    kind: TurnKind
    start: int
    end: int
    text: str
    """The decoded tokens, for the reward and the report; never trained on."""


@dataclass(slots=True)
class Search:
    """One search and its results."""

    query: str
    passages: list[Passage]
    failed: str | None = None
    """Why the search failed, if it did. Episodes continue after that only with `search.on_failure=empty`."""

    @classmethod
    def of(cls, query: str, found: list[Passage]) -> "Search":
        """The record of a query and a `Retriever`'s result."""
        return cls(query, list(found), found.reason if isinstance(found, FailedSearch) else None)

    def to_dict(self) -> dict[str, Any]:
        """Without `failed` if the search succeeded."""
        record = asdict(self)
        if self.failed is None:
            del record["failed"]
        return record


@dataclass(slots=True)
class Trajectory:
    """One episode.

    `completion_ids` and `loss_mask` have the same length T; `loss_mask[t]` is 1 where the model wrote token t and 0
    where the environment did. `logprobs`, when kept, has length T too, with 0.0 at environment tokens.
    """

    question: Question
    sample: int
    """Which of the question's rollouts this is, from 0."""
    prompt_ids: list[int]
    completion_ids: list[int]
    loss_mask: list[int]
    turns: list[Turn]
    searches: list[Search]
    stopped: Stopped
    """Why the episode ended: it answered; the model ended its message without a complete answer; it used up its turns
    (also those granted after the last search); or a token budget ran out."""
    answer: str | None = None
    """The last complete `<answer>` in model-written tokens, or None."""
    reward: float = 0.0
    """Exact match in {0, 1}."""
    f1: float = 0.0
    logprobs: list[float] | None = None
    given: list[Search] = field(default_factory=list)
    """Searches made for the policy and shown in its prompt (one-shot RAG), which are not among its `searches`."""

    @property
    def correct(self) -> bool:
        return self.reward >= 1.0

    @property
    def n_searches(self) -> int:
        return len(self.searches)

    @property
    def n_failed_searches(self) -> int:
        """Failed searches, including those made for the policy."""
        return sum(search.failed is not None for search in [*self.searches, *self.given])

    @property
    def n_model_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def n_invalid(self) -> int:
        """Turns that are neither a search nor an answer."""
        return sum(turn.kind == "invalid" for turn in self.turns)

    def to_dict(self) -> dict[str, Any]:
        lookups = {key: [search.to_dict() for search in getattr(self, key)] for key in ("searches", "given")}
        return asdict(replace(self, searches=[], given=[])) | lookups

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trajectory":
        return cls(
            **{
                **data,
                "question": Question(**data["question"]),
                "turns": [Turn(**turn) for turn in data["turns"]],
                "searches": [_search(search) for search in data["searches"]],
                "given": [_search(search) for search in data.get("given", ())],
            }
        )


def _search(data: dict[str, Any]) -> Search:
    passages = [Passage(**passage) for passage in data["passages"]]
    return Search(data["query"], passages, data.get("failed"))
