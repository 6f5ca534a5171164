"""One question, one answer, reported as it develops, with the searches that led to it and the passages that hold it."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from searche1_lite.data.trajectory import Passage, Question, Search, Stopped, Trajectory
from searche1_lite.policy.adapter import load_adapter_weights, use_adapter
from searche1_lite.policy.engine import SampledTurn
from searche1_lite.policy.stopping import end_ids
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action, Protocol, check_question
from searche1_lite.rollout.scheduler import Hooks, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.serve.sources import Source, find_sources
from searche1_lite.train.session import Session


@dataclass(frozen=True, slots=True)
class Wrote:
    """The policy wrote `text`, after what it wrote before. Only whole characters are told."""

    text: str


@dataclass(frozen=True, slots=True)
class Searched:
    """What the policy wrote last asks for a search."""

    query: str


@dataclass(frozen=True, slots=True)
class Found:
    """What that search has found."""

    query: str
    passages: list[Passage]


@dataclass(frozen=True, slots=True)
class Told:
    """The environment said something else: that a turn was neither search nor answer, or that no searches are left."""

    text: str


Event = Wrote | Searched | Found | Told


@dataclass(frozen=True, slots=True)
class AskSettings:
    """How questions are answered; a session may change it from one to the next."""

    k: int
    """Passages a search."""
    max_searches: int
    temperature: float = 0.0
    """0: greedily."""
    seed: int = 0
    """Counts where the temperature is not 0."""


@dataclass(slots=True)
class Answer:
    """What became of one question."""

    question: str
    answer: str | None
    """None if the policy gave none."""
    searches: list[Search]
    sources: list[Source]
    """The passages whose text holds the answer: see `find_sources`."""
    text: str
    """All that the policy wrote."""
    tokens: int
    """How many it wrote."""
    seconds: float
    """Of questions answered side by side, each one's share."""
    stopped: Stopped | Literal["refused"]
    """Why it ended: see `Trajectory.stopped`; `refused`: the question could not be put to the policy."""
    error: str | None = None
    """Why it was refused."""
    events: list[Event] = field(default_factory=list)
    """All events, in order, if there was a listener; what was written at a stretch is one event."""

    @property
    def answered(self) -> bool:
        """An empty answer is none."""
        return self.answer is not None and bool(self.answer.strip())

    def why_not(self, settings: AskSettings) -> str:
        """In words, why there is no answer."""
        return {
            "answer": "what it gave as the answer is empty",
            "end": "the model ended its message without one",
            "turn_budget": f"it used up its searches (max_searches={settings.max_searches}) and asked for more"
            if len(self.searches) >= settings.max_searches
            else "it wrote what is neither a search nor an answer too often (protocol.max_invalid_turns)",
            "token_budget": "its tokens ran out (protocol.max_completion_tokens)",
            "refused": self.error or "the question was refused",
        }[self.stopped]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `ask --json`; `error` only where there is one."""
        record = asdict(replace(self, events=[], searches=[]))
        del record["events"]
        record["searches"] = [search.to_dict() for search in self.searches]
        if self.error is None:
            del record["error"]
        return record | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same question, answered by the bare base and with the adapter on it."""

    base: Answer
    adapter: Answer

    @property
    def answered(self) -> bool:
        """With the adapter."""
        return self.adapter.answered

    def to_dict(self) -> dict[str, Any]:
        """`{"question", "base", "adapter"}`, both as `Answer.to_dict` gives them."""
        return {"question": self.base.question, "base": self.base.to_dict(), "adapter": self.adapter.to_dict()}


