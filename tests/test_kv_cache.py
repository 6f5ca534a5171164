"""The cache refuses what it cannot hold, and attention over it is that over copies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_policy
from torch.nn import functional as F
from transformers import Qwen3NextConfig

from searche1_lite.errors import UserError
from searche1_lite.kv_cache import SlotCache, attend_expanded, grouped_attention


def test_attention_over_shared_keys_is_that_over_copies_of_them() -> None:
    torch.manual_seed(0)
    for length in (1, 5):
        query, key, value = torch.randn(3, 6, length, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
        mask = torch.rand(3, 1, length, 9) < 0.5
        mask[..., 0] = True
        ours, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
        copies = (kept.repeat_interleave(3, dim=1) for kept in (key, value))
        plain = torch.nn.functional.scaled_dot_product_attention(query, *copies, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(ours, plain.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["softcap", "position_bias", "s_aux"])
def test_attention_that_would_leave_something_out_is_refused(wanted: str) -> None:
    some = torch.ones(1, 1, 1, 8)
    with pytest.raises(UserError, match=wanted):
        grouped_attention(torch.nn.Module(), some, some, some, torch.ones(1, 1, 1, 1).bool(), **{wanted: some})


def test_rows_that_look_at_their_own_columns_only_see_what_they_saw() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 1, 8), torch.randn(5, 2, 9, 8), torch.randn(5, 2, 9, 8)
    lengths = torch.tensor([3, 1, 9, 4, 2])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    whole, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    parts, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, spans=[(0, 2, 3), (2, 4, 9), (4, 5, 2)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_a_model_with_layers_that_keep_no_cache_is_refused() -> None:
    with pytest.raises(UserError, match="linear_attention"):
        SlotCache(Qwen3NextConfig(num_hidden_layers=4), 1, 8)


def test_the_cache_is_in_the_dtype_of_the_keys(tiny_policy) -> None:
    cache = SlotCache(tiny_policy[0].get_base_model().config, 3, 10)
    cache.layers[0].lazy_initialization(*[torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)] * 2)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and cache.layers[0].keys.shape == (3, 2, 11, 16)


def test_expanded_attention_asks_for_no_shared_keys_and_comes_to_the_same(
    tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, bool]] = []
    plain = F.scaled_dot_product_attention

    def recorded(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        asked.append((query.shape[1], key.shape[1], options.get("enable_gqa", False)))
        return plain(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    ids = torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # padded on the left, as `generate` has it

    def look(expanded: bool) -> tuple[set[tuple[int, int, bool]], list[torch.Tensor]]:
        model, _ = fresh_policy(tiny_policy_folder)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        if expanded:
            attend_expanded(model.config)
        asked.clear()
        logits = model(input_ids=ids).logits
        logits.logsumexp(-1).sum().backward()
        used = set(asked)
        padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return used, [logits, padded, *(p.grad for p in model.parameters() if p.grad is not None)]

    (shared, usual), (copied, ours) = look(False), look(True)
    assert shared == {(4, 2, True)} and copied == {(4, 4, False)}
    assert len(usual) == len(ours) > 10
    for one, other in zip(usual, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
