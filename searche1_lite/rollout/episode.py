"""The environment's part of an episode, turn by turn."""

from searche1_lite.data.trajectory import Passage, Question, Search, Stopped, Trajectory, Turn
from searche1_lite.policy.engine import SampledTurn
from searche1_lite.rollout.protocol import Action, Protocol, parse_turn
from searche1_lite.rollout.reward import exact_match, extract_answer, f1_score


class Episode:
    """An episode in progress: how the environment reacts to each turn that the policy writes."""

    def __init__(
        self, question: Question, sample: int, prompt_ids: list[int], protocol: Protocol, logprobs: bool = False
    ) -> None:
        kept: list[float] | None = [] if logprobs else None
        self.trajectory = Trajectory(question, sample, prompt_ids, [], [], [], [], "end", logprobs=kept)
        self.protocol = protocol
        self.limits = protocol.config
        self.over = False
        self._refused_a_search = False
        self._environment_ids: list[int] = []
        """Environment text that is stored once the policy writes after it."""

    @property
    def budget(self) -> int:
        """Tokens that the policy may write in its next turn."""
        used = len(self.trajectory.completion_ids) + len(self._environment_ids)
        return min(self.limits.max_turn_tokens, self.limits.max_completion_tokens - used)

    @property
    def may_search(self) -> bool:
        return self.trajectory.n_searches < self.limits.max_searches

    def take_turn(self, sampled: SampledTurn) -> Action:
        """Stores the pending environment text and the turn after it."""
        record = self.trajectory
        self._store(self._environment_ids, [0.0] * len(self._environment_ids), by_model=False)
        self._environment_ids = []
        start = len(record.completion_ids)
        self._store(sampled.ids, sampled.logprobs, by_model=True)
        written = sampled.ids[:-1] if sampled.ended == "eos" else sampled.ids
        text = self.protocol.tokenizer.decode(written, skip_special_tokens=False)
        action = parse_turn(text) if sampled.ended == "tag" else Action("invalid")
        record.turns.append(Turn(action.kind, start, len(record.completion_ids), text))
        return action

    def _store(self, ids: list[int], logprobs: list[float], by_model: bool) -> None:
        self.trajectory.completion_ids += ids
        self.trajectory.loss_mask += [int(by_model)] * len(ids)
        if self.trajectory.logprobs is not None:
            self.trajectory.logprobs += logprobs

    def react(self, action: Action, sampled: SampledTurn, passages: list[Passage] | None) -> list[int]:
        """The environment's reply as ids; empty when the episode is over."""
        if action.kind == "answer":
            return self._end("answer")
        if action.kind == "search":
            if passages is None:  # more searches than allowed
                if self._refused_a_search:
                    return self._end("turn_budget")
                self._refused_a_search = True
                return self._reply(self.protocol.no_more_searches_ids())
            self.trajectory.searches.append(Search.of(action.content, passages))
            ids = self.protocol.information_ids(passages)
            if self.trajectory.n_searches == self.limits.max_searches:
                ids = ids + self.protocol.no_more_searches_ids()
            return self._reply(ids)
        if self.budget < 1:
            return self._end("token_budget")
        if self.trajectory.n_invalid > self.limits.max_invalid_turns:
            return self._end("end" if sampled.ended == "eos" else "turn_budget")
        return self._reply(self.protocol.correction_ids())

    def _reply(self, ids: list[int]) -> list[int]:
        self._environment_ids = ids
        return ids if self.budget >= 1 else self._end("token_budget")

    def _end(self, stopped: Stopped) -> list[int]:
        self.over = True
        self._environment_ids = []
        self.trajectory.stopped = stopped
        return []

    def finish(self) -> Trajectory:
        record, golds = self.trajectory, self.trajectory.question.golden_answers
        record.answer = extract_answer([turn.text for turn in record.turns])
        record.reward = exact_match(record.answer, golds)
        record.f1 = f1_score(record.answer, golds)
        return record
