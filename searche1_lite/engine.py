"""Token generation for many episodes side by side, with the KV cache kept across turns.

One `DynamicCache` serves a batch of rows. Text appended by the environment is prefilled on top of what is cached; rows
of unequal length leave holes, which the attention mask covers, and positions count real tokens only. So nothing is ever
computed twice, and the result is that of a fresh prefill of the whole sequence. When holes add up, they are squeezed
out, so that the cache stays about as long as its longest row. What it leaves out: refilling the slot of a finished row,
and captured graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedTokenizerBase

from searche1_lite.protocol import STOP_TAGS

_TAIL = 16
"""Ids decoded to look for a closing tag; a tag has at most 9 characters, so at most 9 ids."""

PREFILL_TOKENS = 4096
"""Tokens of all rows that one forward pass takes, so that its activations do not grow with rows and documents."""

HOLES = 64
"""Columns that the cache may be longer than its longest row before holes are squeezed out."""


@dataclass(slots=True)
class SampledTurn:
    """What the policy wrote in one turn: ids as sampled, their log-probs, and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["tag", "eos", "budget"] = "budget"


class UniformStream:
    """The random numbers of one trajectory, drawn from its own seed and nothing else."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._generator.random(128)[::-1].tolist()
        return self._block.pop()


def pick_tokens(
    logits: torch.Tensor, temperature: float, uniforms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probs, both (B,).

    Args:
        logits: (B, V).
        temperature: of the distribution that is sampled and whose log-probs are returned.
        uniforms: (B,) in [0, 1) for sampling by inverse CDF; None for the most likely token.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if uniforms is None:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = logprobs.exp().double().cumsum(dim=-1)
        targets = uniforms.unsqueeze(1) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, targets, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


class Decoder:
    """A batch of rows over one kept cache. Use under `torch.inference_mode()` with the model in eval mode.

    Args:
        model: the policy.
        tokenizer: gives the end-of-message ids and the text in which closing tags are looked for.
        prompts: token ids of each distinct prompt.
        repeats: rows per prompt; each prompt is prefilled once and its cache shared out.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], repeats: int = 1
    ) -> None:
        base = model.get_base_model()
        self._backbone, self._head = base.base_model, base.get_output_embeddings()
        self._device = model.device
        self._tokenizer = tokenizer
        self._end_ids = end_ids(model, tokenizer)
        self._closing = _closing_tokens(tokenizer, self._head.weight.shape[0]).to(self._device)
        self._cache = DynamicCache(config=base.config)
        self._mask = torch.zeros((len(prompts), 0), dtype=torch.long, device=self._device)
        self._unfed: list[list[int]] = [[] for _ in prompts]
        self.logits = torch.empty(0)
        """(B, V): what comes next in each row."""
        self.append(prompts)
        if repeats > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(repeats)])

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may be named more than once."""
        index = torch.tensor(rows, dtype=torch.long, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask, self.logits = self._mask[index], self.logits[index]
        self._unfed = [list(self._unfed[row]) for row in rows]

    def append(self, ids: Sequence[list[int]]) -> None:
        """Feeds `ids` (a list per row, empty ones allowed), after the last sampled token if that was not fed yet."""
        chunks = [unfed + list(new) for unfed, new in zip(self._unfed, ids, strict=True)]
        self._unfed = [[] for _ in chunks]
        self._squeeze()
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=self._device)
        width = int(lengths.max())
        if width == 0:
            return
        tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._device)
        real = (torch.arange(width, device=self._device) < lengths.unsqueeze(1)).long()
        rows, piece = torch.arange(len(chunks), device=self._device), max(1, PREFILL_TOKENS // len(chunks))
        last = torch.zeros(0)
        for start in range(0, width, piece):
            hidden = self._forward(tokens[:, start : start + piece], real[:, start : start + piece])
            ends = hidden[rows, (lengths - 1 - start).clamp(0, hidden.shape[1] - 1)]
            last = ends if start == 0 else torch.where((lengths > start).unsqueeze(1), ends, last)
        logits = self._head(last)
        self.logits = logits if self.logits.numel() == 0 else torch.where(lengths.unsqueeze(1) > 0, logits, self.logits)

    def sample_turn(
        self, budgets: Sequence[int], temperature: float, streams: Sequence[UniformStream] | None
    ) -> list[SampledTurn]:
        """Decodes until every row has closed a search or an answer, ended its message or used up its budget.

        Args:
            budgets: tokens each row may write, at least 1.
            temperature: sampling temperature.
            streams: each row's random numbers, or None for greedy decoding.
        """
        self._squeeze()
        turns = [SampledTurn() for _ in budgets]
        active = list(range(len(turns)))
        while True:
            uniforms = None
            if streams is not None:
                drawn = [0.0] * len(turns)
                for row in active:
                    drawn[row] = streams[row].next()
                uniforms = torch.tensor(drawn, dtype=torch.float64, device=self._device)
            tokens, logprobs = pick_tokens(self.logits, temperature, uniforms)
            closing = self._closing[tokens].tolist()
            token_list, logprob_list = tokens.tolist(), logprobs.tolist()
            going_on = []
            for row in active:
                turn, token = turns[row], token_list[row]
                turn.ids.append(token)
                turn.logprobs.append(logprob_list[row])
                if token in self._end_ids:
                    turn.ended = "eos"
                elif closing[row] and self._closes(turn.ids):
                    turn.ended = "tag"
                elif len(turn.ids) < budgets[row]:
                    going_on.append(row)
                    continue
                self._unfed[row] = [token]
            if not going_on:
                return turns
            active = going_on
            real = torch.zeros((len(turns), 1), dtype=torch.long, device=self._device)
            real[active] = 1
            self.logits = self._head(self._forward(tokens.unsqueeze(1), real)[:, -1])

    def _squeeze(self) -> None:
        """Moves each row's entries to the front of the cache, over its holes, if there are many; nothing else changes.

        Keys carry their positions already, and whatever comes later stands behind all of them.
        """
        columns, longest = self._mask.shape[1], int(self._mask.sum(dim=1).max()) if self._mask.numel() else 0
        if columns - longest <= HOLES:
            return
        order = self._mask.argsort(dim=1, descending=True, stable=True)[:, :longest]
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)

    def _closes(self, ids: list[int]) -> bool:
        tail = self._tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False)
        return any(tag in tail for tag in STOP_TAGS)

    def _forward(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H) of `tokens` (B, T); where `real` is 0 a hole is left that nothing attends to."""
        positions = (self._mask.sum(dim=1, keepdim=True) + real.cumsum(dim=1) - 1).clamp(min=0)
        self._mask = torch.cat([self._mask, real], dim=1)
        return self._backbone(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state


def end_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a message: the tokenizer's, the model's, and the chat template's `<|im_end|>`."""
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    config = model.get_base_model().generation_config
    eos = config.eos_token_id if config is not None else None
    ids |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(index for index in ids if index is not None)


def _closing_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> torch.Tensor:
    """(V,) whether a token's text holds the `>` that completes a tag: only then is it worth decoding."""
    names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    flags = [name is not None and ">" in name for name in names]
    return torch.tensor(flags + [False] * (size - len(flags)))
