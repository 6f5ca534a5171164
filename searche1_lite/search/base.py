"""The interface of a search engine."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from searche1_lite.data.trajectory import Passage
from searche1_lite.runtime.errors import UserError


def parse_contents(passage_id: str, contents: str, score: float = 0.0) -> Passage:
    """Splits `contents` into title (first line, wiki-18's surrounding quotes dropped) and text."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return Passage(passage_id, title, text.strip(), score)


MAX_QUERY = 4096
"""Characters; the rest is not searched. It also bounds the number of Lucene's clauses."""


def clean_query(query: str) -> str:
    """A query without zero characters and lone surrogates; a long one is cut, between words if possible."""
    text = query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
    if len(text) <= MAX_QUERY:
        return text
    head, cut = text[:MAX_QUERY], not text[MAX_QUERY].isspace()
    return head.rsplit(None, 1)[0] if cut and len(head.split(None, 1)) > 1 else head.strip()


@runtime_checkable
class Retriever(Protocol):
    """A batch of queries in, ranked passages out."""

    name: str
    """Printed beside exact-match figures, e.g. `bm25(k1=0.9, b=0.4)`."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """At most `k` passages for each query, best first; an empty list where nothing matches.

        A retriever that may go on where its engine fails gives a `FailedSearch` for each query that was not answered.

        Args:
            queries: any strings, empty ones and operators included; each is treated as plain text.
            k: passages a query, at least 1.
        """
        ...


def fingerprint_of(retriever: Retriever) -> str | None:
    """Identifies the searched passages; None if the retriever cannot, such as a server."""
    fingerprint = getattr(retriever, "fingerprint", None)
    return fingerprint if isinstance(fingerprint, str) else None


def search_each(retriever: Retriever, queries: Sequence[str], k: int) -> list[list[Passage]]:
    """What the retriever finds, one list for each query.

    Raises:
        UserError: if it gave more lists, or fewer, or something else; it may be the user's own.
    """
    found = retriever.search(queries, k)
    if not isinstance(found, Sequence) or len(found) != len(queries):
        got = f"{len(found)} results" if isinstance(found, Sequence) else f"a {type(found).__name__}"
        raise UserError(
            f"{type(retriever).__name__}.search gave {got} for {len(queries)} queries; let it return one list of "
            "passages for each, in their order",
            exit_code=1,
        )
    return found
