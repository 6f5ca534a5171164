"""The loops that `bench` holds the engine against. Both play the same `Episode`s, so rules and budgets are the same.

`reprefill_rollouts` is what one writes first: generate with transformers until every row closes a tag, search, append,
and generate again from the whole text.

`ToolLoop` is TRL's `GRPOTrainer` with a tool. TRL's own are `_generate` and all it calls: the padding, each
`model.generate`, the cut after the first end, `_tool_call_loop` with its one tool call after another, the prefill of
the whole text of the rows that called, and its limits. Ours are three hooks that make it speak our protocol, where TRL
would use a chat template: the prompt's ids (`_tokenize_prompts`), whether a turn calls a tool (`parse_response`), and
the ids of what the environment says (`_get_tool_suffix_ids`).

A turn ends at a closing tag's id. So each of these tags must be one token, as in the tokenizers that `bench` uses.
"""

import copy
import tempfile
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.policy.adapter import keep_adapter_fp32
from searche1_lite.policy.engine import SampledTurn
from searche1_lite.policy.model import compute_context, compute_dtype
from searche1_lite.policy.stopping import STOP_TAGS, end_ids
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action, Protocol
from searche1_lite.search.base import Retriever, search_each


def stop_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a turn: those that end a message, and the closing tags.

    Raises:
        ValueError: if a closing tag is not one token.
    """
    tags = [tokenizer.encode(tag, add_special_tokens=False) for tag in STOP_TAGS]
    if any(len(ids) != 1 for ids in tags):
        raise ValueError(f"the tokenizer splits {' or '.join(STOP_TAGS)}; the baselines need one token for each")
    return sorted(end_ids(model, tokenizer) | {index for ids in tags for index in ids})


def new_episodes(episode: type[Episode], questions: Sequence[Question], n: int, protocol: Protocol) -> list[Episode]:
    """`n` episodes a question, question by question, as `rollout` makes them."""
    prompts = [protocol.prompt_ids(question.question) for question in questions]
    return [
        episode(question, sample, prompt, protocol)
        for question, prompt in zip(questions, prompts, strict=True)
        for sample in range(n)
    ]


def cut_turn(ids: Sequence[int], budget: int, stops: Sequence[int], ends: frozenset[int]) -> SampledTurn:
    """The turn in what a row wrote: up to its first stop or its budget. No log-probs: `generate` keeps none."""
    length = min(budget, len(ids), next((at + 1 for at, index in enumerate(ids) if index in stops), len(ids)))
    turn = list(ids[:length])
    ended: Literal["tag", "eos", "budget"] = "eos" if turn[-1] in ends else "tag" if turn[-1] in stops else "budget"
    return SampledTurn(turn, [0.0] * length, ended)


def sampling(temperature: float | None) -> dict[str, Any]:
    """`generate`'s settings for the plain distribution at this temperature; None for greedy decoding."""
    if temperature is None:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


@torch.inference_mode()
def reprefill_rollouts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    retriever: Retriever,
    protocol: Protocol,
    questions: Sequence[Question],
    n: int,
    *,
    k: int,
    temperature: float | None,
    episode: type[Episode] = Episode,
) -> list[Trajectory]:
    """`n` episodes a question, all side by side; every turn begins with a prefill of the whole text so far.

    Within a turn `generate` keeps its cache. The searches of a turn are one batch.

    Args:
        temperature: of the sampling; None for greedy decoding.
    """
    assert tokenizer.pad_token_id is not None
    stops, ends = stop_ids(model, tokenizer), end_ids(model, tokenizer)
    episodes = new_episodes(episode, questions, n, protocol)
    texts = {one: list(one.trajectory.prompt_ids) for one in episodes}
    going_on = list(episodes)
    while going_on:
        width = max(len(texts[one]) for one in going_on)
        ids = torch.full((len(going_on), width), tokenizer.pad_token_id, device=model.device)
        real = torch.zeros_like(ids)
        for row, one in enumerate(going_on):
            ids[row, width - len(texts[one]) :] = torch.tensor(texts[one], device=model.device)
            real[row, width - len(texts[one]) :] = 1
        how = GenerationConfig(
            max_new_tokens=max(one.budget for one in going_on),
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
            **sampling(temperature),
        )
        with compute_context(model):
            written = model.generate(input_ids=ids, attention_mask=real, generation_config=how)[:, width:].tolist()
        turns = [cut_turn(ids, one.budget, stops, ends) for one, ids in zip(going_on, written, strict=True)]
        actions = [one.take_turn(turn) for one, turn in zip(going_on, turns, strict=True)]
        asking = [row for row, one in enumerate(going_on) if actions[row].kind == "search" and one.may_search]
        found = search_each(retriever, [actions[row].content for row in asking], k) if asking else []
        passages = dict(zip(asking, found, strict=True))
        for row, one in enumerate(going_on):
            texts[one] += turns[row].ids + one.react(actions[row], turns[row], passages.get(row))
        going_on = [one for one in going_on if not one.over]
    return [one.finish() for one in episodes]


