"""Token generation for many episodes side by side, with the KV cache kept across turns.

Each episode has a slot: a row of a static KV cache, filled to a length of its own. What the environment says is
prefilled behind what is there, many rows at a time; a prompt that several episodes share is prefilled once and copied;
a slot is free for the next episode as soon as its own is over. So nothing is computed twice, there are no holes, and
the result is that of a fresh prefill of the whole sequence. Every step feeds one token of each writing row and samples
the next. The cache lives as long as its `Decoder`, which is made anew for every rollout: it never outlives a weight
update. On a GPU a step whose shape lasts is captured as a graph.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import EngineConfig
from searche1_lite.policy.kv_cache import SlotCache, grouped
from searche1_lite.policy.model import compute_context, shadow_weights
from searche1_lite.policy.onednn import has_onednn
from searche1_lite.policy.shrinking import is_out_of_memory
from searche1_lite.policy.stopping import end_ids, tag_automaton
from searche1_lite.runtime.errors import UserError

PREFILL_TOKENS = 4096
"""Tokens of all rows that one forward pass takes, so that its activations do not grow with rows and documents."""

CPU_COLUMNS = 16
"""On a CPU, a pass looks at a multiple of so many columns of the cache."""

GPU_COLUMNS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""On a GPU, at the least of these that will do, or at all: each with a graph of its own."""

CAPTURE_AFTER = 8
"""Steps of a shape before it is captured."""

SPAN = 8
"""On a CPU, neighbouring rows whose step looks at as many columns as the longest of them has."""

SHADOW_ROWS = 16
"""On a GPU, rows from which plain weights are faster than 4-bit ones."""

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class SampledTurn:
    """What the policy wrote in one turn: ids as sampled, their log-probs if asked for, and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["tag", "eos", "budget"] = "budget"


class UniformStream:
    """The random numbers of one trajectory, drawn from its own seed and nothing else."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._generator.random(128)[::-1].tolist()
        return self._block.pop()


