"""Soaks `ask --web`: 64 clients at once for 60 s, every answer looked at, beside clients that are slow on purpose.

    python tests/soak/web.py [--seconds 60] [--clients 64]

The page has 17 places: who comes when they are taken is told so with 503, and asks again after a moment. An answer has
to be the one that the same question has when it is asked alone (greedy, the demo's policy). Meanwhile connections are
opened that never finish their headers or their body, which have to be cut, and some that leave in the middle of an
answer, which takes no place for good. Prints one JSON object; fails where an answer is wrong, a slow client stays,
memory is not flat (`flat.py`), or a thread or an open file is left behind. Give the machine to it alone.
"""

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import psutil
from flat import last_minute

from searche1_lite.data.questions import load_questions

COMMAND = [sys.executable, "-m", "searche1_lite", "ask", "--preset", "demo", "--web", "--port", "0"]
BACK_AFTER = 0.5
"""Seconds after which a client that was sent away comes again."""
SLOW = 4
"""Clients of each slow kind at once."""
LONGEST_SLOW = 60.0
"""Seconds in which each of them has to be cut."""


def as_request(question: str, **settings: Any) -> bytes:
    body = json.dumps({"question": question, **settings}).encode()
    head = f"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


async def ask(port: int, question: str) -> tuple[int, Any]:
    """The status, and the answer's record without its seconds; where there is none, the whole body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        writer.write(as_request(question))
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    lines = [line for line in body.splitlines() if line.startswith(b"{")]  # the rest is the chunks' sizes
    last = json.loads(lines[-1]) if lines else {}
    if last.get("type") != "answer":
        return status, last
    return status, {key: value for key, value in last["record"].items() if key != "seconds"}


SLOWNESS = {
    "headers": b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\n",
    "body": as_request("Who?")[:-4],
}


async def be_slow(port: int, kind: str) -> float:
    """Seconds until the server cut it, or gave it up with an answer and cut it then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    try:
        writer.write(SLOWNESS[kind])
        await asyncio.wait_for(reader.read(), LONGEST_SLOW)
    finally:
        writer.close()
    return time.perf_counter() - began


async def leave_early(port: int, question: str) -> None:
    """Asks, and is gone after the first line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(as_request(question, temperature=100.0))
    await reader.readline()
    writer.close()


async def soak(port: int, process: psutil.Process, seconds: float, clients: int) -> dict[str, Any]:
    questions = [question.question for question in load_questions("demo:dev", "test", 0)]
    alone = {question: (await ask(port, question))[1] for question in questions}
    asked, began = cycle(questions), time.perf_counter()
    counts = {"answers": 0, "wrong": 0, "sent_away": 0, "other": 0, "left_early": 0}
    taken: list[float] = []
    slow: dict[str, list[float]] = {kind: [] for kind in SLOWNESS}
    looks: list[tuple[float, int, int]] = []

    def going_on() -> bool:
        return time.perf_counter() - began < seconds

    async def client() -> None:
        while going_on():
            question, start = next(asked), time.perf_counter()
            status, record = await ask(port, question)
            if status == 503:
                counts["sent_away"] += 1
                await asyncio.sleep(BACK_AFTER)
            elif status == 200:
                taken.append(time.perf_counter() - start)
                counts["answers"] += 1
                counts["wrong"] += record != alone[question]
            else:
                counts["other"] += 1

    async def slow_client(kind: str) -> None:
        while going_on():
            slow[kind].append(await be_slow(port, kind))

    async def fickle_client() -> None:
        while going_on():
            await leave_early(port, next(asked))
            counts["left_early"] += 1
            await asyncio.sleep(1.0)

    async def watch() -> None:
        while True:
            looks.append(look(process))
            await asyncio.sleep(1.0)

    before, watching = look(process), asyncio.ensure_future(watch())
    await asyncio.gather(
        *(client() for _ in range(clients)),
        *(slow_client(kind) for kind in SLOWNESS for _ in range(SLOW)),
        fickle_client(),
    )
    spent = time.perf_counter() - began
    watching.cancel()
    await asyncio.sleep(3.0)
    after = look(process)
    again = [(await ask(port, question))[1] == alone[question] for question in questions[:5]]
    result = counts | {
        "questions": len(questions),
        "clients": clients,
        "seconds": round(spent, 1),
        "answers_per_second": round(counts["answers"] / spent, 1),
        "p50_s": round(statistics.median(taken), 2),
        "slowest_s": round(max(taken), 2),
        "slow_clients_cut": {kind: [len(of), round(max(of), 1)] for kind, of in slow.items()},
        "memory_mib_every_10_s": [round(sample[0]) for sample in [*looks[::10], after]],
        "threads_before_after": [before[1], after[1]],
        "files_before_most_after": [before[2], max(sample[2] for sample in looks), after[2]],
    }
    assert counts["answers"] and not counts["wrong"] and not counts["other"] and all(again), result
    assert after[1] <= before[1] and after[2] <= before[2], result
    return result | last_minute([sample[0] for sample in looks])


def look(process: psutil.Process) -> tuple[float, int, int]:
    """Resident MiB, threads, open files."""
    with process.oneshot():
        return process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()


def lines_of(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stderr is not None
    yield from process.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    given = parser.parse_args()
    with subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = next(m for line in lines_of(process) if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
            result = asyncio.run(soak(int(found[1]), psutil.Process(process.pid), given.seconds, given.clients))
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    print(json.dumps({"soak": "web", **result}))


if __name__ == "__main__":
    main()
