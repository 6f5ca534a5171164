"""BM25 search through the toolkit beside bare Pyserini: the same index, queries, `k` and threads.

Bare Pyserini is its `LuceneSearcher`, and what it finds is taken as it comes but for the stored text, which is read and
parsed: without it a search is of no use. Every query is asked once, so that nobody answers from memory; what the
toolkit remembers is timed apart.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from searche1_lite.config import SearchConfig, load_config
from searche1_lite.data.demo_world import write_demo_corpus
from searche1_lite.data.questions import load_questions
from searche1_lite.search.base import parse_contents
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.index import build_index

Batch = Callable[[Sequence[str]], list[list[str]]]
"""Queries -> the texts found for each."""

LARGE = 64
"""Queries of a large batch."""


def measure_search(quick: bool = False, on_part: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Queries a second and seconds a call on the demo's index, in batches of 1 and of `LARGE`.

    Returns:
        `index`, `k`, `threads`, `same_results` (the share of queries for which both find the same), and for `batch_1`
        and `batch_64`: `queries`, for `ours` and `pyserini` `qps`, `p50_ms` and `p99_ms`, and the ratios
        `qps_vs_pyserini`, `p50_vs_pyserini` and `p99_vs_pyserini` (ours / theirs). `remembered_qps`: of queries asked
        before.
    """
    config = load_config("demo").search
    with tempfile.TemporaryDirectory() as folder:
        corpus, index = Path(folder) / "corpus.jsonl", Path(folder) / "index"
        write_demo_corpus(corpus)
        build_index(corpus, index, config.threads, say=lambda line: None)
        on_part("search: importing Pyserini's searcher")
        return compare(_ours(index, config), _bare(index, config), config, quick, on_part)


def compare(
    ours: Batch, bare: Batch, config: SearchConfig, quick: bool, on_part: Callable[[str], None]
) -> dict[str, Any]:
    """Both asked the same in turn, after a warm-up with other queries; `measure_search` says what comes back."""
    texts = [question.question for question in load_questions("demo:train", "train")]
    warm, queries = texts[: 2 * LARGE], texts[2 * LARGE : (6 if quick else 26) * LARGE]
    singles, batched = queries[: len(queries) // 4], queries[len(queries) // 4 :]
    for search in (ours, bare):
        search(warm[:LARGE])
        for query in warm[LARGE:]:
            search([query])
    found: dict[str, Any] = {"index": "demo", "k": config.k, "threads": config.threads}
    alike = []
    for size, asked in ((1, singles), (LARGE, batched)):
        on_part(f"search: batches of {size}")
        batches = [asked[first : first + size] for first in range(0, len(asked) - size + 1, size)]
        seconds: dict[str, list[float]] = {"ours": [], "pyserini": []}
        for turn, batch in enumerate(batches):
            answers = {}
            both = [("ours", ours), ("pyserini", bare)]
            for name, search in both if turn % 2 else reversed(both):  # the second finds the index's pages in memory
                began = time.perf_counter()
                answers[name] = search(batch)
                seconds[name].append(time.perf_counter() - began)
            alike += [one == other for one, other in zip(*answers.values(), strict=True)]
        part: dict[str, Any] = {name: _figures(taken, size) for name, taken in seconds.items()}
        for figure in ("qps", "p50_ms", "p99_ms"):
            ratio = part["ours"][figure] / part["pyserini"][figure]
            part[f"{figure.removesuffix('_ms')}_vs_pyserini"] = round(ratio, 3)
        found[f"batch_{size}"] = {"queries": size * len(batches)} | part
    found["same_results"] = round(sum(alike) / len(alike), 4)
    again = []
    for _ in range(5):
        began = time.perf_counter()
        ours(queries)
        again.append(time.perf_counter() - began)
    found["remembered_qps"] = round(len(queries) / statistics.median(again))
    return found


def _figures(seconds: Sequence[float], size: int) -> dict[str, float]:
    return {
        "qps": round(size * len(seconds) / sum(seconds), 1),
        "p50_ms": round(1000 * statistics.median(seconds), 3),
        "p99_ms": round(1000 * percentile(seconds, 0.99), 3),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that at least this share of them does not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def _ours(index: Path, config: SearchConfig) -> Batch:
    retriever = BM25Retriever(index, config.k1, config.b, config.threads)
    return lambda queries: [[passage.text for passage in found] for found in retriever.search(queries, config.k)]


def _bare(index: Path, config: SearchConfig) -> Batch:
    searcher = _lucene_searcher()(str(index))
    searcher.set_bm25(config.k1, config.b)

    def texts(hits: Sequence[Any]) -> list[str]:
        raws = [json.loads(hit.lucene_document.get("raw")) for hit in hits]
        return [parse_contents("", raw["contents"]).text for raw in raws]

    def search(queries: Sequence[str]) -> list[list[str]]:
        if len(queries) == 1:
            return [texts(searcher.search(queries[0], config.k))]
        keys = [str(position) for position in range(len(queries))]
        found = searcher.batch_search(list(queries), keys, config.k, config.threads)
        return [texts(found.get(key) or []) for key in keys]

    return search


def _lucene_searcher() -> Any:
    """Pyserini's class. Its import takes seconds, and makes an OpenAI client, which wants a key that it never uses."""
    missing = "OPENAI_API_KEY" not in os.environ
    if missing:
        os.environ["OPENAI_API_KEY"] = "none"
    try:
        from pyserini.search.lucene import LuceneSearcher
    finally:
        if missing:
            del os.environ["OPENAI_API_KEY"]
    return LuceneSearcher
