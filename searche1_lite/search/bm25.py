"""BM25 through Pyserini's Lucene searcher."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from searche1_lite.errors import UserError
from searche1_lite.search.base import Passage
from searche1_lite.search.index import parse_contents
from searche1_lite.search.jvm import start_jvm

_REMEMBERED_QUERIES = 20_000


class BM25Retriever:
    """A `Retriever` over a Lucene index on disk.

    Queries are plain text: Anserini's default query generator analyses them into terms, so operators mean nothing.
    Ties are broken by document id, so the order is the same for any number of threads.

    Args:
        index: a Lucene index whose raw documents are stored (`searche1-lite index` builds one).
        k1, b: BM25's parameters.
        threads: how many answer one batch of queries.
    """

    def __init__(self, index: Path, k1: float = 0.9, b: float = 0.4, threads: int = 2) -> None:
        if not any(Path(index).glob("segments_*")):
            raise UserError(f"no Lucene index at {index}; build one with `searche1-lite index CORPUS.jsonl --out DIR`")
        start_jvm()
        # Pyserini's own class for this costs seconds to import (it brings every encoder); this is what it wraps.
        from pyserini.pyclass import JArrayList, JString, autoclass

        self._array_list, self._string = JArrayList, JString
        self._searcher = autoclass("io.anserini.search.SimpleSearcher")(str(index))
        self._searcher.set_bm25(k1, b)
        self._threads = threads
        self._remembered: OrderedDict[tuple[str, int], list[Passage]] = OrderedDict()
        self.name = f"bm25(k1={k1:g}, b={b:g})"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. Repeated queries are answered once."""
        wanted = list(dict.fromkeys(query for query in queries if (query, k) not in self._remembered))
        answers = {query: self._remembered[query, k] for query in queries if (query, k) in self._remembered}
        answers |= self._search_distinct(wanted, k)
        for query in wanted:
            self._remembered[query, k] = answers[query]
        while len(self._remembered) > _REMEMBERED_QUERIES:
            self._remembered.popitem(last=False)
        return [answers[query] for query in queries]

    def _search_distinct(self, queries: list[str], k: int) -> dict[str, list[Passage]]:
        answers: dict[str, list[Passage]] = {query: [] for query in queries}
        texts, keys = self._array_list(), self._array_list()
        asked = []
        for query in queries:
            clean = query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
            if clean:
                texts.add(self._string(clean.encode("utf-8")))
                keys.add(self._string(str(len(asked)).encode()))
                asked.append(query)
        if not asked:
            return answers
        results = self._searcher.batch_search(texts, keys, k, self._threads)
        for position, query in enumerate(asked):
            for hit in results.get(str(position)) or []:
                answers[query].append(_passage(hit.lucene_document.get("raw"), hit.docid, float(hit.score)))
        return answers


def _passage(raw: str | None, docid: str, score: float) -> Passage:
    if raw is None:
        raise UserError("the index stores no documents; rebuild it with `searche1-lite index`", exit_code=1)
    return parse_contents(docid, json.loads(raw)["contents"], score)
