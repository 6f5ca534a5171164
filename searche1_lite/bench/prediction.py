"""What the engine will take for a workload, from what its parts take on this machine.

Each is timed in smaller rollouts of other episodes, and `simulation.simulate` puts them together. `bench` holds that
against what the engine took. For CPUs: on a GPU a captured step takes as long as the largest of its bucket.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import nnls

from searche1_lite.bench.simulation import script_of, simulate
from searche1_lite.data.trajectory import Passage, Trajectory
from searche1_lite.policy.engine import Decoder, SampledTurn
from searche1_lite.rollout.scheduler import RolloutTimes
from searche1_lite.search.base import Retriever

if TYPE_CHECKING:
    from searche1_lite.bench.rollout import Workload


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """`simulation.Costs` as sums, in seconds: a call, each row, token or query, and each cached token looked at."""

    starting: float = 0.0
    stepping: tuple[float, float, float] = (0.0, 0.0, 0.0)
    prefilling: tuple[float, float, float] = (0.0, 0.0, 0.0)
    copying: tuple[float, float] = (0.0, 0.0)
    turning: float = 0.0
    searching: tuple[float, float] = (0.0, 0.0)

    def start(self) -> float:
        return self.starting

    def step(self, rows: int, columns: int) -> float:
        return _sum(self.stepping, 1, rows, columns)

    def prefill(self, tokens: int, columns: int) -> float:
        return _sum(self.prefilling, 1, tokens, columns)

    def copy(self, tokens: int) -> float:
        return _sum(self.copying, 1, tokens)

    def turn(self) -> float:
        return self.turning

    def search(self, queries: int) -> float:
        return _sum(self.searching, 1, queries) if queries else 0.0


def predict(workload: "Workload", played: Sequence[Trajectory], measured: float) -> dict[str, Any]:
    """What the simulation says of episodes as long as these.

    Args:
        played: what the engine wrote, question by question; only lengths and queries are used.
        measured: seconds that it took.

    Returns:
        `seconds`; `vs_measured`, their ratio to those measured; and `costs`, in seconds.
    """
    scripts = [script_of(one, number // workload.n) for number, one in enumerate(played)]
    costs = measure_costs(workload)
    rows, cpu = workload.config.engine.batch_size, workload.model.device.type == "cpu"
    seconds = simulate(scripts, rows, costs, in_step=cpu).seconds
    return {
        "seconds": round(seconds, 4),
        "vs_measured": round(seconds / measured, 4),
        "costs": {name: list(cost) if isinstance(cost, tuple) else cost for name, cost in asdict(costs).items()},
    }


def measure_costs(workload: "Workload") -> MeasuredCosts:
    """What parts take in the workload's trials: each call of the decoder and of the search engine is timed, and what is
    left is put down to turns."""
    watch = _Watch()
    rest, turns = 0.0, 0
    for questions, n, batch_size in workload.trials:
        sized = replace(
            workload, config=replace(workload.config, engine=replace(workload.config.engine, batch_size=batch_size))
        )
        retriever = _WatchedRetriever(workload.retriever(), watch)
        before, began = watch.seconds(), time.perf_counter()
        times = RolloutTimes()
        watch.began = began
        played = sized.rollout(
            retriever, questions, n, workload.trial_episode, times, decoder=partial(_WatchedDecoder, watch)
        )
        taken = time.perf_counter() - began
        rest += taken - (watch.seconds() - before) - times.search_wait
        turns += sum(len(one.turns) for one in played)
    return MeasuredCosts(
        statistics.median(watch.starts),
        _fit(watch.steps),
        _fit(watch.reads),
        _fit(watch.copies) if watch.copies else (0.0, 0.0),
        max(0.0, rest / turns),
        _fit(watch.searches) if watch.searches else (0.0, 0.0),
    )


Measured = list[tuple[tuple[float, ...], float]]
"""Of each call, how much was done in it, as `MeasuredCosts` counts, and its seconds."""


@dataclass
class _Watch:
    """What was seen."""

    began: float = 0.0
    starts: list[float] = field(default_factory=list)
    steps: Measured = field(default_factory=list)
    reads: Measured = field(default_factory=list)
    copies: Measured = field(default_factory=list)
    searches: Measured = field(default_factory=list)

    def seconds(self) -> float:
        """Of all but the searches, which another thread makes."""
        return sum(self.starts) + sum(seconds for part in (self.steps, self.reads, self.copies) for _, seconds in part)


class _WatchedDecoder(Decoder):
    """A decoder each of whose calls is timed."""

    def __init__(self, watch: _Watch, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        _settle()
        self._watch, self._size = watch, (0, 0)
        watch.starts.append(time.perf_counter() - watch.began)

    def step(self) -> list[tuple[int, SampledTurn]]:
        began = time.perf_counter()
        ended = super().step()  # it waits for the GPU
        self._watch.steps.append(((1, *self._size), time.perf_counter() - began))
        return ended

    def _decode(
        self, shape: tuple[int, int], *inputs: torch.Tensor, spans: Sequence[tuple[int, int, int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, width = shape
        columns = rows * width if spans is None else sum((end - start) * length for start, end, length in spans)
        self._size = rows, columns
        return super()._decode(shape, *inputs, spans=spans)

    def _prefill(self, slots: list[int], chunks: list[list[int]]) -> None:
        sizes = np.array([len(chunk) for chunk in chunks])
        tokens, width = len(slots) * int(sizes.max()), self._bucket(int((self.lengths[slots] + sizes).max()))
        began = time.perf_counter()
        super()._prefill(slots, chunks)
        _settle()
        self._watch.reads.append(((1, tokens, tokens * width), time.perf_counter() - began))

    def share(self, source: int, target: int, length: int) -> None:
        began = time.perf_counter()
        super().share(source, target, length)
        _settle()
        self._watch.copies.append(((1, length), time.perf_counter() - began))


class _WatchedRetriever:
    """A retriever each of whose calls with new queries is timed."""

    def __init__(self, retriever: Retriever, watch: _Watch) -> None:
        self.name, self._retriever, self._watch = retriever.name, retriever, watch
        self._known: set[str] = set()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        new = set(queries) - self._known
        self._known |= new
        began = time.perf_counter()
        found = self._retriever.search(queries, k)
        if new:
            self._watch.searches.append(((1, len(new)), time.perf_counter() - began))
        return found


def _sum(parts: Sequence[float], *sizes: float) -> float:
    return sum(part * size for part, size in zip(parts, sizes, strict=True))


def _fit(measured: Measured) -> Any:
    """Parts, none below zero, that make up the seconds of all calls; long ones may be further off than short."""
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
    scale = np.sqrt(seconds)
    return tuple(float(part) for part in nnls(sizes / scale[:, None], scale)[0])


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
