"""The cache refuses what it cannot hold, and attention over it is that over copies."""

import pytest
import torch
from transformers import Qwen3NextConfig

from searche1_lite.policy.kv_cache import SlotCache, grouped_attention
from searche1_lite.runtime.errors import UserError


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
