"""Attention for GPUs that compute in fp32, having no bf16: one that PyTorch's memory-efficient kernel takes.

Without a mask, transformers has PyTorch share keys and values among the heads (`enable_gqa`). In fp32 a GPU does that
by its plainest kernel alone, which holds a matrix of tokens by tokens for every head.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

EXPANDED = "searche1_lite_expanded"


def expanded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own; where there is no mask, over a copy of keys and values for each of the queries' heads."""
    if attention_mask is not None:  # then it makes the copies itself
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    copies = query.shape[1] // key.shape[1]
    ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(ungrouped, query, repeat_kv(key, copies), repeat_kv(value, copies), None, **others)


AttentionInterface.register(EXPANDED, expanded_attention)
AttentionMaskInterface.register(EXPANDED, sdpa_mask)


def expand_keys(config: PretrainedConfig) -> None:
    """Has the model attend by `expanded_attention`, if it would use PyTorch's own.

    For good: a layer that is computed again on the way back, for gradient checkpointing, looks here once more.
    """
    text = config.get_text_config()
    if text._attn_implementation == "sdpa":
        text._attn_implementation = EXPANDED
