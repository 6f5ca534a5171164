"""Many episodes side by side: the policy writes, searches, reads the passages, and answers.

A thread searches while other episodes go on writing. On a CPU, passages are read a fixed number of steps after their
search, never depending on its speed, so that a run is reproducible bit for bit.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import EngineConfig
from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.policy.engine import Decoder, RolloutDecoder, SampledTurn, UniformStream, rollout_context
from searche1_lite.policy.shrinking import Limit
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action, Protocol
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.search.base import Retriever, search_each
from searche1_lite.search.thread import SearchThread

HEAD_START = 4
"""Steps between a search and the reading of its passages on a CPU."""

_SEARCHER = SearchThread()
"""The only thread that searches: Java keeps a record of every thread that ever called it, and a retriever need not be
thread-safe."""


@dataclass
class RolloutTimes:
    """Seconds spent in rollouts, by part, added up over calls."""

    total: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    search_wait: float = 0.0
    """While every episode waited for passages."""
    search: float = 0.0
    """While the retriever worked, beside the rest or alone."""
    decode_steps: int = 0
    prefill_tokens: int = 0


@dataclass(slots=True)
class Agent:
    """A policy that searches: the model with its adapter, the search engine, and the protocol between them."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    retriever: Retriever
    protocol: Protocol
    engine: EngineConfig
    k: int
    """Passages a search."""
    slots: Limit | None = None
    """In place of `engine.batch_size`: lowered when memory runs out, and unfinished episodes are played again. None:
    the error is the caller's."""
    decoder: Callable[..., RolloutDecoder] = Decoder
    """Makes the decoder; `VllmEngine.decoder` for vLLM's."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. An episode's seed is `derive_seed(*seed_parts, question.id, sample)`."""

    seed_parts: Sequence[int | str]
    greedy: bool = False
    logprobs: bool = False
    """Keep the log-probs of the sampled tokens."""


@dataclass(slots=True)
class Hooks:
    """What is called while episodes are played. An exception ends the rollout; nothing of it is kept."""

    on_progress: Callable[[int], None] | None = None
    """Receives the number of episodes finished since its last call."""
    on_token: Callable[[Episode, int], None] | None = None
    """Receives each token as the policy writes it."""
    check: Callable[[], None] | None = None
    """Called before each step, and while waiting for passages."""
    episode: Callable[..., Episode] = Episode
    """Makes an episode; replaced by scripted episodes in benchmarks."""
    times: RolloutTimes = field(default_factory=RolloutTimes)
    """Where the time spent is added up."""


