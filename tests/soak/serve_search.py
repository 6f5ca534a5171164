"""Soaks `serve-search` with a client that costs little: requests are bytes made beforehand, answers are compared whole.

    python tests/soak/serve_search.py clients     64 clients at once for 60 s: every answer right, memory flat
    python tests/soak/serve_search.py scaling     queries a second with one worker, on one core and on all, and with two
    python tests/soak/serve_search.py queries     50,000 different queries through the client that rollouts use

Each prints one JSON object, and fails where an answer is wrong or missing; `clients` also where memory is not flat
(`flat.py`), or a file or a thread is left behind. The corpus is made up: 100,000 passages of
words as frequent as in a language. Give the machine to it alone: client and servers share its cores.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

import psutil
from flat import last_minute

sys.path.insert(0, str(Path(__file__).parents[1]))
from search_server import RunningServer, serve_search

from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.http import HTTPRetriever
from searche1_lite.search.index import build_index
from searche1_lite.serve.search_server import as_answer

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprt" for b in ("a", "e", "io", "ou", "u") for c in ("ster", "lin", "mar", "do")]
WORDS = [one + other for one in WORDS for other in WORDS][:20_000]
WEIGHTS = list(accumulate(1 / rank for rank in range(3, 3 + len(WORDS))))


def write_corpus(path: Path, passages: int) -> None:
    chance = random.Random(0)
    with path.open("w") as file:
        for number in range(passages):
            title, *text = chance.choices(WORDS, cum_weights=WEIGHTS, k=chance.randint(50, 110))
            file.write(json.dumps({"id": str(number), "contents": f'"{title}"\n{" ".join(text)}'}) + "\n")


def make_queries(count: int, seed: int) -> list[str]:
    """All different."""
    chance, made = random.Random(seed), dict[str, None]()
    while len(made) < count:
        made[" ".join(chance.choices(WORDS, cum_weights=WEIGHTS, k=chance.randint(3, 7)))] = None
    return list(made)


def as_request(queries: Sequence[str], k: int = 3) -> bytes:
    body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
    head = (
        f"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


async def exchange(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> tuple[bytes, bytes]:
    """The first line and the body of the answer."""
    reader, writer = streams
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head.partition(b"\r\n")[0], await reader.readexactly(length)


async def load(
    port: int, connections: int, asked: Iterator[tuple[bytes, bytes | None]], seconds: float, every: float, look: Any
) -> dict[str, Any]:
    """Each connection asks the next request when it has its answer, until the time is up or there are no more.

    Args:
        asked: requests, and their answers where they are known.
        look: called every `every` seconds.
    """
    count = wrong = 0
    taken: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        nonlocal count, wrong
        streams = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        for request, answer in asked:
            start = time.perf_counter()
            status, body = await exchange(streams, request)
            taken.append(time.perf_counter() - start)
            count += 1
            wrong += not status.endswith(b"200 OK") or (answer is not None and body != answer)
            if time.perf_counter() - began > seconds:
                break
        streams[1].close()

    async def watch() -> None:
        while True:
            look()
            await asyncio.sleep(every)

    watching = asyncio.ensure_future(watch())
    cpu = time.process_time()
    await asyncio.gather(*(client() for _ in range(connections)))
    spent = time.perf_counter() - began
    watching.cancel()
    return {
        "requests": count,
        "wrong": wrong,
        "seconds": round(spent, 1),
        "requests_per_second": round(count / spent, 1),
        "p50_ms": round(1000 * statistics.median(taken), 1),
        "p99_ms": round(1000 * sorted(taken)[int(0.99 * len(taken))], 1),
        "client_cpu_share": round((time.process_time() - cpu) / spent, 2),
    }


def processes(server: RunningServer) -> list[psutil.Process]:
    """Those that search."""
    parent = psutil.Process(server.process.pid)
    return parent.children() or [parent]


def soak_clients(index: Path, seconds: float, workers: int) -> dict[str, Any]:
    """Every query is new to the server, which remembers 20,000: before memory is looked at, it has heard more."""
    made = make_queries(25_000 * workers + 40_000, 1)
    queries, first = made[:40_000], made[40_000:]
    warm = [(as_request(first[place : place + 64]), None) for place in range(0, len(first), 64)]
    found = BM25Retriever(index, threads=1).search(queries, 3)
    asked = [(as_request([q]), as_answer([passages], True)) for q, passages in zip(queries, found, strict=True)]
    with serve_search("--index", str(index), "--workers", str(workers)) as server:
        port, running = int(server.url.rpartition(":")[2]), processes(server)
        rss: list[float] = []
        files: list[int] = []
        threads: list[int] = []

        def look() -> None:
            rss.append(sum(process.memory_info().rss for process in running) / 2**20)
            files.append(sum(process.num_fds() for process in running))
            threads.append(sum(process.num_threads() for process in running))

        asyncio.run(load(port, 8, iter(warm), 600.0, 600.0, lambda: None))
        asyncio.run(load(port, 64, iter(asked[:5_000]), 600.0, 600.0, lambda: None))
        time.sleep(2)
        look()
        before = files[0], threads[0]
        rss.clear()
        result = asyncio.run(load(port, 64, cycle(asked[5_000:]), seconds, 1.0, look))
        during = rss.copy()
        time.sleep(2)
        look()
    result |= {
        "workers": workers,
        "memory_mib_every_20_s": [round(size) for size in rss[::20]],
        "files_before_after": [before[0], files[-1]],
        "threads_before_after": [before[1], threads[-1]],
    }
    assert result["wrong"] == 0, result
    assert files[-1] <= before[0] and threads[-1] <= before[1], result
    return result | last_minute(during)  # Java takes memory for a while before it tidies up


def soak_scaling(index: Path, seconds: float, batch: int) -> dict[str, Any]:
    """One worker on one core, one that may use all, and two: all run, and are asked in turn, so that whatever else the
    machine does falls on each."""
    windows, fresh = 6, cycle(make_queries(400_000, 2))  # many more than a server remembers
    cores = os.sched_getaffinity(0)
    with ExitStack() as stack:
        servers = {}
        for name, workers, allowed in (("1_on_1_core", 1, {min(cores)}), ("1", 1, cores), ("2", 2, cores)):
            os.sched_setaffinity(0, allowed)  # the server inherits it, with all threads that it will have
            options = ("--index", str(index), "--workers", str(workers), "search.threads=1")
            servers[name] = stack.enter_context(serve_search(*options))
        os.sched_setaffinity(0, cores)
        rates: dict[str, list[float]] = {name: [] for name in servers}
        cpu: dict[str, list[float]] = {name: [] for name in servers}
        busy: dict[str, list[float]] = {name: [] for name in servers}
        client: list[float] = []
        for window in range(windows + 2):
            for name, server in servers.items():
                warming = window < 2
                length = 10.0 if warming else seconds / windows
                asked = ((as_request(list(islice(fresh, batch))), None) for _ in range(10**9))
                before, port = spent(server), int(server.url.rpartition(":")[2])
                result = asyncio.run(load(port, 8, asked, length, 60.0, lambda: None))
                assert result["wrong"] == 0, result
                if not warming:
                    took = spent(server) - before
                    rates[name].append(result["requests_per_second"] * batch)
                    cpu[name].append(1000 * took / (result["requests"] * batch))
                    busy[name].append(took / result["seconds"])
                    client.append(result["client_cpu_share"])
    middle = {name: statistics.median(of) for name, of in rates.items()}
    return {
        "batch": batch,
        "queries_per_second": {name: [round(rate) for rate in of] for name, of in rates.items()},
        "server_cpu_ms_a_query": {name: round(statistics.median(of), 3) for name, of in cpu.items()},
        "server_cores_busy": {name: round(statistics.median(of), 2) for name, of in busy.items()},
        "client_cpu_share": round(statistics.median(client), 2),
        "ratio": round(middle["2"] / middle["1"], 2),
        "ratio_to_one_core": round(middle["2"] / middle["1_on_1_core"], 2),
    }


def spent(server: RunningServer) -> float:
    """Seconds of CPU."""
    return sum(sum(process.cpu_times()[:2]) for process in processes(server))


def soak_queries(index: Path, count: int, workers: int) -> dict[str, Any]:
    queries, wrong, began = make_queries(count, 4), 0, 0.0
    here = BM25Retriever(index)
    with serve_search("--index", str(index), "--workers", str(workers)) as server:
        client = HTTPRetriever(server.url, retries=0)
        for first in range(0, count, 256):
            part = queries[first : first + 256]
            start = time.perf_counter()
            found = client.search(part, 3)
            began += time.perf_counter() - start
            wrong += sum(ours != theirs for ours, theirs in zip(found, here.search(part, 3), strict=True))
        refused = server.metric('requests_total{status="4xx"}') + server.metric('requests_total{status="5xx"}')
    assert not wrong and not refused, (wrong, refused)
    return {
        "queries": count,
        "wrong": wrong,
        "errors": refused,
        "queries_per_second": round(count / began),
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["clients", "scaling", "queries"])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--index", type=Path, help="an index of that corpus, kept for the next time")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=16, help="scaling: queries a request")
    parser.add_argument("--count", type=int, default=50_000, help="queries: how many")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = given.index or Path(folder) / "index"
        if not index.exists():
            write_corpus(Path(folder) / "corpus.jsonl", given.passages)
            build_index(Path(folder) / "corpus.jsonl", index)
        if given.what == "clients":
            result = soak_clients(index, given.seconds, given.workers)
        elif given.what == "scaling":
            result = soak_scaling(index, given.seconds, given.batch)
        else:
            result = soak_queries(index, given.count, given.workers)
    print(json.dumps({"soak": given.what, "passages": given.passages} | result))


if __name__ == "__main__":
    main()
