"""`serve-search` as users start it: a process of its own, on a free port."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from searche1_lite.cli.main import main; main()", "serve-search"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@dataclass
class RunningServer:
    process: "subprocess.Popen[str]"
    url: str
    """Without a path."""
    told: str
    """The line that it began with."""

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        request = urllib.request.Request(self.url + path, body, method=method)
        request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def retrieve(self, **body: Any) -> list[list[dict[str, Any]]]:
        status, answer = self.request("POST", "/retrieve", json.dumps(body).encode())
        assert status == 200, answer
        return json.loads(answer)["result"]

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics")[1].decode()
        return float(re.search(rf"^searche1_search_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


@contextmanager
def serve_search(*arguments: str, env: dict[str, str] | None = None) -> Iterator[RunningServer]:
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | (env or {})
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        while not (lines and lines[-1].startswith("serving on ")):
            lines.append(process.stderr.readline())
            assert lines[-1], f"it ended: {''.join(lines)}"
        yield RunningServer(process, lines[-1].split()[2], lines[-1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def refused(*arguments: str) -> str:
    """What a server that does not start says."""
    ran = subprocess.run([*COMMAND, "--port", "0", *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode in (1, 2) and ran.stdout == "" and ran.stderr.startswith("error: "), ran.stderr
    return ran.stderr


def children(process: "subprocess.Popen[str]") -> Sequence[Any]:
    """The workers, without multiprocessing's resource tracker."""
    import psutil

    found = [child for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]