class Asker:
    """Answers questions with one policy in memory. May be called from any thread; one question waits for the other.

    Args:
        work: model, search engine and settings. Its policy answers as it stands.
        adapter: where its adapter was loaded from, if it was.
    """

    def __init__(self, work: Session, adapter: Path | None = None) -> None:
        self.work, self.adapter = work, adapter
        self.settings = AskSettings(work.config.search.k, work.config.protocol.max_searches, seed=work.config.seed)
        self._bare = False
        self._protocol = work.protocol
        self._ends = end_ids(work.model, work.tokenizer)
        self._busy = threading.RLock()

    def answer(
        self,
        question: str,
        on_event: Callable[[Event], None] | None = None,
        *,
        bare: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Answer:
        """Answers one question.

        Args:
            on_event: receives each event. What it raises stops the answer and is passed on; the next
                question finds everything as it was.
            bare: without the adapter.
            check: called between tokens and while a search is waited for; what it raises stops the answer too.

        Raises:
            UserError: for an empty question or one that exceeds the prompt budget.
        """
        with self._busy:
            question = check_question(question, self._protocol.config)
            prompt = self._protocol.prompt_ids(question)
            events: list[Event] = []

            def tell(event: Event) -> None:
                if events and isinstance(event, Wrote) and isinstance(events[-1], Wrote):
                    events[-1] = Wrote(events[-1].text + event.text)
                else:
                    events.append(event)
                if on_event is not None:
                    on_event(event)

            began = time.monotonic()
            episode = partial(_WatchedEpisode, tell, self._ends)
            watched = {"episode": episode, "on_token": _WatchedEpisode.wrote, "check": check}
            (trajectory,) = self._roll([question], [prompt], bare, **watched)
            return _answer(question, trajectory, time.monotonic() - began, events)

    def answers(self, questions: Sequence[str], *, bare: bool = False) -> list[Answer]:
        """Answers questions side by side, each as `answer` does, without events; those it would not take are refused.

        To the precision of the arithmetic a question's answer does not depend on the others.
        """
        with self._busy:
            results: list[Answer | None] = []
            taken: list[tuple[int, str, list[int]]] = []
            for place, question in enumerate(questions):
                try:
                    question = check_question(question, self._protocol.config)
                    taken.append((place, question, self._protocol.prompt_ids(question)))
                    results.append(None)
                except UserError as error:
                    results.append(Answer(question[:1000], None, [], [], "", 0, 0.0, "refused", str(error)))
            began = time.monotonic()
            trajectories = self._roll([q for _, q, _ in taken], [p for _, _, p in taken], bare)
            seconds = (time.monotonic() - began) / max(1, len(taken))
            for (place, question, _), trajectory in zip(taken, trajectories, strict=True):
                results[place] = _answer(question, trajectory, seconds, [])
            return [result for result in results if result is not None]

    def compare(self, question: str, on_event: Callable[[Event], None] | None = None) -> Comparison:
        """The same question to the bare base and with the adapter: one model, the adapter switched off and on.

        Raises:
            UserError: as `answer`; and if no adapter is on.
        """
        with self._busy:
            self.check_comparable()
            base = self.answer(question, on_event, bare=True)
            return Comparison(base, self.answer(question, on_event))

    def compare_all(self, questions: Sequence[str]) -> list[Comparison]:
        """`compare` of questions side by side."""
        with self._busy:
            self.check_comparable()
            pairs = zip(self.answers(questions, bare=True), self.answers(questions), strict=True)
            return [Comparison(base, adapter) for base, adapter in pairs]

    def check_comparable(self) -> None:
        if self.adapter is None:
            raise UserError("there is nothing to compare the base with: no adapter is on; give one")

    def use(self, adapter: Path | None) -> None:
        """Switches to another adapter's weights, in place; None: to the bare base.

        Raises:
            UserError: if the folder holds no adapter or one that does not fit; what was on stays on.
        """
        with self._busy:
            if adapter is not None:
                load_adapter_weights(self.work.model, adapter)
            self.adapter, self._bare = adapter, adapter is None

    def set(self, name: str, value: str) -> None:
        """Changes one of `AskSettings`, for the questions to come.

        Raises:
            UserError: for an unknown name or an impossible value.
        """
        with self._busy:
            self.settings = changed_settings(self.settings, name, value)
            if self._protocol.config.max_searches != self.settings.max_searches:
                limits = replace(self.work.protocol.config, max_searches=self.settings.max_searches)
                self._protocol = Protocol(self.work.tokenizer, limits)

    def _roll(
        self, questions: Sequence[str], prompts: Sequence[list[int]], bare: bool, **watched: Any
    ) -> list[Trajectory]:
        work, settings = self.work, self.settings
        greedy = settings.temperature == 0
        with use_adapter(work.model, None) if bare or self._bare else nullcontext():
            agent = replace(
                work.agent,
                protocol=self._protocol,
                engine=work.engine if greedy else replace(work.engine, temperature=settings.temperature),
                k=settings.k,
                slots=None,
            )
            return rollout(
                agent,
                # One id for all: an answer depends on seed and question, not on the questions beside it.
                [Question("question", question, [""]) for question in questions],
                1,
                Sampling((settings.seed, "ask"), greedy),
                prompts=prompts,
                hooks=Hooks(**watched),
            )


class _WatchedEpisode(Episode):
    """An episode that tells what happens in it."""

    def __init__(self, tell: Callable[[Event], None], ends: frozenset[int], *rules: Any) -> None:
        super().__init__(*rules)
        self._tell, self._ends = tell, ends
        self._stream = DecodeStream(skip_special_tokens=False)

    def wrote(self, token: int) -> None:
        if token not in self._ends:
            text = self._stream.step(self.protocol.tokenizer.backend_tokenizer, token)
            if text:  # not yet within a character of several tokens
                self._tell(Wrote(text))

    def take_turn(self, sampled: SampledTurn) -> Action:
        action = super().take_turn(sampled)
        self._stream = DecodeStream(skip_special_tokens=False)
        if action.kind == "search" and self.may_search:
            self._tell(Searched(action.content))
        return action

    def react(self, action: Action, sampled: SampledTurn, passages: list[Passage] | None) -> list[int]:
        ids = super().react(action, sampled, passages)
        said = ids
        if passages is not None:
            self._tell(Found(action.content, passages))
            said = ids[len(self.protocol.information_ids(passages)) :]
        if text := self.protocol.tokenizer.decode(said, skip_special_tokens=False).strip():
            self._tell(Told(text))
        return ids


def _answer(question: str, trajectory: Trajectory, seconds: float, events: list[Event]) -> Answer:
    return Answer(
        question,
        trajectory.answer,
        trajectory.searches,
        find_sources(trajectory.answer, trajectory.searches),
        "\n".join(turn.text for turn in trajectory.turns),
        trajectory.n_model_tokens,
        seconds,
        trajectory.stopped,
        events=events,
    )


_LIMITS: dict[str, tuple[type, float, float, str]] = {
    "k": (int, 1, 100, "a whole number from 1 to 100"),
    "max_searches": (int, 0, 100, "a whole number from 0 to 100"),
    "temperature": (float, 0.01, 100, "0 (greedy), or a number from 0.01 to 100"),
    "seed": (int, -math.inf, math.inf, "a whole number"),
}


def changed_settings(settings: AskSettings, name: str, value: str) -> AskSettings:
    """`settings` with one of them changed; see `Asker.set` for the errors."""
    if name not in _LIMITS:
        raise UserError(f"there is no setting {name!r}; there are: {', '.join(_LIMITS)}")
    kind, least, most, form = _LIMITS[name]
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not (least <= number <= most or (name == "temperature" and number == 0)):
        raise UserError(f"{name}={value} is impossible; give {form}")
    return replace(settings, **{name: number})
