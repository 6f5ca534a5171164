"""Two thousand cycles of rollout and update, over a hundred rounds: does memory, a thread or an open file stay behind?

    python tests/soak/cycles.py [--rounds 100] [--remember 200]

Each round is ten GRPO steps and as many of OFSD as its pairs give, on the demo's policy, with a checkpoint and an
evaluation after each stage. Memory, threads and open files are looked at after each round's evaluation; slopes are of
the second half, by least squares, with the standard error of the slope. Resident memory has what the allocator keeps
for later in it, which grows in steps; what is in use is told beside it: bytes from the C allocator (glibc's), blocks of
Python's own, and what Java has besides its heap, whose size is fixed. The retriever remembers its last 20,000 queries,
more than a soak asks: with `--remember` so many, so that what grows besides is seen.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import psutil

from searche1_lite.config import load_config
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.quiet import quieten
from searche1_lite.search import bm25
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder

SETTINGS = [
    "grpo.steps=10",
    "grpo.questions_per_step=4",
    "grpo.group_size=2",
    "grpo.learning_rate=1e-5",
    "ofsd.questions=16",
    "ofsd.rollouts=3",
    "ofsd.batch_size=1",
    "ofsd.learning_rate=1e-6",
    "data.evaluation_limit=8",
    "checkpoint.keep_stages=2",
    "logging.samples=0",
]


class _Malloc(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


class Sample(NamedTuple):
    resident: float
    """MiB, as are the others; `python` is in thousands of blocks."""
    malloc: float
    python: float
    java: float
    threads: int
    files: int


def look() -> Sample:
    from jnius import autoclass

    gc.collect()
    process, mallinfo = psutil.Process(), ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _Malloc
    malloc = mallinfo()
    java = autoclass("java.lang.management.ManagementFactory").getMemoryMXBean().getNonHeapMemoryUsage()
    return Sample(
        process.memory_info().rss / 2**20,
        (malloc.uordblks + malloc.hblkhd) / 2**20,
        sys.getallocatedblocks() / 1000,
        java.getCommitted() / 2**20,
        process.num_threads(),
        process.num_fds(),
    )


class Watched(RunFolder):
    """A run's folder that looks at the process each time a round's last evaluation is logged."""

    samples: list[Sample] = []
    updates = 0

    def log(self, record: dict[str, Any]) -> None:
        super().log(record)
        if record["stage"] != "evaluate":
            self.updates += 1
        elif record["name"].endswith("ofsd"):
            self.samples.append(sample := look())
            print(
                f"{self.updates} updates: {sample.resident:.1f} MiB, in use {sample.malloc:.2f} MiB of malloc's, "
                f"{sample.python:.1f} thousand blocks of Python's, {sample.java:.2f} MiB of Java's; "
                f"{sample.threads} threads, {sample.files} open files",
                flush=True,
            )


def slope(values: list[float]) -> tuple[float, float]:
    """Per sample, with its standard error."""
    (gradient, _), covariance = numpy.polyfit(range(len(values)), values, 1, cov=True)
    return float(gradient), float(covariance[0, 0]) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--remember", type=int, help="queries whose passages are kept")
    given = parser.parse_args()
    if (rounds := given.rounds) < 8:
        parser.error("--rounds must be at least 8: slopes are of the second half")
    if given.remember is not None and given.remember < 0:
        parser.error("--remember must be 0 or more")
    if given.remember is not None:
        bm25.REMEMBERED_QUERIES = given.remember
    quieten()
    config = load_config("demo", None, [*SETTINGS, f"rounds={rounds}"])
    with tempfile.TemporaryDirectory() as place:
        folder = Watched(Path(place) / "run", config, resume=False)
        run_training(config, folder, RichTasks(quiet=True))
    late = folder.samples[len(folder.samples) // 2 :]
    print(f"{folder.updates} updates in {rounds} rounds; in the second half:")
    names = ("resident MiB", "MiB in use of malloc's", "thousand blocks of Python's", "MiB of Java's beside its heap")
    for place, name in enumerate(names):
        values = [sample[place] for sample in late]
        print(f"{name}: {values[0]:.2f} to {values[-1]:.2f}, slope %+.4f +- %.4f a round" % slope(values))
    print(f"threads: {late[0].threads} to {late[-1].threads}; open files: {late[0].files} to {late[-1].files}")


if __name__ == "__main__":
    main()
