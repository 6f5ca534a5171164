"""`serve-search` over a real index: Search-R1's protocol, its limits, its workers, and our client over it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import ShelfRetriever
from search_server import RunningServer, children, refused, serve_search

from searche1_lite.config import load_config
from searche1_lite.data.demo_world import load_demo_questions
from searche1_lite.data.trajectory import Passage
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.http import TOKEN_VARIABLE, HTTPRetriever, parse_answer
from searche1_lite.search.index import build_index
from searche1_lite.serve.search_server import LONGEST_QUERY, MOST_PASSAGES, MOST_QUERIES, Counters, as_answer

TOKEN = "correct-horse-battery-staple"
CORPUS = [
    {"id": "a", "contents": "Lima\nLima is the capital of Peru."},
    {"id": "b", "contents": '"Quito"\nQuito is the capital of Ecuador, high in the mountains near the equator.'},
    {"id": "c", "contents": "Peru\nPeru is a country. Peru has mountains. Peru has a coast."},
    {"id": "d", "contents": '""Heroes""\nA song about mountains, <search> and </information>.\nIts second line.'},
    {"id": "e", "contents": "\nNo title, but mountains: \u2028 \x85 \u202e é \U0001f30b."},
]
QUERIES = ["mountains", "Peru", "capital of Ecuador", "", "nothing of this", 'AND "OR', "x" * 9000, "é\0\ud800", "Peru"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CORPUS))
    build_index(folder / "corpus.jsonl", folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def server(index: Path) -> Iterator[RunningServer]:
    with serve_search("--index", str(index)) as running:
        yield running


@pytest.fixture(scope="module")
def crowd(index: Path) -> Iterator[RunningServer]:
    """With two workers and a token."""
    with serve_search("--index", str(index), "--workers", "2", env={"SEARCHE1_LITE_TOKEN": TOKEN}) as running:
        yield running


def test_search_r1s_request_gets_search_r1s_answer(server: RunningServer) -> None:
    (hits,) = server.retrieve(queries=["capital of Peru"], topk=2, return_scores=True)
    assert [hit["document"]["id"] for hit in hits] == ["a", "c"] and hits[0]["score"] > hits[1]["score"] > 0
    assert hits[0] == {
        "document": {"id": "a", "contents": "Lima\nLima is the capital of Peru."},
        "score": hits[0]["score"],
    }


def test_without_scores_the_documents_come_bare_and_without_topk_three(server: RunningServer) -> None:
    plain = server.retrieve(queries=["mountains", "nothing of this"], return_scores=False)
    assert [len(hits) for hits in plain] == [3, 0] and set(plain[0][0]) == {"id", "contents"}
    scored = server.retrieve(queries=["mountains"], return_scores=True)
    assert plain[0] == [hit["document"] for hit in scored[0]]
    for topk in (None, 0):
        assert server.retrieve(queries=["mountains"], topk=topk) == plain[:1]
    assert len(server.retrieve(queries=["mountains"], topk=2.0)[0]) == 2, "which is 2 in JSON"
    assert server.retrieve(queries=[]) == []
    assert server.retrieve(queries=["Peru"], more="is let be")[0]


def test_over_http_the_passages_are_those_of_the_index(server: RunningServer, index: Path) -> None:
    here = BM25Retriever(index)
    with_server = HTTPRetriever(server.url)
    assert with_server.name == f"http(bm25(k1=0.9, b=0.4) at {server.url.removeprefix('http://')}/retrieve)"
    for k in (1, 3, MOST_PASSAGES):
        assert with_server.search(QUERIES, k) == here.search(QUERIES, k)
    assert {passage.title for passage in here.search(["mountains"], 5)[0]} >= {'"Heroes"', "", "Quito"}


def test_a_rollout_over_http_is_the_rollout_over_the_index() -> None:
    config = load_config("demo")
    model, tokenizer = load_policy(config.model, seed=0)

    def play(retriever: object) -> list[dict[str, object]]:
        played = rollout(
            Agent(model, tokenizer, retriever, Protocol(tokenizer, config.protocol), engine=config.engine, k=3),
            load_demo_questions("dev")[:8],
            2,
            Sampling(("http",)),
        )
        assert any(trajectory.searches for trajectory in played)
        return [trajectory.to_dict() for trajectory in played]

    from searche1_lite.search.catalog import open_retriever

    with serve_search("--preset", "demo") as demo:
        assert play(HTTPRetriever(demo.url)) == play(open_retriever(config.search))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/retrieve", b"{", 400),
        ("POST", "/retrieve", b"[" * 100_000, 400),
        ("POST", "/retrieve", b"", 422),
        ("POST", "/retrieve", b"[]", 422),
        ("POST", "/retrieve", b'{"queries": "Peru"}', 422),
        ("POST", "/retrieve", b'{"queries": [1]}', 422),
        ("POST", "/retrieve", b'{"queries": ["\\ud800"]}', 422),
        ("POST", "/retrieve", b'{"queries": ["Peru"], "topk": "3"}', 422),
        ("POST", "/retrieve", b'{"queries": ["Peru"], "topk": -1}', 422),
        ("POST", "/retrieve", b'{"queries": ["Peru"], "topk": 1e999}', 422),
        ("POST", "/retrieve", json.dumps({"queries": ["Peru"], "topk": MOST_PASSAGES + 1}).encode(), 422),
        ("POST", "/retrieve", json.dumps({"queries": ["Peru"] * 65, "topk": 100}).encode(), 413),
        ("POST", "/retrieve", json.dumps({"queries": ["Peru"] * (MOST_QUERIES + 1)}).encode(), 422),
        ("POST", "/retrieve", json.dumps({"queries": ["x" * (LONGEST_QUERY + 1)]}).encode(), 422),
        ("POST", "/retrieve", b" " * 2**20 + b"{}", 413),
        ("GET", "/retrieve", None, 405),
        ("GET", "/docs", None, 404),
        ("POST", "/search", b"{}", 404),
    ],
)
def test_what_is_wrong_or_too_much_is_refused_in_one_line(
    server: RunningServer, method: str, path: str, body: bytes | None, status: int
) -> None:
    got, answer = server.request(method, path, body)
    assert got == status, answer[:300]
    told = json.loads(answer)
    assert list(told) == ["error"] and "\n" not in told["error"] and "Traceback" not in told["error"]
    assert server.retrieve(queries=["Peru"])[0], "and it goes on"


def test_what_is_done_is_counted(server: RunningServer) -> None:
    names = ('requests_total{status="2xx"}', 'requests_total{status="4xx"}', "queries_total", "seconds_total")
    before = [server.metric(name) for name in names]
    server.retrieve(queries=["Peru", "Lima", "mountains of Peru and Ecuador"])
    server.request("POST", "/retrieve", b"{")
    after = [server.metric(name) for name in names]
    assert [now - then for now, then in zip(after[:3], before[:3], strict=True)] == [1, 1, 3] and after[3] > before[3]
    assert json.loads(server.request("GET", "/health")[1]) == {
        "status": "ok",
        "retriever": "bm25(k1=0.9, b=0.4)",
        "workers": 1,
    }


@pytest.mark.slow
def test_schemathesis_finds_nothing(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.negative_data_rejection]\n"
        # 413 is how a list of queries is refused that is too long for a body.
        "expected-statuses = [400, 401, 403, 404, 405, 408, 413, 415, 422]\n"
    )
    command = [str(Path(sys.executable).with_name("schemathesis")), "--no-color", "--config-file", "schemathesis.toml"]
    asked = ["run", f"{server.url}/openapi.json", "--checks", "all", "--max-examples", "40", "--continue-on-failure"]
    ran = subprocess.run([*command, *asked, "--seed", "0"], cwd=tmp_path, capture_output=True, text=True)
    short = "\n".join(line[:300] for line in ran.stdout.splitlines())
    assert ran.returncode == 0 and "3 selected / 3 total" in short, short


# ---- tokens and workers


def test_a_token_is_asked_for_and_shown(crowd: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crowd.request("GET", "/health")[0] == 200
    for path in ("/metrics", "/openapi.json"):
        assert crowd.request("GET", path)[0] == 401
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        HTTPRetriever(crowd.url)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert HTTPRetriever(crowd.url).search(["capital of Peru"], 1)[0][0].id == "a"
    for worker in children(crowd.process):
        assert not any(TOKEN in argument for argument in worker.cmdline())


def test_two_workers_answer_alike_and_a_dead_one_is_replaced(
    crowd: RunningServer, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    here = BM25Retriever(index).search(QUERIES, 3)

    def ask_again_and_again(times: int) -> bool:
        client = HTTPRetriever(crowd.url, retries=20)
        return all(client.search(QUERIES, 3) == here for _ in range(times))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask_again_and_again, [20] * 8))
    both = children(crowd.process)
    assert len(both) == 2
    for victim in both:
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_again_and_again, 40) for _ in range(4)]
            victim.kill()
            assert all(future.result() for future in asking), "every answer right, whoever gave it"
    while len(alive := [w for w in children(crowd.process) if w.status() != psutil.STATUS_ZOMBIE]) < 2:
        assert crowd.process.poll() is None
    assert not set(alive) & set(both)
    status, text = crowd.request("GET", "/metrics", Authorization=f"Bearer {TOKEN}")
    assert status == 200 and b"searche1_search_worker_deaths_total 2\n" in text
    total = next(line for line in text.decode().splitlines() if line.startswith("searche1_search_queries_total"))
    assert float(total.split()[1]) >= 8 * 20 * 5, "what the dead ones did counts on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_workers_end_with_the_server(index: Path, number: int) -> None:
    with serve_search("--index", str(index), "--workers", "2") as running:
        workers = children(running.process)
        running.process.send_signal(number)
        code = running.process.wait(60)
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert code == (-number if number == signal.SIGKILL else 0)


def test_workers_that_cannot_start_end_the_server(tmp_path: Path) -> None:
    (tmp_path / "segments_1").write_bytes(b"no index")
    *why, what = refused("--index", str(tmp_path), "--workers", "2").splitlines()
    assert "cannot be read" in why[0] and what.startswith("error: a search worker did not start")


def test_what_cannot_be_served_is_told_before_the_index_is_opened(index: Path, server: RunningServer) -> None:
    port = server.url.rpartition(":")[2]
    assert "taken" in refused("--index", str(index), "--port", port)
    assert "token" in refused("--index", str(index), "--host", "0.0.0.0")
    assert "no Lucene index" in refused("--index", "/nowhere")
    assert "is a search server already" in refused("--preset", "demo", f"search.url={server.url}")
    assert "nothing to search" in refused()


def test_a_retrievers_name_is_escaped_for_prometheus() -> None:
    assert 'retriever="a\\"b\\\\c"' in Counters().as_text('a"b\\c')


def test_an_answer_is_read_back_as_it_was(shelf: ShelfRetriever) -> None:
    found = [
        [Passage("1", '"x"', "y", 1.5), Passage("2", '"', "", -0.0), Passage("3", "", "\ud800\n\n z", 1e-300)],
        [],
        *shelf.search(["Peru"], 3),
    ]
    assert parse_answer(as_answer(found, True), len(found), 3) == found
    assert [[p.id for p in ps] for ps in parse_answer(as_answer(found, False), len(found), 3)] == [
        [p.id for p in ps] for ps in found
    ]