@torch.inference_mode()
def rollout(
    agent: Agent,
    questions: Sequence[Question],
    n: int,
    sampling: Sampling,
    *,
    prompts: Sequence[list[int]] | None = None,
    hooks: Hooks | None = None,
) -> list[Trajectory]:
    """`n` fresh episodes for each question, question by question.

    A trajectory depends on its own seed, not on the batch it is in (to the precision of the arithmetic: in bf16 a GPU's
    kernels may round differently for another batch shape).

    Args:
        prompts: token ids of each question's prompt; default: the plain prompt.

    Raises:
        UserError: with `agent.slots`, if a single episode does not fit into memory.
    """
    model, protocol, hooks = agent.model, agent.protocol, hooks or Hooks()
    began = time.perf_counter()
    room = protocol.config.max_completion_tokens
    longest = usual = protocol.config.max_prompt_tokens
    if prompts is None:
        prompts = [protocol.prompt_ids(question.question) for question in questions]
    else:
        longest = max(usual, max(map(len, prompts), default=0))
    seats: list[Seat | None] = [None] * (len(questions) * n)
    if not seats:
        return []

    def rows_for(size: int) -> int:
        """Rows that take the memory of `size` usual ones: fewer where prompts are longer, as with a reference shown."""
        return min(len(seats), max(1, size * (usual + room) // (longest + room)))

    def fill_seats() -> list[Seat]:
        """A fresh episode for every one that is not over."""
        for place, seat in enumerate(seats):
            if seat is None or not seat.episode.over:
                group, sample = divmod(place, n)
                question = questions[group]
                seed = derive_seed(*sampling.seed_parts, question.id, sample)
                stream = None if sampling.greedy else UniformStream(seed)
                episode = hooks.episode(question, sample, prompts[group], protocol, sampling.logprobs)
                seats[place] = Seat(episode, stream, group)
        return [seat for seat in seats if seat is not None]

    cpu = model.device.type == "cpu"

    def play(size: int) -> list[Seat]:
        filled = fill_seats()
        rows = rows_for(size)
        with rollout_context(model, agent.engine, rows):
            decoder = agent.decoder(
                model,
                agent.tokenizer,
                rows,
                max(map(len, prompts)) + room,
                temperature=agent.engine.temperature,
                greedy=sampling.greedy,
                logprobs=sampling.logprobs,
            )
            waiting = [seat for seat in filled if not seat.episode.over]
            try:
                Play(decoder, agent.retriever, agent.k, rows, cpu, hooks).run(waiting)
            finally:
                decoder.close()
        return filled

    was_training = model.training
    model.eval()
    try:
        if agent.slots is None:
            played = play(agent.engine.batch_size)
        else:
            played = agent.slots.until_it_fits(
                play,
                lambda size: _fewer(size, rows_for),
                "rollouts",
                "one episode by itself is too much; lower protocol.max_completion_tokens",
            )
    finally:
        model.train(was_training)
        if not cpu:
            torch.cuda.empty_cache()
    trajectories = [seat.episode.finish() for seat in played]
    hooks.times.total += time.perf_counter() - began
    return trajectories


def _fewer(size: int, rows_for: Callable[[int], int]) -> int | None:
    """The largest half, quarter, ... of `size` that has at most half as many rows; None for one row."""
    rows = rows_for(size)
    while rows > 1 and rows_for(size) > max(1, rows // 2):
        size = size // 2
    return size if rows > 1 else None


@dataclass(slots=True, eq=False)
class Seat:
    """An episode and the slot it has, if it has one."""

    episode: Episode
    stream: UniformStream | None
    group: int
    """Its question's index: episodes of one group share a prompt."""
    slot: int = -1


@dataclass(slots=True)
class _Asked:
    """The pending searches of one step."""

    turns: list[tuple[Seat, Action, SampledTurn]]
    found: "Future[list[list[Passage]]]"
    step: int


class Play:
    """Plays episodes in the decoder's slots.

    Prompts and replies are prefilled for many rows at a time: when an eighth of the active episodes has something to
    read, or when none can write.
    """

    def __init__(
        self,
        decoder: RolloutDecoder,
        retriever: Retriever,
        k: int,
        rows: int,
        in_step: bool,
        hooks: Hooks,
        searcher: Executor = _SEARCHER,
    ) -> None:
        self._decoder, self._retriever, self._k = decoder, retriever, k
        self._in_step, self._searcher, self._times = in_step, searcher, hooks.times
        self._check, self._on_progress, self._on_token = hooks.check, hooks.on_progress, hooks.on_token
        self._at: list[Seat | None] = [None] * rows
        self._step = self._over = 0
        self._queue: deque[Seat] = deque()
        self._asked: deque[_Asked] = deque()
        self._replies: list[tuple[Seat, list[int]]] = []

    def run(self, seats: Sequence[Seat]) -> None:
        self._queue.extend(seats)
        try:
            while self._queue or any(self._at):
                if self._check is not None:
                    self._check()
                self._go_on()
        finally:
            for asked in self._asked:
                asked.found.cancel()
            self._report()  # episodes finished before an error are not played again

    def _go_on(self) -> None:
        """Reads, if enough episodes have something to read, and writes one token."""
        writing = bool(self._decoder.writing.any())
        free = min(self._at.count(None), len(self._queue))
        arrived = [asked for asked in self._asked if self._has_arrived(asked)]
        ready = len(self._replies) + free + sum(len(asked.turns) for asked in arrived)
        quorum = max(1, (len(self._at) - self._at.count(None)) // 8)
        if ready >= quorum or not writing:
            if not (writing or ready):
                arrived = list(self._asked)[: None if self._in_step else 1]
            self._take_up(arrived)
            self._read()
        if self._decoder.writing.any():
            self._write()
        if not self._queue:
            self._compact()
        self._report()

    def _report(self) -> None:
        over, self._over = self._over, 0
        if over and self._on_progress is not None:
            self._on_progress(over)

    def _has_arrived(self, asked: _Asked) -> bool:
        return self._step - asked.step >= HEAD_START if self._in_step else asked.found.done()

    def _take_up(self, arrived: Sequence[_Asked]) -> None:
        """Turns passages into replies."""
        for asked in arrived:
            with self._clock("search_wait"):
                found = self._wait_for(asked.found)
            self._asked.remove(asked)
            for (seat, action, turn), passages in zip(asked.turns, found, strict=True):
                self._reply(seat, action, turn, passages)

    def _wait_for(self, found: "Future[list[list[Passage]]]") -> list[list[Passage]]:
        """The search's result; `check` may interrupt the wait."""
        while self._check is not None and wait([found], timeout=1.0).not_done:
            self._check()
        return found.result()

    def _read(self) -> None:
        """Gives free slots to new episodes, and prefills their prompts and all replies."""
        chunks: dict[Seat, list[int]] = {}
        shared: list[tuple[Seat, Seat]] = []
        first = {seat.group: seat for seat in self._at if seat is not None}
        fresh: list[Seat] = []
        for slot in [slot for slot, seat in enumerate(self._at) if seat is None][: len(self._queue)]:
            seat = self._queue.popleft()
            seat.slot, self._at[slot] = slot, seat
            fresh.append(seat)
            if (sibling := first.setdefault(seat.group, seat)) is seat:
                chunks[seat] = seat.episode.trajectory.prompt_ids[:-1]
            else:
                shared.append((sibling, seat))
        for seat, ids in self._replies:
            chunks[seat] = ids[:-1]
        with self._clock("prefill"):
            self._decoder.prefill([seat.slot for seat in chunks], list(chunks.values()))
            for sibling, seat in shared:
                self._decoder.share(sibling.slot, seat.slot, len(seat.episode.trajectory.prompt_ids) - 1)
        self._times.prefill_tokens += sum(map(len, chunks.values()))
        # The last id of a text is fed by the step that samples the first token after it.
        for seat, ids in [(seat, seat.episode.trajectory.prompt_ids) for seat in fresh] + self._replies:
            self._decoder.begin(seat.slot, ids[-1], seat.episode.budget, seat.stream)
        self._replies = []

    def _write(self) -> None:
        """One token for each writing row, and the actions of the turns it ended."""
        writing = self._decoder.writing.nonzero()[0].tolist() if self._on_token else []
        with self._clock("decode"):
            ended = self._decoder.step()
        for slot in writing:
            for token in self._decoder.written(slot):
                self._on_token(self._at[slot].episode, token)  # type: ignore[misc, union-attr]
        self._step += 1
        self._times.decode_steps += 1
        searches: list[tuple[Seat, Action, SampledTurn]] = []
        for slot, turn in ended:
            seat = self._at[slot]
            assert seat is not None
            action = seat.episode.take_turn(turn)
            if action.kind == "search" and seat.episode.may_search:
                searches.append((seat, action, turn))
            else:
                self._reply(seat, action, turn, None)
        if searches:
            queries = [action.content for _, action, _ in searches]
            found = self._searcher.submit(_search, self._retriever, queries, self._k, self._times)
            self._asked.append(_Asked(searches, found, self._step))

    def _reply(self, seat: Seat, action: Action, turn: SampledTurn, passages: list[Passage] | None) -> None:
        """Lets the environment react; a finished episode releases its slot."""
        ids = seat.episode.react(action, turn, passages)
        if seat.episode.over:
            self._decoder.release(seat.slot)
            self._at[seat.slot] = None
            self._over += 1
        else:
            self._replies.append((seat, turn.ids[-1:] + ids))

    def _compact(self) -> None:
        """Moves the last rows into free slots where steps then need fewer rows."""
        taken = [seat for seat in self._at if seat is not None]
        if not taken or self._decoder.rows_for(len(taken)) == self._decoder.rows_for(taken[-1].slot + 1):
            return
        for slot, seat in enumerate(self._at[: len(taken)]):
            if seat is None:
                last = taken.pop()
                self._decoder.move(last.slot, slot)
                self._at[last.slot], self._at[slot] = None, last
                last.slot = slot

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self._times, part, getattr(self._times, part) + time.perf_counter() - began)


def _search(retriever: Retriever, queries: list[str], k: int, times: RolloutTimes) -> list[list[Passage]]:
    """Runs in the search thread; keeps no reference to the rollout."""
    began = time.perf_counter()
    try:
        return search_each(retriever, queries, k)
    finally:
        times.search += time.perf_counter() - began
