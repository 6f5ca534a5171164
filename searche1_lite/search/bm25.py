"""BM25 through Pyserini's Lucene searcher."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from searche1_lite.data.trajectory import Passage
from searche1_lite.runtime.errors import UserError
from searche1_lite.search.base import MAX_QUERY, clean_query, parse_contents
from searche1_lite.search.index import index_fingerprint
from searche1_lite.search.jvm import start_jvm

REMEMBERED_QUERIES = 20_000
"""Whose passages are kept, the latest ones: a process grows by them, and no further."""
_FEW = 4
"""Queries that are answered one after the other: threads for a batch would take longer to start."""


class TextStore(Protocol):
    """Where the passages are whose text an index does not hold."""

    fingerprint: str
    """Tells whether they are the same."""

    def contents(self, passage_id: str) -> str:
        """The title in the first line, and the text."""
        ...


class BM25Retriever:
    """A `Retriever` over a Lucene index on disk.

    Queries are plain text: Anserini's default query generator analyses them into terms, so operators mean nothing.
    In an index built here, ties are broken by document id, so the order is the same for any number of threads.

    Args:
        index: a Lucene index (`searche1-lite index` builds one).
        k1, b: BM25's parameters.
        threads: how many answer one batch of queries.
        open_store: opens what has the text; called only if the index stores none.

    Raises:
        UserError: if there is no index, it cannot be read, or there is no text for it.
    """

    def __init__(
        self,
        index: Path,
        k1: float = 0.9,
        b: float = 0.4,
        threads: int = 2,
        open_store: Callable[[], TextStore] | None = None,
    ) -> None:
        if not is_lucene_index(index):
            raise UserError(f"no Lucene index at {index}; build one with `searche1-lite index CORPUS --out DIR`")
        start_jvm()
        # Pyserini's own class for this costs seconds to import (it brings every encoder); this is what it wraps.
        from jnius import JavaException
        from pyserini.pyclass import JArrayList, JString, autoclass

        self._array_list, self._string = JArrayList, JString
        try:
            # Java stays in the folder that it was started in.
            self._searcher = autoclass("io.anserini.search.SimpleSearcher")(str(index.absolute()))
        except JavaException as error:
            why = str(error.innermessage or error).splitlines()[0]
            raise UserError(f"the index at {index} cannot be read ({why}); build or fetch it again") from error
        autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MAX_QUERY)
        self._searcher.set_bm25(k1, b)
        self._threads = threads
        if (bare := not self._stores_text()) and open_store is None:
            raise UserError(f"{index} stores no text; set search.corpus to the JSONL file that it was built from")
        self._store = open_store() if bare and open_store else None
        self._remembered: OrderedDict[tuple[str, int], list[Passage]] = OrderedDict()
        self.name = f"bm25(k1={k1:g}, b={b:g})"
        self.fingerprint = index_fingerprint(index) + (f" {self._store.fingerprint}" if self._store else "")

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. Repeated queries are answered once."""
        asked = [clean_query(query) for query in queries]
        wanted = list(dict.fromkeys(query for query in asked if (query, k) not in self._remembered))
        answers = {query: self._remembered[query, k] for query in asked if (query, k) in self._remembered}
        answers |= self._search_distinct(wanted, k)
        for query in wanted:
            self._remembered[query, k] = answers[query]
        while len(self._remembered) > REMEMBERED_QUERIES:
            self._remembered.popitem(last=False)
        return [answers[query] for query in asked]

    def _search_distinct(self, queries: list[str], k: int) -> dict[str, list[Passage]]:
        answers: dict[str, list[Passage]] = {query: [] for query in queries}
        asked = [query for query in queries if query]
        if len(asked) <= _FEW:
            for query in asked:
                hits = self._searcher.search(self._string(query.encode("utf-8")), k)
                answers[query] = [self._passage(hit) for hit in hits]
            return answers
        texts, keys = self._array_list(), self._array_list()
        for position, query in enumerate(asked):
            texts.add(self._string(query.encode("utf-8")))
            keys.add(self._string(str(position).encode()))
        results = self._searcher.batch_search(texts, keys, k, self._threads)
        for position, query in enumerate(asked):
            for hit in results.get(str(position)) or []:
                answers[query].append(self._passage(hit))
        return answers

    def _stores_text(self) -> bool:
        """Judged by the first passage."""
        return not self._searcher.get_total_num_docs() or self._searcher.doc(0).get("raw") is not None

    def _passage(self, hit: Any) -> Passage:
        docid, score = hit.docid, float(hit.score)
        if self._store is not None:
            return parse_contents(docid, self._store.contents(docid), score)
        return _parse_raw(hit.lucene_document.get("raw") or "", docid, score)


def is_lucene_index(folder: Path) -> bool:
    return any(Path(folder).glob("segments_*"))


def _parse_raw(raw: str, docid: str, score: float) -> Passage:
    """A stored document: with `contents` as ours are, with `title` and `text` as in BEIR, or no JSON at all."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return Passage(docid, "", raw.strip(), score)
    if isinstance(record, dict) and isinstance(record.get("contents"), str):
        return parse_contents(docid, record["contents"], score)
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return Passage(docid, str(record.get("title") or ""), record["text"].strip(), score)
    return Passage(docid, "", raw.strip(), score)
