"""Two thousand cycles of rollout and update, over a hundred rounds: does memory, a thread or an open file stay behind?

    python tests/soak/cycles.py [--rounds 100] [--remember 200]

Each round is ten GRPO steps and as many of OFSD as its pairs give, on the demo's policy, with a checkpoint and an
evaluation after each stage. Resident memory, threads and open files are looked at after each round's evaluation; slopes
are of the second half, by least squares, with the standard error of the slope. The retriever remembers its last 20,000
queries, more than a soak asks: with `--remember` so many, so that what grows besides is seen.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy
import psutil

from searche1_lite.checkpoint import RunFolder
from searche1_lite.config import load_config
from searche1_lite.console import RichTasks
from searche1_lite.evolve import run
from searche1_lite.quiet import quieten
from searche1_lite.search import bm25

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


class Watched(RunFolder):
    """A run's folder that looks at the process each time an evaluation is logged."""

    samples: list[tuple[float, int, int]] = []
    updates = 0

    def log(self, record: dict[str, Any]) -> None:
        super().log(record)
        if record["stage"] != "evaluate":
            self.updates += 1
        elif record["name"].endswith("ofsd"):
            process = psutil.Process()
            self.samples.append((process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()))
            print(f"{self.updates} updates: %.1f MiB, %d threads, %d open files" % self.samples[-1], flush=True)


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
        run(config, folder, RichTasks(quiet=True))
    late = folder.samples[len(folder.samples) // 2 :]
    memory, error = slope([sample[0] for sample in late])
    print(
        f"{folder.updates} updates in {rounds} rounds; memory {late[0][0]:.1f} to {late[-1][0]:.1f} MiB in the second"
    )
    print(f"half, slope {memory:+.3f} +- {error:.3f} MiB a round;", end=" ")
    for name, place in (("threads", 1), ("open files", 2)):
        print(f"{name} {late[0][place]} to {late[-1][place]}", end="; " if place == 1 else "\n")


if __name__ == "__main__":
    main()