def pick_tokens(
    logits: torch.Tensor, temperature: float, uniforms: torch.Tensor | None, with_logprobs: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Next tokens and, on request, their log-probs, both (B,).

    Non-finite logits show in their log-probs, which are not finite either; without log-probs, by the token -1.

    Args:
        logits: (B, V).
        temperature: of the distribution that is sampled and whose log-probs are returned.
        uniforms: (B,) in [0, 1) for sampling by inverse CDF; None for the most likely token.
    """
    if uniforms is None:
        tokens = logits.argmax(dim=-1)
        if not with_logprobs:  # a NaN counts as the largest
            return _marked(tokens, logits.gather(1, tokens.unsqueeze(1)).squeeze(1)), None
    scaled = logits.float() / temperature
    if uniforms is not None:
        cdf = torch.softmax(scaled, dim=-1).double().cumsum_(dim=-1)
        targets = uniforms.unsqueeze(1) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, targets, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
        if not with_logprobs:
            return _marked(tokens, cdf[:, -1]), None
    return tokens, scaled.gather(1, tokens.unsqueeze(1)).squeeze(1) - scaled.logsumexp(dim=-1)


def _marked(tokens: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The tokens, -1 where a value is not finite."""
    return torch.where(values.isfinite(), tokens, -1)


def uses_shadow(engine: EngineConfig, device: str, rows: int) -> bool:
    """Whether rollouts of so many rows compute with `model.shadow_weights`, if there is memory for them."""
    if engine.backend != "torch":
        return False
    return engine.shadow == "always" or (engine.shadow == "auto" and (device == "cpu" or rows >= SHADOW_ROWS))


@contextmanager
def rollout_context(model: PeftModel, engine: EngineConfig, rows: int) -> Iterator[None]:
    """What a `Decoder` of so many rows computes under: plain weights where `uses_shadow` says so, and the compute
    dtype. In fp32 on a CPU the plain weights are oneDNN's to compute with."""
    device, dtype = model.device.type, model.get_input_embeddings().weight.dtype
    onednn = device == "cpu" and dtype == torch.float32 and has_onednn()
    with shadow_weights(model, uses_shadow(engine, device, rows), onednn=onednn), compute_context(model):
        yield


class RolloutDecoder(Protocol):
    """What `rollout` plays episodes with; `Decoder` says what each method is for."""

    @property
    def writing(self) -> np.ndarray: ...
    def prefill(self, slots: Sequence[int], chunks: Sequence[list[int]]) -> None: ...
    def share(self, source: int, target: int, length: int) -> None: ...
    def move(self, source: int, target: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def begin(self, slot: int, token: int, budget: int, stream: UniformStream | None) -> None: ...
    def written(self, slot: int) -> list[int]: ...
    def step(self) -> list[tuple[int, SampledTurn]]: ...
    def rows_for(self, rows: int) -> int: ...
    def close(self) -> None: ...


class Decoder:
    """Slots that read and write. Use under `torch.inference_mode()` with the model in eval mode.

    Args:
        model: the policy.
        tokenizer: gives the end-of-message ids and the text in which closing tags are looked for.
        slots: how many rows there are.
        columns: tokens that a row can hold.
        temperature: sampling temperature.
        greedy: take the most likely token.
        logprobs: keep the log-probs of what is sampled.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int,
        columns: int,
        *,
        temperature: float = 1.0,
        greedy: bool = False,
        logprobs: bool = False,
    ) -> None:
        base = model.get_base_model()
        self._config, self._backbone, self._head = base.config, base.base_model, base.get_output_embeddings()
        self._device = model.device
        self._temperature, self._greedy, self._with_logprobs = temperature, greedy, logprobs
        self._columns = -(-columns // 8) * 8  # as attention kernels want their masks
        self._cache = SlotCache(base.config, slots, self._columns)
        vocabulary = self._head.weight.shape[0]
        self._automaton = tag_automaton(tokenizer, vocabulary)
        self._ends = np.zeros(vocabulary, dtype=bool)
        self._ends[sorted(end_ids(model, tokenizer))] = True
        self.clear(slots)
        self._graphs = _Graphs(self._device) if self._device.type == "cuda" else None

    def clear(self, slots: int) -> None:
        """So many rows, all of them free."""
        self.lengths = np.zeros(slots, dtype=np.int64)
        """Tokens of each row that are in the cache."""
        self.writing = np.zeros(slots, dtype=bool)
        """Rows in the middle of a turn."""
        self._tokens = np.zeros(slots, dtype=np.int64)
        self._states = np.zeros(slots, dtype=np.uint8)
        self._counts, self._budgets = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
        self._turns = [SampledTurn() for _ in range(slots)]
        self._streams: list[UniformStream | None] = [None] * slots

    def prefill(self, slots: Sequence[int], chunks: Sequence[list[int]]) -> None:
        """Adds `chunks` of ids to what these rows hold. Nothing is sampled.

        As many rows are taken at once as `PREFILL_TOKENS` allows, those of like length together.
        """
        order = sorted((index for index, chunk in enumerate(chunks) if chunk), key=lambda index: len(chunks[index]))
        while order:
            longest = len(chunks[order[-1]])
            count = max(1, PREFILL_TOKENS // longest)
            taken, order = sorted(order[-count:], key=lambda index: slots[index]), order[:-count]
            for start in range(0, longest, PREFILL_TOKENS):
                self._prefill(
                    [slots[index] for index in taken],
                    [chunks[index][start : start + PREFILL_TOKENS] for index in taken],
                )

    def _prefill(self, slots: list[int], chunks: list[list[int]]) -> None:
        sizes = np.array([len(chunk) for chunk in chunks])
        rows, lengths = np.array(slots), self.lengths[slots]
        steps = np.arange(sizes.max())
        tokens = np.zeros((len(slots), len(steps)), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk)] = chunk
        real = steps < sizes[:, None]
        # Where there is no token the position is that of the last one, so that it sees no more than others do.
        positions = lengths[:, None] + np.minimum(steps, sizes[:, None] - 1)
        width = self._bucket(int((lengths + sizes).max()))
        together = slots[-1] - slots[0] == len(slots) - 1
        index = self._there(rows)
        read = slice(slots[0], slots[-1] + 1) if together else index
        with grouped(self._config):
            self._backbone(
                input_ids=self._there(tokens),
                **self._cache.at(index, self._there(positions), self._there(real), read, width),
            )
        self.lengths[slots] += sizes

    def share(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one row's cache to another."""
        for layer in self._cache.layers if length else ():
            layer.copy(source, target, length)
        self.lengths[target] = length

    def move(self, source: int, target: int) -> None:
        """Moves a row to another slot, in the middle of a turn or between turns."""
        self.share(source, target, int(self.lengths[source]))
        for array in (self.writing, self._tokens, self._states, self._counts, self._budgets):
            array[target] = array[source]
        self._turns[target], self._streams[target] = self._turns[source], self._streams[source]
        self.release(source)

    def release(self, slot: int) -> None:
        """Frees a row."""
        self.writing[slot], self.lengths[slot], self._streams[slot] = False, 0, None

    def begin(self, slot: int, token: int, budget: int, stream: UniformStream | None) -> None:
        """Begins a turn: `token` is the last one of the row's text and not in the cache yet.

        Args:
            budget: tokens the row may write, at least 1.
            stream: the row's random numbers; None for greedy decoding.
        """
        self.writing[slot], self._tokens[slot], self._budgets[slot] = True, token, budget
        self._counts[slot] = self._states[slot] = 0
        self._turns[slot], self._streams[slot] = SampledTurn(), stream

    def written(self, slot: int) -> list[int]:
        """What the last step wrote in a row that was writing."""
        return [int(self._tokens[slot])]

    def close(self) -> None:
        """The rollout is over, or broke off. Nothing outlives the decoder itself."""

    def step(self) -> list[tuple[int, SampledTurn]]:
        """Writes one token in each writing row; gives the rows whose turn it ended, with their turns.

        A turn ends when a search or an answer is closed, the message ended, or the budget is used up.

        Raises:
            UserError: without log-probs, if the model's logits are no numbers; with them, they tell.
        """
        slots = np.flatnonzero(self.writing)
        rows = self.rows_for(int(slots[-1]) + 1)
        width = self._bucket(int(self.lengths[slots].max()) + 1)
        spans = None
        if self._graphs is None and self._device.type == "cpu":
            firsts = range(0, rows, SPAN)
            lengths = np.where(self.writing, self.lengths, 0)[:rows]
            spans = [(at, min(at + SPAN, rows), int(lengths[at : at + SPAN].max()) + 1) for at in firsts]
        uniforms = np.zeros(rows)
        if not self._greedy:
            uniforms[slots] = [self._streams[slot].next() for slot in slots]  # type: ignore[union-attr]
        inputs = (self._tokens[:rows], self.lengths[:rows], self.writing[:rows], uniforms)
        if self._graphs is not None:
            tokens, logprobs = self._graphs.run((rows, width), self._decode, inputs)
        else:
            tokens, logprobs = self._decode((rows, width), *map(self._there, inputs), spans=spans)
        found = tokens.cpu().numpy()[slots]
        if found.min() < 0:
            raise UserError(
                "the policy computes no numbers (NaN or infinity in its logits), so it has no answers: its weights are "
                "damaged or too large; use an earlier checkpoint's adapter, or load the model's files again",
                exit_code=1,
            )
        self.lengths[slots] += 1
        self._tokens[slots] = found
        self._counts[slots] += 1
        self._states[slots] = self._automaton.advance(self._states[slots], found)
        for slot, token in zip(slots.tolist(), found.tolist(), strict=True):
            self._turns[slot].ids.append(token)
        if logprobs is not None:
            for slot, logprob in zip(slots.tolist(), logprobs.cpu().numpy()[slots].tolist(), strict=True):
                self._turns[slot].logprobs.append(logprob)
        ended, closed = self._ends[found], self._states[slots] == self._automaton.done
        over = ended | closed | (self._counts[slots] >= self._budgets[slots])
        results = []
        for index in np.flatnonzero(over):
            slot = int(slots[index])
            turn = self._turns[slot]
            turn.ended = "eos" if ended[index] else "tag" if closed[index] else "budget"
            self.writing[slot] = False
            results.append((slot, turn))
        return results

    def _decode(
        self,
        shape: tuple[int, int],
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        writing: torch.Tensor,
        uniforms: torch.Tensor,
        *,
        spans: Sequence[tuple[int, int, int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Next tokens and log-probs (rows,) of the first rows, all those among them that do not write included."""
        rows, width = shape
        slots = torch.arange(rows, device=self._device)
        positions = lengths.unsqueeze(1).clamp(max=width - 1)
        with grouped(self._config):
            hidden = self._backbone(
                input_ids=tokens.unsqueeze(1),
                **self._cache.at(slots, positions, writing.unsqueeze(1), slice(0, rows), width),
                spans=spans,
            ).last_hidden_state
        logits = self._head(hidden[:, -1])
        return pick_tokens(logits, self._temperature, None if self._greedy else uniforms, self._with_logprobs)

    def rows_for(self, rows: int) -> int:
        """The rows that a step takes: on a GPU all, a half, a quarter or an eighth, so that few graphs serve."""
        if self._graphs is None:
            return rows
        slots = len(self.writing)
        return min(part for part in (-(-slots // 8), -(-slots // 4), -(-slots // 2), slots) if part >= rows)

    def _bucket(self, width: int) -> int:
        if self._device.type == "cpu":
            size = -(-width // CPU_COLUMNS) * CPU_COLUMNS
        else:
            size = next((size for size in GPU_COLUMNS if size >= width), self._columns)
        return min(self._columns, size)

    def _there(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class _Graphs:
    """Captured steps by shape. A graph replays on the memory that it was captured with: weights and cache stay put.

    The first steps of a shape run as they are, which also sets up their kernels; only a shape that lasts is captured.
    """

    _impossible = False
    """For the process: a capture that failed leaves the allocator unfit for another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}
        self._seen: dict[tuple[int, int], int] = {}
        self._pool: Any = None

    def run(self, shape: tuple[int, int], step: Any, inputs: Sequence[np.ndarray]) -> Any:
        if shape in self._captured:
            graph, kept, outputs = self._captured[shape]
            for place, array in zip(kept, inputs, strict=True):
                place.copy_(torch.from_numpy(array), non_blocking=True)
            graph.replay()
            return outputs
        there = [torch.from_numpy(array).to(self._device, non_blocking=True) for array in inputs]
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] == CAPTURE_AFTER and not _Graphs._impossible:
            self._capture(shape, step, there)
        return step(shape, *there)

    def _capture(self, shape: tuple[int, int], step: Any, inputs: list[torch.Tensor]) -> None:
        """Keeps a graph of the step, if that can be done; the user is told if not."""
        current, cached = torch.cuda.current_stream(), torch.is_autocast_cache_enabled()
        kept, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        torch.set_autocast_cache_enabled(False)  # a cast made in the graph lives in its memory, and no longer
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = step(shape, *kept)
            self._pool = graph.pool()
            self._captured[shape] = graph, kept, outputs
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # not given back where the end of the capture fails
            cause = error.__context__ or error
            if is_out_of_memory(cause):
                return  # this shape goes on without; another may be smaller
            reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
            _Graphs._impossible = True
            _LOG.warning("the decoding step cannot be captured as a CUDA graph (%s): slower without", reason)
        finally:
            torch.set_autocast_cache_enabled(cached)
