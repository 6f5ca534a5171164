"""A static KV cache whose rows are filled to lengths of their own, and the attention that reads it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from searche1_lite.policy.attention import EXPANDED
from searche1_lite.runtime.errors import UserError

_GROUPED = "searche1_lite_grouped"


@dataclass(slots=True)
class _Place:
    """Where the pass at hand writes into the cache and what it reads of it."""

    rows: torch.Tensor
    """(B, 1)"""
    columns: torch.Tensor
    """(B, T)"""
    read: slice | torch.Tensor
    """The rows that are read: a range of slots, or (B,) slots."""
    width: int
    """The columns that are read, from the first."""


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (slots, heads, columns, width) each, in the dtype in which they come."""

    is_compileable = False

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__()
        self._slots, self._columns, self._cleared = slots, columns, 0
        self.place: _Place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            new.new_empty((self._slots, new.shape[1], self._columns, new.shape[3]))
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def _clear(self, width: int) -> None:
        """Makes columns finite that are read for the first time: what is masked is still multiplied, by 0."""
        if width > self._cleared:
            for kept in (self.keys, self.values):
                kept[:, :, self._cleared : width] = 0
            self._cleared = width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, found = self.place, []
        self._clear(place.width)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[place.rows, :, place.columns] = new.transpose(1, 2)
            found.append(kept[:, :, : place.width][place.read])
        return found[0], found[1]

    def copy(self, source: int, target: int, length: int) -> None:
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return 0  # never asked for: positions and masks are given

    def get_max_length(self) -> int:
        return self._columns


class SlotCache(Cache):
    """A static KV cache whose rows are filled to different lengths. Its last column takes what nobody reads."""

    def __init__(self, config: PretrainedConfig, slots: int, columns: int) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            kept = ", ".join(sorted(kinds))
            raise UserError(f"{text.model_type} has layers that keep no KV cache ({kept}); take another base")
        window = getattr(text, "sliding_window", None)
        # Models that do not say which layers have a window have it in all of them.
        self._window = window if getattr(text, "layer_types", None) is None else None
        self._windows = {"full_attention": None, "sliding_attention": window} if "sliding_attention" in kinds else None
        self.columns = columns
        super().__init__(layers=[_SlotLayer(slots, columns + 1) for _ in range(text.num_hidden_layers)])

    def at(
        self, rows: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, read: slice | torch.Tensor, width: int
    ) -> dict[str, Any]:
        """What the model's next pass needs to write tokens at `positions` and to see all before them.

        Args:
            rows: (B,) slots.
            positions: (B, T) of the tokens in their sequences.
            real: (B, T) false where there is no token.
            read: the same slots, as a range if they are one.
            width: columns to look at, more than any position.
        """
        place = _Place(rows.unsqueeze(1), torch.where(real, positions, self.columns), read, width)
        for layer in self.layers:
            layer.place = place
        columns = torch.arange(width, device=rows.device)
        last = positions[:, None, :, None]

        def seen(window: int | None) -> torch.Tensor:
            return columns <= last if window is None else (columns <= last) & (columns > last - window)

        windows = self._windows
        mask = seen(self._window) if windows is None else {kind: seen(window) for kind, window in windows.items()}
        return {"attention_mask": mask, "position_ids": positions, "past_key_values": self, "use_cache": True}


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    spans: Sequence[tuple[int, int, int]] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention with as many copies of keys and values as they have heads, not as queries have.

    Args:
        query: (B, heads, T, width).
        key, value: (B, key-value heads, L, width).
        attention_mask: (B, 1, T, L), true where a token is seen.
        spans: for a step, (first row, row after the last one, columns to look at) of neighbours done together.

    Returns:
        (B, T, heads, width), and None.

    Raises:
        UserError: for a model that wants more than that of its attention.
    """
    if wanted := [name for name in ("softcap", "position_bias", "s_aux") if others.get(name) is not None]:
        raise UserError(f"this model attends with {wanted[0]}, which rollouts do not have; take another base")
    (rows, heads, length, _), kv_heads = query.shape, key.shape[1]
    groups = heads // kv_heads
    if groups > 1 and length == 1:  # the heads that share keys are as good as a longer query
        query = query.reshape(rows, kv_heads, groups, -1)
    elif groups > 1:
        query = query.reshape(rows * kv_heads, groups, length, -1)
        key, value = (kept.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for kept in (key, value))
        attention_mask = attention_mask.expand(-1, kv_heads, -1, -1).flatten(0, 1).unsqueeze(1)

    def attend(rows: slice, columns: slice) -> torch.Tensor:
        seen = key[rows, :, columns], value[rows, :, columns]
        mask = attention_mask[rows, :, :, columns]
        return F.scaled_dot_product_attention(query[rows], *seen, attn_mask=mask, scale=scaling)

    if spans is None:
        found = attend(slice(None), slice(None))
    else:
        found = torch.cat([attend(slice(first, end), slice(width)) for first, end, width in spans])
    return found.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, grouped_attention)


@contextmanager
def grouped(config: PretrainedConfig) -> Iterator[None]:
    """Has the model attend by `grouped_attention`, if it would use PyTorch's own."""
    text = config.get_text_config()
    usual = text._attn_implementation
    # cuDNN's kernels, first choice on some GPUs, are planned anew for every shape, and texts come in many.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        if usual in ("sdpa", EXPANDED):
            text._attn_implementation = _GROUPED
        with sdpa_kernel(kernels):
            yield
    finally:
        text._attn_implementation = usual
