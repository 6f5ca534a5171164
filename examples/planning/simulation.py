"""How long rollouts take, computed from the time of their parts.

The scheduler (`rollout.scheduler.Play`) and the decoder's bookkeeping are the real ones. Passes through the model and
searches are replaced by a clock that advances by their cost.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.policy.engine import Decoder, SampledTurn
from searche1_lite.policy.stopping import TagAutomaton
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action
from searche1_lite.rollout.scheduler import Hooks, Play, RolloutTimes, Seat


@dataclass(frozen=True, slots=True)
class Written:
    """One turn: tokens that the policy writes, tokens of the environment's reply (0: the episode is over), and what is
    searched for in between, if anything is."""

    tokens: int
    reply: int
    query: str | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """One episode, as far as its time depends on it. Those of one `group` have the same prompt."""

    group: int
    prompt: int
    turns: tuple[Written, ...]


class Costs(Protocol):
    """Seconds that the parts of rollouts take."""

    def start(self) -> float:
        """What comes before the first token: weights made ready, the cache."""

    def step(self, rows: int, columns: int) -> float:
        """A decoding step of so many rows, which look at so many cached tokens, all together."""

    def prefill(self, tokens: int, columns: int) -> float:
        """A pass over so many new tokens, which look at so many cached ones, all together."""

    def copy(self, tokens: int) -> float:
        """So many tokens of one row's cache copied to another."""

    def turn(self) -> float:
        """What is done with a turn that has ended: its text parsed, the reply put into tokens."""

    def search(self, queries: int) -> float:
        """So many new queries, answered together."""


@dataclass(slots=True)
class Simulated:
    """Seconds in all and by part, and what was counted."""

    seconds: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    search_wait: float = 0.0
    search: float = 0.0
    """In which the search engine was at work, beside the rest or alone."""
    decode_steps: int = 0
    prefill_tokens: int = 0
    tokens: int = 0
    """Written by the policy."""
    searches: int = 0


def script_of(trajectory: Trajectory, group: int) -> Script:
    """What was played, as a script."""
    turns, searches = trajectory.turns, iter(trajectory.searches)
    nexts = [turn.start for turn in turns[1:]] + [turns[-1].end if turns else 0]
    written = []
    for turn, following in zip(turns, nexts, strict=True):
        search = next(searches, None) if turn.kind == "search" else None  # the last ones may not have been allowed
        written.append(Written(turn.end - turn.start, following - turn.end, None if search is None else search.query))
    return Script(group, len(trajectory.prompt_ids), tuple(written))


def simulate(scripts: Sequence[Script], rows: int, costs: Costs, *, in_step: bool) -> Simulated:
    """Rollouts of these episodes with so many slots.

    Args:
        in_step: passages are taken up some steps after they were asked for, as on a CPU, and not when they are there.
    """
    found = Simulated(seconds=costs.start())
    rows = min(rows, len(scripts))
    longest = max(script.prompt + sum(turn.tokens + turn.reply for turn in script.turns) for script in scripts)
    decoder = _CountingDecoder(rows, longest, costs, found)
    searcher = _CountingSearcher(costs, found)
    seats = [Seat(_ReplayedEpisode(script, costs, found), None, script.group) for script in scripts]
    times = RolloutTimes()
    Play(decoder, _Unasked(), 0, rows, in_step, Hooks(times=times), searcher).run(seats)
    found.decode_steps, found.prefill_tokens = times.decode_steps, times.prefill_tokens
    return found


class _CountingDecoder(Decoder):
    """The decoder's books without a model. Nothing ends a turn but its budget, which is what the script says."""

    def __init__(self, slots: int, columns: int, costs: Costs, found: Simulated) -> None:
        self._device, self._graphs, self._greedy, self._with_logprobs = torch.device("cpu"), None, True, False
        self._columns, self._automaton, self._ends = -(-columns // 8) * 8, _NoTags(), np.zeros(1, dtype=bool)
        self._costs, self._found = costs, found
        self.clear(slots)

    def _prefill(self, slots: list[int], chunks: list[list[int]]) -> None:
        sizes = np.array([len(chunk) for chunk in chunks])
        width = self._bucket(int((self.lengths[slots] + sizes).max()))
        tokens = len(slots) * int(sizes.max())
        seconds = self._costs.prefill(tokens, tokens * width)
        self._found.seconds += seconds
        self._found.prefill += seconds
        self.lengths[slots] += sizes

    def share(self, source: int, target: int, length: int) -> None:
        seconds = self._costs.copy(length)
        self._found.seconds += seconds
        self._found.prefill += seconds
        self.lengths[target] = length

    def _decode(
        self, shape: tuple[int, int], *inputs: torch.Tensor, spans: Sequence[tuple[int, int, int]] | None = None
    ) -> tuple[torch.Tensor, None]:
        assert spans is not None
        rows = shape[0]
        seconds = self._costs.step(rows, sum((end - start) * length for start, end, length in spans))
        self._found.seconds += seconds
        self._found.decode += seconds
        self._found.tokens += int(self.writing.sum())
        return torch.zeros(rows, dtype=torch.int64), None


class _NoTags(TagAutomaton):
    def __init__(self) -> None:
        self.done, self.table = 1, np.zeros((1, 1), dtype=np.uint8)


class _ReplayedEpisode(Episode):
    """Follows a script, whatever is written."""

    def __init__(self, script: Script, costs: Costs, found: Simulated) -> None:
        self.trajectory = Trajectory(Question("", "", []), 0, [0] * script.prompt, [], [], [], [], "end")
        self.over = False
        self._turns, self._costs, self._found = iter(script.turns), costs, found
        self._now = next(self._turns)

    @property
    def budget(self) -> int:
        return self._now.tokens

    @property
    def may_search(self) -> bool:
        return True

    def take_turn(self, sampled: SampledTurn) -> Action:
        self._found.seconds += self._costs.turn()
        return Action("invalid") if self._now.query is None else Action("search", self._now.query)

    def react(self, action: Action, sampled: SampledTurn, passages: list[Passage] | None) -> list[int]:
        reply = [0] * self._now.reply
        following = next(self._turns, None)
        if following is None:
            self.over = True
        else:
            self._now = following
        return reply


class _Unasked:
    """Stands where the search engine would."""

    name = "none"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        raise AssertionError("nothing is searched for in a simulation")


class _CountingSearcher(Executor):
    """The thread that searches, which is busy until a time on the clock; what was searched for before is remembered."""

    def __init__(self, costs: Costs, found: Simulated) -> None:
        self._costs, self._found, self._busy_until = costs, found, 0.0
        self._known: set[str] = set()

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> "Future[Any]":
        queries: list[str] = given[1]
        new = set(queries) - self._known
        self._known |= new
        seconds = self._costs.search(len(new))
        self._found.search += seconds
        self._found.searches += len(queries)
        self._busy_until = max(self._busy_until, self._found.seconds) + seconds
        return _Due(self._busy_until, len(queries), self._found)


class _Due(Future[Any]):
    """Passages that are there from a time on the clock."""

    def __init__(self, at: float, queries: int, found: Simulated) -> None:
        super().__init__()
        self._at, self._queries, self._simulated = at, queries, found

    def done(self) -> bool:
        return self._simulated.seconds >= self._at

    def result(self, timeout: float | None = None) -> list[list[Passage]]:
        late = max(0.0, self._at - self._simulated.seconds)
        self._simulated.seconds += late
        self._simulated.search_wait += late
        return [[] for _ in range(self._queries)]
