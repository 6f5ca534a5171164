"""Asking a search server, among them some that fail: never silently wrong, and on as configured."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ShelfRetriever, fresh_policy, tiny_protocol_config
from faulty_server import (
    Answer,
    FaultyServer,
    as_json,
    drip_body,
    drip_headers,
    faulty_server,
    flood,
    reply,
    reset,
    say_nothing,
)

from searche1_lite.config import EngineConfig, SearchConfig, load_config
from searche1_lite.data.trajectory import FailedSearch, Passage, Question, Search, Trajectory
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.search import http
from searche1_lite.search.base import Retriever
from searche1_lite.search.catalog import describe_source, open_retriever
from searche1_lite.search.http import HTTPRetriever, pause_before


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(http, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def server(shelf: ShelfRetriever) -> Iterator[FaultyServer]:
    with faulty_server(shelf) as running:
        yield running


def opened(server: FaultyServer, **settings: object) -> HTTPRetriever:
    """Ready to search: what it asked as it was opened is forgotten."""
    retriever = HTTPRetriever(server.url, **{"timeout_seconds": 5.0, "retries": 2, **settings})  # type: ignore[arg-type]
    server.asked.clear()
    return retriever


def ids(found: list[list[Passage]]) -> list[list[str]]:
    return [[passage.id for passage in passages] for passages in found]


# ---- answers


def test_passages_come_as_the_server_ranks_them(server: FaultyServer, shelf: ShelfRetriever) -> None:
    retriever = opened(server)
    assert isinstance(retriever, Retriever)
    queries = ["capital of Peru", "beside Ecuador", "capital of Peru"]
    assert retriever.search(queries, 2) == shelf.search(queries, 2)
    assert server.asked == [{"queries": queries[:2], "topk": 2, "return_scores": True}], "a repeated query is sent once"


def test_an_empty_query_finds_nothing_and_a_hostile_one_is_text(server: FaultyServer) -> None:
    found = opened(server).search(["", " \0 ", "\ud800", '"}]\n', "x" * 10_000], 1)
    assert ids(found[:2]) == [[], []] and ids(found[2:]) == [["1"]] * 3
    (body,) = server.asked
    assert body["queries"][:2] == ["?", '"}]'] and len(body["queries"][2]) == 4096


def test_a_notebook_whose_thread_runs_a_loop_of_its_own_can_open_and_ask(server: FaultyServer) -> None:
    async def cell() -> list[list[Passage]]:
        return opened(server).search(["Mitu"], 2)

    assert ids(asyncio.run(cell())) == ids(opened(server).search(["Mitu"], 2))


def test_many_queries_go_in_bounded_requests_over_few_connections(server: FaultyServer) -> None:
    queries = [f"Peru {number}" for number in range(300)] + [f"{number}" + "é" * 4000 for number in range(100)]
    found = opened(server).search(queries, 1)
    assert len(found) == 400 and all(len(passages) == 1 for passages in found)
    assert sum(len(body["queries"]) for body in server.asked) == 400
    assert max(len(body["queries"]) for body in server.asked) == http.QUERIES_A_REQUEST
    assert max(len(json.dumps(body, ensure_ascii=False).encode()) for body in server.asked) < 2**20


FORMS = {
    "wiki-18": {"id": "7", "contents": '"Lima"\nIn Peru.'},
    "all fields": {"id": "7", "title": "Lima", "text": "In Peru.", "contents": "Lima\nIn Peru."},
    "title and text": {"id": 7, "title": "Lima", "text": "In Peru."},
    "quoted title and text": {"id": 7, "title": '"Lima"', "text": "In Peru.\n"},
}


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "bare"])
@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_of_a_document_is_read(server: FaultyServer, form: str, scored: bool) -> None:
    retriever = opened(server)
    hit = {"document": FORMS[form], "score": 2} if scored else FORMS[form]
    server.faults = [as_json({"result": [[hit]]})]
    assert retriever.search(["Lima"], 3) == [[Passage("7", "Lima", "In Peru.", 2.0 if scored else 0.0)]]


def test_a_document_without_an_id_gets_one_from_its_text(server: FaultyServer) -> None:
    retriever = opened(server)
    hits = [{"title": "Lima", "text": text, "contents": f"Lima\n{text}"} for text in ("one", "two", "one")]
    server.faults = [as_json({"result": [hits]})]
    one, two, again = retriever.search(["Lima"], 3)[0]
    assert one == again != two and one.id != two.id and one.text == "one"


def test_a_server_that_gives_more_than_k_is_cut_to_k(server: FaultyServer) -> None:
    retriever = opened(server)
    server.faults = [as_json({"result": server.hits(["Peru"], 3)})]
    assert len(retriever.search(["Peru"], 2)[0]) == 2


# ---- faults

PASSING: dict[str, Answer] = {
    "500": reply("500 Internal Server Error", b"Traceback"),
    "503": reply("503 Service Unavailable"),
    "429": reply("429 Too Many Requests", b"", "Retry-After: 0"),
    "429, until a date": reply("429 Too Many Requests", b"", "Retry-After: Fri, 01 Jan 2100 00:00:00 GMT"),
    "429, forever": reply("429 Too Many Requests", b"", "Retry-After: " + "9" * 400),
    "429, nonsense": reply("429 Too Many Requests", b"", "Retry-After: soon"),
    "nothing sent": b"",
    "no HTTP": b"220 mail.example ready\r\n",
    "reset": reset,
    "cut in the headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "cut in the body": reply("200 OK", b'{"result": []}').replace(b"Length: 14", b"Length: 1400"),
    "cut in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
}
"""Faults after which another try is made."""

HIT = {"document": {"id": "1", "contents": "Lima\nIn Peru."}, "score": 1.0}
WRONG: dict[str, Answer] = {
    "400": reply("400 Bad Request"),
    "404": reply("404 Not Found"),
    "422": reply("422 Unprocessable Content"),
    "redirect": reply("307 Temporary Redirect", b"", "Location: http://127.0.0.1:1/"),
    "204": reply("204 No Content"),
    "an empty body": reply("200 OK"),
    "no JSON": reply("200 OK", b"<html>hello</html>"),
    "half of the JSON": reply("200 OK", b'{"result": [[{"document": {"id": "1"'),
    "broken UTF-8": reply("200 OK", b'{"result": [["\xff\xfe'),
    "deep JSON": reply("200 OK", b"[" * 200_000),
    "compressed": reply("200 OK", b"\x1f\x8b", "Content-Encoding: gzip"),
    "another protocol": as_json({"results": [[HIT]]}),
    "a bare list": as_json([[HIT]]),
    "no result": as_json({"result": None}),
    "too few": as_json({"result": []}),
    "too many": as_json({"result": [[HIT], [HIT]]}),
    "no lists": as_json({"result": [HIT]}),
    "null hit": as_json({"result": [[None]]}),
    "text hit": as_json({"result": [["Lima"]]}),
    "no text": as_json({"result": [[{"document": {"id": "1"}, "score": 1.0}]]}),
    "text of another type": as_json({"result": [[{"document": {"id": "1", "contents": ["Lima"]}}]]}),
    "title of another type": as_json({"result": [[{"document": {"id": "1", "title": 5, "text": "x"}}]]}),
    "id of another type": as_json({"result": [[{"document": {"id": ["1"], "contents": "x"}}]]}),
    "score of another type": as_json({"result": [[HIT | {"score": "high"}]]}),
    "score that is none": as_json({"result": [[HIT | {"score": float("nan")}]]}),
    "score beyond numbers": reply("200 OK", json.dumps({"result": [[HIT]]}).replace("1.0", "9" * 4000).encode()),
}
"""Answers that no other try would mend."""


@pytest.mark.parametrize("fault", PASSING)
def test_after_a_passing_fault_the_search_is_made_again(
    server: FaultyServer, shelf: ShelfRetriever, fault: str
) -> None:
    retriever = opened(server)
    server.faults = [PASSING[fault]] * 2
    assert retriever.search(["Peru"], 2) == shelf.search(["Peru"], 2)
    assert len(server.asked) == 3 and retriever.failed_searches == 0


@pytest.mark.parametrize("fault", PASSING | WRONG)
@pytest.mark.parametrize("on_failure", ["stop", "empty"])
def test_a_fault_that_stays_is_never_silent(server: FaultyServer, fault: str, on_failure: str) -> None:
    told: list[str] = []
    retriever = opened(server, on_failure=on_failure, say=told.append)
    server.always = (PASSING | WRONG)[fault]
    if on_failure == "stop":
        with pytest.raises(UserError, match=r"^the search at http://[^\n]*--resume$") as raised:
            retriever.search(["Peru"], 2)
        assert raised.value.exit_code == 1
    else:
        (found,) = retriever.search(["Peru"], 2)
        assert isinstance(found, FailedSearch) and found == [] and "\n" not in found.reason
        assert retriever.failed_searches == 1 and len(told) == 1 and found.reason in told[0]
    assert len(server.asked) == (3 if fault in PASSING else 1), "what was answered is not asked again"
    server.always = None
    assert ids(retriever.search(["Peru"], 1)) == [["1"]], "afterwards it can be used as before"


@pytest.mark.parametrize("slow", [say_nothing, drip_headers, drip_body])
def test_a_request_is_timed_as_a_whole(server: FaultyServer, shelf: ShelfRetriever, slow: Answer) -> None:
    retriever = opened(server, timeout_seconds=0.3)
    server.faults = [slow]
    assert retriever.search(["Peru"], 2) == shelf.search(["Peru"], 2)
    server.always = slow
    with pytest.raises(UserError, match=r"no answer within 0\.3 s \(3 tries\)"):
        retriever.search(["Peru"], 2)


def test_an_endless_answer_is_not_read_to_its_end(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_LARGEST_ANSWER", 5_000_000)
    retriever = opened(server)
    server.always = flood
    with pytest.raises(UserError, match="longer than 5,000,000 bytes"):
        retriever.search(["Peru"], 2)


def test_only_the_queries_of_the_request_that_failed_are_marked(server: FaultyServer) -> None:
    told: list[str] = []
    retriever = opened(server, on_failure="empty", say=told.append)
    server.faults = [reply("400 Bad Request")]
    found = retriever.search([f"Peru {number}" for number in range(100)] + ["Peru 0"], 1)
    failed = [isinstance(passages, FailedSearch) for passages in found]
    assert sum(failed) in (65, 36) and all(failed[place] or passages for place, passages in enumerate(found))
    assert retriever.failed_searches == sum(failed)
    retriever.close()
    assert len(told) == 2 and told[1].startswith(f"{sum(failed)} searches failed"), "told as it begins and at the end"


def test_pauses_double_up_to_a_bound_and_heed_retry_after_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [pause_before(number, 0.0, 0.0) for number in range(2, 11)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert 0.25 < pause_before(2, 0.0, 0.999) < 0.5, "they are spread"
    assert pause_before(2, 7.0, 0.5) == 7.0 and pause_before(2, 1e9, 0.5) == 30.0


def test_between_real_tries_the_pauses_double_and_are_what_the_server_asks_for_if_that_is_more(
    server: FaultyServer, shelf: ShelfRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    retriever, pauses, wait = opened(server, retries=12), [], asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await wait(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    server.faults = [PASSING[name] for name in ("500", "nothing sent", "reset", "503", "cut in the body")] * 2
    assert retriever.search(["Peru"], 2) == shelf.search(["Peru"], 2)
    usual = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert all(most / 2 < pause <= most for pause, most in zip(pauses, usual, strict=True)), pauses
    assert len({pause / most for pause, most in zip(pauses, usual, strict=True)}) == len(usual), "each is spread anew"

    pauses.clear()
    asked = ["7", "0", "9" * 400, "Fri, 01 Jan 2100 00:00:00 GMT", "soon"]
    server.faults = [reply("503 Service Unavailable", b"", f"Retry-After: {value}") for value in asked]
    assert retriever.search(["Peru"], 2) == shelf.search(["Peru"], 2)
    assert pauses[0] == 7.0 and 0.5 < pauses[1] <= 1.0 and pauses[2:4] == [30.0, 30.0] and 4.0 < pauses[4] <= 8.0


def test_a_server_that_was_started_again_is_found_again(shelf: ShelfRetriever) -> None:
    with faulty_server(shelf) as first:
        retriever, port = opened(first, retries=20), first.server_address[1]
        assert ids(retriever.search(["Peru"], 1)) == [["1"]]
    found: list[list[Passage]] = []
    asking = threading.Thread(target=lambda: found.extend(retriever.search(["Quito"], 1)))
    http._LONGEST_PAUSE = 1.0
    asking.start()
    with faulty_server(shelf, port):
        asking.join(timeout=60)
    assert ids(found) == [["2"]]


def test_the_token_comes_from_the_environment_and_is_in_no_record(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http.TOKEN_VARIABLE, "s3cret")
    retriever = opened(server)
    assert server.headers[0]["authorization"] == "Bearer s3cret" and "s3cret" not in retriever.name
    monkeypatch.delenv(http.TOKEN_VARIABLE)
    server.always = reply("401 Unauthorized")
    with pytest.raises(UserError, match=http.TOKEN_VARIABLE):
        HTTPRetriever(server.url)


def test_the_generator_that_runs_are_seeded_by_is_left_alone(server: FaultyServer) -> None:
    import random

    retriever = opened(server)
    server.faults = [PASSING["500"]] * 2
    before = random.getstate()
    retriever.search(["Peru"], 1)
    assert random.getstate() == before


# ---- opening


def test_a_server_that_is_not_there_is_told_of_at_once(shelf: ShelfRetriever) -> None:
    with faulty_server(shelf) as server:
        url = server.url
    with pytest.raises(UserError, match=r"^cannot search at http://[^\n]*no connection[^\n]*serve-search`$"):
        HTTPRetriever(url, retries=20, on_failure="empty")


@pytest.mark.parametrize("fault", ["404", "another protocol", "no JSON", "too few"])
def test_a_server_of_another_protocol_is_refused_as_it_is_opened(server: FaultyServer, fault: str) -> None:
    server.always = WRONG[fault]
    with pytest.raises(UserError, match=r"^cannot search at http://[^\n]*Search-R1's protocol$"):
        HTTPRetriever(server.url, on_failure="empty")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://localhost/",
        "http://",
        "http://a b/",
        "http://[::1",
        "http://x:99999/",
        "http://u:p@x/",
        "",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="search.url"):
        HTTPRetriever(url)


def test_a_url_without_a_path_is_given_the_usual_one(server: FaultyServer) -> None:
    retriever = HTTPRetriever(server.url.removesuffix("/retrieve"))
    assert ids(retriever.search(["Peru"], 1)) == [["1"]]
    assert retriever.name == f"http({server.url.removeprefix('http://')})"


def test_a_server_in_the_settings_is_opened_and_takes_the_place_of_the_demo_wiki(server: FaultyServer) -> None:
    config = load_config("demo", overrides=[f"search.url={server.url}", "search.retries=0"])
    assert ids(open_retriever(config.search).search(["Peru"], 1)) == [["1"]]
    assert describe_source(config.search)[0] == "ok"


@pytest.mark.parametrize("key", ["index", "corpus"])
def test_a_server_and_an_index_together_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"search\.url=http://x/ and search\.{key}=here"):
        load_config("demo", overrides=["search.url=http://x/", f"search.{key}=here"])


def test_connections_are_given_back(server: FaultyServer) -> None:
    import psutil

    process = psutil.Process()
    opened(server).close()
    before = process.num_fds(), process.num_threads()
    for _ in range(5):
        retriever = opened(server)
        retriever.search(["Peru"], 1)
        del retriever
    assert process.num_fds() <= before[0] + 2, "the server's own may still be closing"
    assert process.num_threads() <= before[1] + 2


def test_a_program_that_ends_does_not_wait_for_a_search(server: FaultyServer) -> None:
    program = (
        "import sys, threading\n"
        "from searche1_lite.search.http import HTTPRetriever\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "retriever = HTTPRetriever(sys.argv[1], timeout_seconds=1000)\n"
        "ThreadPoolExecutor(1).submit(retriever.search, ['Peru'], 1)\n"
        "sys.stdin.readline()\n"
    )
    server.faults = [as_json({"result": [[]]}), say_nothing]
    process = subprocess.Popen([sys.executable, "-c", program, server.url], stdin=subprocess.PIPE)
    while len(server.asked) < 2:
        assert process.poll() is None
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


# ---- episodes


def play(folder: Path, retriever: Retriever, n: int = 4) -> list[Trajectory]:
    """Sampled episodes of the policy that searches for Lima and answers Peru or Oslo."""
    model, tokenizer = fresh_policy(folder)
    settings = tiny_protocol_config(no_result_message="Nothing.", search_failed_message="Broken.")
    questions = [Question(name, f"What about {name}?", ["Peru"]) for name in ("rivers", "a sea", "hills")]
    return rollout(
        Agent(model, tokenizer, retriever, Protocol(tokenizer, settings), engine=EngineConfig(batch_size=16), k=2),
        questions,
        n,
        Sampling(("test",)),
    )


def test_episodes_over_a_server_are_those_over_its_engine(
    talking_policy_folder: Path, server: FaultyServer, shelf: ShelfRetriever
) -> None:
    retriever = opened(server, retries=8)
    server.faults = [PASSING["500"], PASSING["cut in the body"], PASSING["reset"], PASSING["429"]]
    assert play(talking_policy_folder, retriever) == play(talking_policy_folder, shelf)


def test_with_empty_the_episodes_go_on_with_marked_results(talking_policy_folder: Path, server: FaultyServer) -> None:
    retriever = opened(server, on_failure="empty", say=lambda line: None)
    server.faults = [WRONG["no JSON"]]
    played = play(talking_policy_folder, retriever)
    searches = [search for trajectory in played for search in trajectory.searches]
    failed = [search for search in searches if search.failed]
    assert 0 < len(failed) < len(searches) and all(search.passages == [] for search in failed)
    tokenizer = fresh_policy(talking_policy_folder)[1]
    for trajectory in played:
        text = tokenizer.decode(trajectory.completion_ids)
        assert ("Broken." in text) == any(search.failed for search in trajectory.searches)
        assert "Nothing." not in text
    assert evaluate(played, 0)["failed_searches"] == len(failed) == retriever.failed_searches
    assert [Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) for t in played] == played


def test_with_stop_the_run_ends_with_one_line(talking_policy_folder: Path, server: FaultyServer) -> None:
    retriever = opened(server)
    server.faults = [as_json({"result": server.hits(["Lima"], 2)})]
    server.always = PASSING["500"]
    with pytest.raises(UserError, match=r"HTTP 500 \(3 tries\)[^\n]*--resume$"):
        play(talking_policy_folder, retriever)


@pytest.mark.slow
def test_an_evaluation_that_a_server_stopped_goes_on_or_counts_what_failed(tmp_path: Path) -> None:
    config = load_config("demo")
    command = [
        sys.executable,
        "-c",
        "from searche1_lite.cli.main import main; main()",
        "eval",
        "--preset",
        "demo",
        "--json",
    ]

    def evaluate_over(server: FaultyServer, out: str, *more: str) -> "subprocess.CompletedProcess[str]":
        asked = ["--data", "demo:dev", "--limit", "16", "--out", str(tmp_path / out), "engine.batch_size=1"]
        settings = [f"search.url={server.url}", "search.retries=0"]
        return subprocess.run([*command, *asked, *settings, *more], capture_output=True, text=True)

    def figures(ran: "subprocess.CompletedProcess[str]") -> dict[str, object]:
        found = json.loads(ran.stdout)
        for part in (found, *found.get("by_data_set", {}).values()):
            part.pop("seconds_per_question")
        return found

    with faulty_server(open_retriever(config.search)) as server:
        unbroken = figures(evaluate_over(server, "unbroken"))
        asked, server.always = len(server.asked), reply("500 Internal Server Error")
        assert unbroken["failed_searches"] == 0 and unbroken["searches_per_question"] > 1  # type: ignore[operator]

        server.asked, server.good = [], asked // 2
        stopped = evaluate_over(server, "stopped")
        assert stopped.returncode == 1 and stopped.stdout == "" and stopped.stderr.count("\n") == 1
        assert stopped.stderr.startswith("error: the search at http://") and "--resume" in stopped.stderr
        server.asked, server.good = [], 10_000
        assert figures(evaluate_over(server, "stopped", "--resume")) == unbroken
        assert 0 < len(server.asked) < asked, "what was answered is not asked again"

        server.asked, server.good = [], asked // 2
        counted = evaluate_over(server, "counted", "search.on_failure=empty")
        assert counted.returncode == 0
        failed = figures(counted)["failed_searches"]
        assert failed >= asked - asked // 2 - 2  # type: ignore[operator]
        told = [line for line in counted.stderr.splitlines() if "search" in line and "failed" in line]
        assert len(told) == 2 and told[0].startswith("a search failed: HTTP 500") and f"{failed} searches" in told[1]


def test_records_of_before_there_were_failed_searches_are_read() -> None:
    record = Trajectory(Question("q", "Who?", ["x"]), 0, [1], [2], [1], [], [Search("Lima", [])], "end").to_dict()
    assert record["searches"] == [{"query": "Lima", "passages": []}], "the same as before where none failed"
    assert Trajectory.from_dict(record).n_failed_searches == 0


def test_the_settings_say_how_a_server_is_asked() -> None:
    assert SearchConfig(url="http://x/").on_failure == "stop"
    for wrong in ("search.on_failure=skip", "search.retries=-1", "search.timeout_seconds=0"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            load_config("demo", overrides=[wrong])
