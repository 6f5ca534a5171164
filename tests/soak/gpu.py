"""A card's figures within a few minutes, the most wanted first: each is in the file as soon as it is there.

    python tests/soak/gpu.py --out gpu.json                Qwen2.5-3B's shape at 64, 8, 1 and 32 rows, growth, memory
    python tests/soak/gpu.py --out gpu.json --rows 64 --no-growth --no-memory

The workloads are those of `searche1-lite bench`, which also plays the demo and a small model, and takes longer. Where
there is no Java, passages come from `examples/own_retriever.py` in the place of BM25; the file says which it was.
Weights are random, of the real shape: fit for speed and memory alone. A part that fails is told, and the others are
measured all the same; the exit status is 1 then.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from own_retriever import RareWords

from searche1_lite import Passage, load_config
from searche1_lite.bench import _machine
from searche1_lite.bench import rollout as bench
from searche1_lite.bench.doctor import model_shape
from searche1_lite.bench.limits import measure_gpu
from searche1_lite.bench.memory import measure_memory
from searche1_lite.data.demo_world import DEMO_WORLD_SEED, World
from searche1_lite.policy.model import compute_dtype
from searche1_lite.runtime.errors import UserError
from searche1_lite.search.base import Retriever
from searche1_lite.search.catalog import open_retriever

GROWTH = (8, 16, 32, 64, 128, 256)


def shelf() -> RareWords:
    rows = World(DEMO_WORLD_SEED).passages()
    return RareWords([Passage(row["id"], *row["contents"].split("\n", 1)) for row in rows])


class Figures:
    """What was found so far, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._began = path, time.monotonic()
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def add(self, name: str, work: Callable[[], Any]) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {name}", file=sys.stderr, flush=True)
        try:
            found = work()
        except Exception:
            self.failed.append(name)
            found = traceback.format_exc()
            print(found, file=sys.stderr, flush=True)
        self.found |= {name: found, "seconds": round(time.monotonic() - self._began, 1)}
        self._path.write_text(json.dumps(self.found, indent=1))


def told(part: str) -> None:
    print(f"          {part}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 8, 1, 32])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true", help="a shape of 3 layers and short turns: a rehearsal")
    asked = parser.parse_args()
    if not (torch.cuda.is_available() or asked.small):
        sys.exit("there is no GPU here; --small rehearses on a CPU")
    figures = Figures(asked.out)
    figures.add("machine", _machine)
    if torch.cuda.is_available():
        dtype = compute_dtype(torch.device("cuda"))
        figures.add("bytes_and_flops_a_second", partial(measure_gpu, dtype))
    own = shelf()
    retriever: Callable[..., Retriever] = open_retriever
    try:
        open_retriever(load_config("demo").search)
    except (UserError, ImportError) as error:
        told(f"no BM25 here ({error}); passages by rare words")
        retriever = lambda *_, **__: own  # noqa: E731
    bench.open_retriever = retriever
    figures.add("retriever", lambda: retriever(load_config("demo").search).name)
    script = bench.QuickEpisode if asked.small else bench.ScriptedEpisode
    shape = bench.small_shape(3) if asked.small else model_shape(load_config())
    with bench.scripted_policy(shape, script) as policy:
        for rows in asked.rows:
            workload = bench._scripted(f"{rows} rows", *policy, rows, script)
            figures.add(workload.name, partial(bench.report, workload, asked.repeats, told))
        if asked.growth:
            workload = bench._scripted("growth", *policy, 64, script, (8, 16) if asked.small else GROWTH)
            figures.add("growth", partial(bench.grow, workload, told))
    if asked.memory:
        workload = policy = None  # the memory is needed by the processes that follow
        bench.give_memory_back()
        figures.add("memory", lambda: measure_memory(on_part=told, quick=asked.small))
    print(asked.out.read_text())
    if figures.failed:
        sys.exit(f"failed: {', '.join(figures.failed)}")


if __name__ == "__main__":
    main()
