"""Episodes: the policy writes, searches when it asks to, reads what comes back, and answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import EngineConfig
from searche1_lite.engine import Decoder, SampledTurn, UniformStream
from searche1_lite.model import compute_context
from searche1_lite.protocol import Action, Protocol, parse_turn
from searche1_lite.reward import exact_match, extract_answer, f1_score
from searche1_lite.search.base import Passage, Retriever
from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Question, Search, Stopped, Trajectory, Turn


@dataclass
class RolloutTimes:
    """Seconds that rollouts spent, by part, added up over calls."""

    total: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    search_wait: float = 0.0
    """In which nothing was computed because every episode waited for its passages."""
    search: float = 0.0
    """In which the retriever was at work, beside the rest or alone."""
    decode_steps: int = 0
    prefill_tokens: int = 0


class Episode:
    """One episode in the making: what the environment does with each turn that the policy writes."""

    def __init__(self, question: Question, sample: int, prompt_ids: list[int], protocol: Protocol) -> None:
        self.trajectory = Trajectory(question, sample, prompt_ids, [], [], [], [], "end", logprobs=[])
        self.protocol = protocol
        self.limits = protocol.config
        self.over = False
        self._told_no_more = False
        self._environment_ids: list[int] = []
        """Environment text that is stored once the policy has something to write after it."""

    @property
    def budget(self) -> int:
        """Tokens the policy may write in its next turn; the environment text before it is counted."""
        used = len(self.trajectory.completion_ids) + len(self._environment_ids)
        return min(self.limits.max_turn_tokens, self.limits.max_completion_tokens - used)

    def take_turn(self, sampled: SampledTurn) -> Action:
        """Stores the environment's text that was pending and what the policy wrote after it."""
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
        assert self.trajectory.logprobs is not None
        self.trajectory.logprobs += logprobs

    def react(self, action: Action, sampled: SampledTurn, passages: list[Passage] | None) -> list[int]:
        """The environment's reply as ids; empty when the episode is over."""
        if action.kind == "answer":
            return self._end("answer")
        if action.kind == "search":
            if passages is None:  # asked for more than allowed
                if self._told_no_more_twice():
                    return self._end("turn_budget")
                return self._reply(self.protocol.no_more_searches_ids())
            self.trajectory.searches.append(Search(action.content, passages))
            ids = self.protocol.information_ids(passages)
            if self.trajectory.n_searches == self.limits.max_searches:
                ids = ids + self.protocol.no_more_searches_ids()
            return self._reply(ids)
        if self.budget < 1:
            return self._end("token_budget")
        if self.trajectory.n_invalid > self.limits.max_invalid_turns:
            return self._end("end" if sampled.ended == "eos" else "turn_budget")
        return self._reply(self.protocol.correction_ids())

    def _told_no_more_twice(self) -> bool:
        told, self._told_no_more = self._told_no_more, True
        return told

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


@torch.inference_mode()
def rollout(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    retriever: Retriever,
    protocol: Protocol,
    questions: Sequence[Question],
    n: int,
    *,
    engine: EngineConfig,
    k: int,
    seed_parts: Sequence[int | str],
    greedy: bool = False,
    prompts: Sequence[list[int]] | None = None,
    on_progress: Callable[[int], None] | None = None,
    episode: type[Episode] = Episode,
    times: RolloutTimes | None = None,
) -> list[Trajectory]:
    """`n` fresh episodes for each question, question by question.

    A trajectory depends on its own seed, `derive_seed(*seed_parts, question.id, sample)`, not on the batch it is in (to
    the precision of the arithmetic: in bf16 a GPU's kernels may round otherwise for another batch shape).

    Args:
        model: the policy with the adapter to act with active; its train/eval mode is put back afterwards.
        k: passages a search.
        prompts: token ids of each question's prompt; default: the plain one.
        on_progress: told the number of episodes finished since it was last called.
        episode: the rules of an episode, to be replaced where a benchmark writes the script.
        times: where the time spent is added up, by part.
    """
    was_training = model.training
    model.eval()
    finished: list[Trajectory] = []
    rows = engine.batch_size
    if prompts is not None:
        # Longer prompts than usual, such as those that show a reference: fewer rows, for the same size of KV cache.
        usual, room = protocol.config.max_prompt_tokens, protocol.config.max_completion_tokens
        longest = max((len(prompt) for prompt in prompts), default=0)
        rows = rows * (usual + room) // (max(usual, longest) + room)
    per_batch = max(1, rows // n)
    try:
        for first in range(0, len(questions), per_batch):
            batch = questions[first : first + per_batch]
            if prompts is None:
                batch_prompts = [protocol.prompt_ids(question.question) for question in batch]
            else:
                batch_prompts = list(prompts[first : first + per_batch])
            episodes = [
                episode(question, sample, prompt, protocol)
                for question, prompt in zip(batch, batch_prompts, strict=True)
                for sample in range(n)
            ]
            streams = None
            if not greedy:
                streams = [
                    UniformStream(derive_seed(*seed_parts, e.trajectory.question.id, e.trajectory.sample))
                    for e in episodes
                ]
            with compute_context(model):
                _play(
                    Decoder(model, tokenizer, batch_prompts, n),
                    retriever,
                    episodes,
                    streams,
                    engine.temperature,
                    k,
                    on_progress,
                )
            finished += [one.finish() for one in episodes]
    finally:
        model.train(was_training)
    return finished


def _play(
    decoder: Decoder,
    retriever: Retriever,
    episodes: Sequence[Episode],
    streams: Sequence[UniformStream] | None,
    temperature: float,
    k: int,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Plays episodes turn by turn; all searches of a turn go to the retriever as one batch."""
    rows = list(range(len(episodes)))
    while rows:
        row_streams = [streams[row] for row in rows] if streams is not None else None
        sampled = decoder.sample_turn([episodes[row].budget for row in rows], temperature, row_streams)
        actions = [episodes[row].take_turn(turn) for row, turn in zip(rows, sampled, strict=True)]
        asking = [
            position
            for position, (row, action) in enumerate(zip(rows, actions, strict=True))
            if action.kind == "search" and episodes[row].trajectory.n_searches < episodes[row].limits.max_searches
        ]
        found = retriever.search([actions[position].content for position in asking], k) if asking else []
        passages = dict(zip(asking, found, strict=True))
        replies = [
            episodes[row].react(actions[position], sampled[position], passages.get(position))
            for position, row in enumerate(rows)
        ]
        going_on = [position for position, row in enumerate(rows) if not episodes[row].over]
        if on_progress is not None and len(going_on) < len(rows):
            on_progress(len(rows) - len(going_on))
        if not going_on:
            return
        if len(going_on) < len(rows):
            decoder.keep(going_on)
        decoder.append([replies[position] for position in going_on])
        rows = [rows[position] for position in going_on]
