"""What the engine will take for a workload, from what its parts take on this machine.

Each is measured by itself, and `simulation.simulate` puts them together. `bench` holds that against what it took.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import nnls

from searche1_lite.bench.simulation import Script, script_of, simulate
from searche1_lite.engine import Decoder, SampledTurn, UniformStream, uses_shadow
from searche1_lite.model import compute_context, shadow_weights
from searche1_lite.search.base import Retriever
from searche1_lite.trajectory import Trajectory

if TYPE_CHECKING:
    from searche1_lite.bench.rollout import Workload

_REPEATS = 3
"""Of each measurement, of which the median counts."""

_EPISODES = 8
"""That are acted out again, to see what a turn takes beside the model."""


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """`simulation.Costs` as sums, in seconds: a call, each row, token or query, and each cached token looked at."""

    starting: float
    stepping: tuple[float, float, float]
    prefilling: tuple[float, float, float]
    copying: tuple[float, float]
    turning: float
    searching: tuple[float, float]

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
    costs = measure_costs(workload, scripts, played)
    rows, cpu = workload.config.engine.batch_size, workload.model.device.type == "cpu"
    seconds = simulate(scripts, rows, costs, in_step=cpu).seconds
    return {
        "seconds": round(seconds, 4),
        "vs_measured": round(seconds / measured, 4),
        "costs": {name: getattr(costs, name) for name in MeasuredCosts.__slots__},
    }


@torch.inference_mode()
def measure_costs(workload: "Workload", scripts: Sequence[Script], played: Sequence[Trajectory]) -> MeasuredCosts:
    """Each part by itself, at sizes between the least and the most that these scripts have."""
    rows = min(workload.config.engine.batch_size, len(scripts))
    longest = max(script.prompt + sum(turn.tokens + turn.reply for turn in script.turns) for script in scripts)
    texts = sorted([script.prompt for script in scripts] + [t.reply for s in scripts for t in s.turns if t.reply])
    model, device = workload.model, workload.model.device.type

    def decoder() -> Decoder:
        return Decoder(
            model,
            workload.tokenizer,
            rows,
            longest,
            temperature=workload.config.engine.temperature,
            greedy=workload.greedy,
        )

    model.eval()
    began = time.perf_counter()
    protocol = workload.protocol
    for question in workload.questions:
        protocol.prompt_ids(question.question)
    with shadow_weights(model, uses_shadow(workload.config.engine, device, rows)), compute_context(model):
        made = decoder()
        starting = time.perf_counter() - began
        least, middle = min(script.prompt for script in scripts), texts[len(texts) // 2]
        counts = sorted({1, -(-rows // 4), rows})
        steps = [_step(made, count, length, workload.greedy) for count in counts for length in (least, longest - 1)]
        reads = [
            _read(made, count, size, there)
            for count in counts
            for size in sorted({min(8, middle), middle})
            for there in sorted({0, longest - middle})
        ]
        copies = [_copy(made, length) for length in (least, longest)] if rows > 1 else []
    return MeasuredCosts(
        starting,
        _fit(steps),
        _fit(reads),
        _fit(copies) if copies else (0.0, 0.0),
        _turn(workload, played[:_EPISODES]),
        _fit(_searches(workload.retriever(), played, workload.config.search.k)),
    )


def _sum(parts: Sequence[float], *sizes: float) -> float:
    return sum(part * size for part, size in zip(parts, sizes, strict=True))


def _fit(measured: Sequence[tuple[tuple[float, ...], float]]) -> Any:
    """Parts, none below zero, of which the sizes measured make up the seconds: those furthest off in proportion count
    most."""
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
    return tuple(float(part) for part in nnls(sizes / seconds[:, None], np.ones(len(seconds)))[0])


def _median(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call, the first of which does not count."""
    taken = []
    for _ in range(_REPEATS + 1):
        before()
        _settle()
        began = time.perf_counter()
        work()
        _settle()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _step(decoder: Decoder, rows: int, length: int, greedy: bool) -> tuple[tuple[float, ...], float]:
    """One of so many rows with so many tokens in the cache."""

    def begin() -> None:
        decoder.clear(len(decoder.writing))
        decoder.lengths[:rows] = length
        for slot in range(rows):
            decoder.begin(slot, 0, 1_000_000, None if greedy else UniformStream(slot))

    return (1, rows, rows * (length + 1)), _median(decoder.step, begin)


def _read(decoder: Decoder, rows: int, size: int, there: int) -> tuple[tuple[float, ...], float]:
    """A pass over so many tokens in each of so many rows, behind what is there."""

    def begin() -> None:
        decoder.clear(len(decoder.writing))
        decoder.lengths[:rows] = there

    chunks = [[0] * size for _ in range(rows)]
    tokens = rows * size
    return (1, tokens, tokens * (there + size)), _median(lambda: decoder.prefill(range(rows), chunks), begin)


def _copy(decoder: Decoder, length: int) -> tuple[tuple[float, ...], float]:
    return (1, length), _median(lambda: decoder.share(0, 1, length))


def _turn(workload: "Workload", played: Sequence[Trajectory]) -> float:
    """What is done with a turn beside the model and the search: the same turns, acted out again."""
    protocol, turns = workload.protocol, sum(len(one.turns) for one in played)

    def act() -> None:
        for one in played:
            episode = workload.episode(one.question, one.sample, one.prompt_ids, protocol, False)
            searches = iter(one.searches)
            for turn in one.turns:
                ids = one.completion_ids[turn.start : turn.end]
                written = SampledTurn(ids, [], "budget" if turn.kind == "invalid" else "tag")
                action = episode.take_turn(written)
                search = next(searches, None) if action.kind == "search" and episode.may_search else None
                episode.react(action, written, None if search is None else search.passages)
            episode.finish()

    return _median(act) / max(1, turns)


def _searches(retriever: Retriever, played: Sequence[Trajectory], k: int) -> list[tuple[tuple[float, ...], float]]:
    """Queries that were not asked before, one by one and all others at once."""
    queries = list(dict.fromkeys(search.query for one in played for search in one.searches))
    retriever.search(["first"], k)
    found: list[tuple[tuple[float, ...], float]] = []
    singles = min(8, len(queries) // 2)
    for batch in [*([query] for query in queries[:singles]), queries[singles:]]:
        if batch:
            began = time.perf_counter()
            retriever.search(batch, k)
            found.append(((1, len(batch)), time.perf_counter() - began))
    return found
