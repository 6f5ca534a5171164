"""A rollout's rows as requests to vLLM: what is asked, what comes back, and where a turn ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from searche1_lite.policy.engine import SampledTurn, UniformStream
from searche1_lite.policy.stopping import TagAutomaton
from searche1_lite.runtime.seeds import derive_seed


class RequestEngine(Protocol):
    """What `VllmEngine` offers its decoders."""

    ends: frozenset[int]
    automaton: TagAutomaton

    def ask(self, ids: Sequence[int], settings: Mapping[str, Any], lora: Any) -> str: ...

    def step(self) -> list[tuple[str, list[int], list[float], bool]]: ...

    def abort(self, names: list[str]) -> None: ...

    def sleep(self) -> None: ...


def sampling(
    budget: int, ends: frozenset[int], *, temperature: float, seed: int | None, logprobs: bool
) -> dict[str, Any]:
    """What `SamplingParams` is made from: plain sampling, nothing decoded.

    Args:
        budget: tokens that may be written.
        ends: ids that end a message; a closing tag is ours to find.
        temperature: of sampling.
        seed: None for greedy decoding.
        logprobs: of the sampled tokens.
    """
    return {
        "temperature": 0.0 if seed is None else temperature,
        "seed": seed,
        "max_tokens": budget,
        "stop_token_ids": sorted(ends),
        "ignore_eos": True,  # `ends` has what ends a message to us
        "logprobs": 0 if logprobs else None,
        "detokenize": False,
    }


@dataclass(slots=True, eq=False)
class Row:
    """A slot's text, and the turn that is being written in it."""

    slot: int
    text: list[int] = field(default_factory=list)
    turn: SampledTurn = field(default_factory=SampledTurn)
    request: str | None = None
    budget: int = 0
    state: int = 0
    """Of the automaton."""
    fresh: list[int] = field(default_factory=list)
    """What the last step wrote."""


def take(
    row: Row, ids: Sequence[int], logprobs: Sequence[float], automaton: TagAutomaton, ends: frozenset[int]
) -> bool:
    """Adds what was sampled to the turn, up to where the turn ends. Has it ended?"""
    for place, token in enumerate(ids):
        row.turn.ids.append(token)
        row.fresh.append(token)
        row.turn.logprobs += logprobs[place : place + 1]
        row.state = int(automaton.table[row.state, token])
        ended, closed = token in ends, row.state == automaton.done
        if ended or closed or len(row.turn.ids) >= row.budget:
            row.turn.ended = "eos" if ended else "tag" if closed else "budget"
            return True
    return False


class VllmDecoder:
    """What one rollout writes with: `engine.Decoder` in its methods, made by `VllmEngine.decoder`.

    Log-probs are of the distribution that was sampled from; greedily, of the one at temperature 1.
    """

    def __init__(
        self,
        engine: RequestEngine,
        lora: Any,
        slots: int,
        *,
        temperature: float,
        greedy: bool,
        logprobs: bool,
    ) -> None:
        self._vllm, self._lora = engine, lora
        self._temperature, self._greedy, self._with_logprobs = temperature, greedy, logprobs
        self._rows = [Row(slot) for slot in range(slots)]
        self._asked: dict[str, Row] = {}
        self.writing = np.zeros(slots, dtype=bool)

    def prefill(self, slots: Sequence[int], chunks: Sequence[list[int]]) -> None:
        """Adds `chunks` to what these rows hold. vLLM reads them when the turn after them begins."""
        for slot, chunk in zip(slots, chunks, strict=True):
            self._rows[slot].text += chunk

    def share(self, source: int, target: int, length: int) -> None:
        """Gives a row the first `length` tokens of another."""
        self._rows[target].text = self._rows[source].text[:length]

    def move(self, source: int, target: int) -> None:
        """Moves a row to another slot."""
        row = self._rows[target] = self._rows[source]
        row.slot, self._rows[source] = target, Row(source)
        self.writing[target], self.writing[source] = self.writing[source], False

    def release(self, slot: int) -> None:
        """Frees a row."""
        self._rows[slot], self.writing[slot] = Row(slot), False

    def begin(self, slot: int, token: int, budget: int, stream: UniformStream | None) -> None:
        """Begins a turn behind `token`: a request of its own."""
        row = self._rows[slot]
        row.text.append(token)
        row.turn, row.state, row.budget = SampledTurn(), 0, budget
        seed = None if self._greedy or stream is None else derive_seed(stream.seed, "turn", len(row.text))
        settings = sampling(
            budget, self._vllm.ends, temperature=self._temperature, seed=seed, logprobs=self._with_logprobs
        )
        row.request = self._vllm.ask(row.text, settings, self._lora)
        self._asked[row.request] = row
        self.writing[slot] = True

    def written(self, slot: int) -> list[int]:
        """What the last step wrote in a row: nothing where its text was still being read."""
        return self._rows[slot].fresh

    def step(self) -> list[tuple[int, SampledTurn]]:
        """One step of vLLM's; gives the rows whose turn it ended, with their turns."""
        for row in self._rows:
            row.fresh = []
        results, cut = [], []
        for name, ids, logprobs, finished in self._vllm.step():
            row = self._asked[name]
            over = take(row, ids, logprobs, self._vllm.automaton, self._vllm.ends)
            if not (over or finished):
                continue
            if not finished:
                cut.append(name)
            del self._asked[name]
            row.text += row.turn.ids[:-1]  # the last one comes with what is read next, as with `Decoder`
            self.writing[row.slot] = False
            results.append((row.slot, row.turn))
        self._vllm.abort(cut)
        return results

    def rows_for(self, rows: int) -> int:
        """All are the same to vLLM."""
        return len(self._rows)

    def close(self) -> None:
        """The rollout is over, or broke off."""
        self._vllm.abort(list(self._asked))
        self._asked = {}
        self._vllm.sleep()