class _Row:
    """A row of TRL's batch: its episode, its last turn, and the tools that TRL calls for it."""

    def __init__(self, episode: Episode, retriever: Retriever, k: int) -> None:
        self.episode, self._retriever, self._k = episode, retriever, k
        self.action, self.turn = Action("invalid"), SampledTurn()
        self.passages: list[Passage] | None = None

    def take(self, turn: SampledTurn) -> dict[str, Any] | None:
        """The tool call that this turn stands for; None after an answer."""
        self.turn, self.action, self.passages = turn, self.episode.take_turn(turn), None
        if self.action.kind == "answer":
            self.episode.react(self.action, turn, None)
            return None
        if self.action.kind == "search" and self.episode.may_search:
            return {"name": "search", "arguments": {"query": self.action.content}}
        return {"name": "correct", "arguments": {}}

    def search(self, query: str) -> str:
        self.passages = search_each(self._retriever, [query], self._k)[0]
        return " ".join(passage.text for passage in self.passages)

    def reply(self) -> list[int]:
        return self.episode.react(self.action, self.turn, self.passages)


def search(query: str) -> str:
    """Searches the corpus.

    Args:
        query: what to look for.

    Returns:
        The passages found.
    """
    raise NotImplementedError("each row has its own; this one is for the trainer's checks")


_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{% endfor %}"
)
"""For the checks in TRL's constructor alone: every token that is played comes from the protocol."""


class ToolLoop(GRPOTrainer):
    """TRL's trainer, for its generation alone.

    TRL names no rows to the hooks, but keeps them in order: so two queues know whose turn or reply it is.

    Args:
        temperature: of the sampling; None for greedy decoding.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        temperature: float | None,
    ) -> None:
        limits, generation = protocol.config, model.get_base_model().generation_config
        how = {"max_new_tokens": limits.max_turn_tokens, **sampling(temperature)}  # TRL's own limit is of all turns
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = _CHAT_TEMPLATE
        tokenizer.response_template = {}  # that there is one makes TRL ask `parse_response`
        tokenizer.parse_response = self._parse_turn
        ends, generation.eos_token_id = generation.eos_token_id, stop_ids(model, tokenizer)  # TRL reads them here
        try:
            with keep_adapter_fp32(model), tempfile.TemporaryDirectory() as folder:
                super().__init__(
                    model=model,
                    reward_funcs=lambda **_: [0.0],
                    args=GRPOConfig(
                        output_dir=folder,
                        num_generations=2,
                        per_device_train_batch_size=2,
                        max_completion_length=limits.max_completion_tokens,
                        temperature=1.0 if temperature is None else temperature,
                        generation_kwargs=how,
                        gradient_checkpointing=False,
                        use_cpu=model.device.type == "cpu",
                        bf16=compute_dtype(model.device) == torch.bfloat16,
                        report_to="none",
                        disable_tqdm=True,
                    ),
                    train_dataset=Dataset.from_dict({"prompt": ["?"]}),
                    processing_class=tokenizer,
                    tools=[search],
                )
        finally:
            generation.eos_token_id = ends
        model.eval()
        self._protocol, self._ends = protocol, end_ids(model, tokenizer)

    def rollouts(
        self,
        retriever: Retriever,
        questions: Sequence[Question],
        n: int,
        *,
        k: int,
        episode: type[Episode] = Episode,
    ) -> list[Trajectory]:
        """`n` episodes a question, all side by side, as TRL generates one batch for training."""
        episodes = new_episodes(episode, questions, n, self._protocol)
        self._rows = [_Row(one, retriever, k) for one in episodes]
        self._writing, self._waiting = deque(self._rows), deque[_Row]()
        # TRL makes these in `_generate_and_score_completions`, from the same tools for every row.
        self._sync_tool_dicts = [{"search": row.search, "correct": str} for row in self._rows]
        self._async_tool_dicts: list[dict[str, Any]] = [{} for _ in self._rows]
        asked = [one.trajectory.question.question for one in episodes]
        with compute_context(self.model):
            self._generate([[{"role": "user", "content": question}] for question in asked])
        return [one.finish() for one in episodes]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(row.episode.trajectory.prompt_ids) for row in self._rows], None, {}

    def _parse_turn(self, ids: list[int], **_: Any) -> dict[str, Any]:
        """What TRL takes a turn for: a message, with a tool call unless it answers."""
        row = self._writing.popleft()
        call = row.take(cut_turn(ids, row.episode.budget, self.eos_token_ids, self._ends))
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if call is not None:
            self._waiting.append(row)
            message["tool_calls"] = [{"type": "function", "function": call}]
        return message

    def _get_tool_suffix_ids(self, tool_messages: list[Any]) -> list[int]:
        """The environment's text; where the episode ends without an answer, one that TRL drops as too long."""
        row = self._waiting.popleft()
        ids = row.reply()
        if row.episode.over:
            return [0] * (self.max_completion_length + 1)
        self._writing.append(row)
        return ids
