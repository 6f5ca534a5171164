"""How questions may be answered in an evaluation: by the search agent, or by one of two baselines without its searches.

Light to import: the command line checks a method before anything heavy is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast, get_args

from searche1_lite.config import Config
from searche1_lite.data.trajectory import Passage, Question, Search
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.errors import UserError
from searche1_lite.search.base import Retriever, search_each

if TYPE_CHECKING:
    from collections.abc import Callable

Method = Literal["agent", "rag", "no-search"]
"""`agent`: the policy searches when it wants to. `rag`: one search with the question itself is made for it, and the
prompt shows the passages. `no-search`: the question alone."""


def parse_method(text: str) -> Method:
    """`text` as a method; refused with those there are."""
    if text not in get_args(Method):
        raise UserError(f"--method {text} is unknown; there are: {', '.join(get_args(Method))}")
    return cast(Method, text)


def method_settings(settings: Config, method: Method) -> Config:
    """The settings that `method` is played with.

    The baselines are an agent whose searches are all used up: one that asks for a search, or says neither a search nor
    an answer, is told once that none are left and that it should answer now, in the words an agent hears after its last
    search. A policy that was trained to search so gets its chance to answer from what it has, and nothing more: a
    second try ends the episode without an answer.
    """
    if method == "agent":
        return settings
    limits = replace(settings.protocol, max_searches=0, correction_message=settings.protocol.no_more_searches_message)
    return replace(settings, protocol=limits)


@dataclass(frozen=True)
class Asked:
    """Prompts of some questions: token ids, and what was looked up for each; `prompts` None: the plain ones."""

    prompts: list[list[int]] | None
    given: list[list[Search]]


def ask_by(method: Method, questions: Sequence[Question], protocol: Protocol, retriever: Retriever, k: int) -> Asked:
    """The questions as `method` puts them to the policy; `rag` searches for all of them in one batch."""
    nothing: list[list[Search]] = [[] for _ in questions]
    if method == "agent":
        return Asked(None, nothing)
    if method == "no-search":
        return Asked([protocol.direct_prompt_ids(question.question) for question in questions], nothing)
    queries = [question.question.strip() for question in questions]
    found = search_each(retriever, queries, k)
    prompts = [protocol.rag_prompt_ids(query, passages) for query, passages in zip(queries, found, strict=True)]
    return Asked(prompts, [[Search.of(query, passages)] for query, passages in zip(queries, found, strict=True)])


def check_questions(method: Method, questions: Sequence[Question], protocol: Protocol) -> None:
    """Refuses, before the first is answered, a question whose prompt would be too long."""
    prompt_ids: dict[Method, Callable[[str], list[int]]] = {
        "agent": protocol.prompt_ids,
        "rag": partial(protocol.rag_prompt_ids, passages=[]),
        "no-search": protocol.direct_prompt_ids,
    }
    protocol.check_prompts(questions, prompt_ids[method])


def retriever_for(method: Method) -> Retriever | None:
    """None where the settings name the retriever; a method that never searches needs no index to be there."""
    return NoRetriever() if method == "no-search" else None


class NoRetriever:
    """A `Retriever` that finds nothing."""

    name = "none"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [[] for _ in queries]
