"""Attention for GPUs without bf16, here on a CPU: it gives what the usual one gives, and shares no keys among heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_policy
from torch.nn import functional as F

from searche1_lite.config import load_config
from searche1_lite.policy.attention import EXPANDED, expand_keys
from searche1_lite.policy.capacity import model_shape
from searche1_lite.policy.engine import Decoder
from searche1_lite.policy.losses import hidden_states
from searche1_lite.policy.memory import _grpo_pass, _peak
from searche1_lite.policy.model import lacks_bf16, tell_of_missing_bf16

Calls = list[tuple[int, int, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The heads of queries and keys of every call of PyTorch's attention, and how it was called."""
    seen: Calls = []
    real = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((query.shape[1], key.shape[1], how))
        return real(query, key, value, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def states_and_gradients(folder: Path, expanded: bool, checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of two rows, the shorter one padded, and the gradients of the adapter."""
    model, _ = fresh_policy(folder)
    if expanded:
        expand_keys(model.get_base_model().config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.tensor([list(b"What is the capital of Peru?"), [*b"Lima", *[0] * 24]])
    logits = model.get_output_embeddings()(hidden_states(model, ids))
    logits.log_softmax(dim=-1)[..., 65].sum().backward()
    return logits, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_the_usual_attention(
    tiny_policy_folder: Path, calls: Calls, checkpointing: bool
) -> None:
    usual, gradients = states_and_gradients(tiny_policy_folder, False, checkpointing)
    assert all((heads, how["enable_gqa"]) == (2, True) for _, heads, how in calls), "else there is nothing to mend"
    passes, layers = len(calls), 2
    assert passes == layers * (2 if checkpointing else 1)
    calls.clear()
    ours, others = states_and_gradients(tiny_policy_folder, True, checkpointing)
    assert len(calls) == passes, "on the way back too"
    for query_heads, heads, how in calls:
        assert query_heads == heads == 4 and how["is_causal"] and how["attn_mask"] is None and "enable_gqa" not in how
    torch.testing.assert_close(ours, usual, atol=1e-5, rtol=1e-5)
    assert len(gradients) > 4 and max(gradient.abs().max() for gradient in gradients) > 1e-2
    for one, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_padding_at_the_front_is_masked_as_ever_and_rollouts_have_an_attention_of_their_own(
    tiny_policy_folder: Path, calls: Calls
) -> None:
    model, tokenizer = fresh_policy(tiny_policy_folder)
    config = model.get_base_model().config
    ids, mask = torch.tensor([[0, 0, *b"Lima"], [*b"Quito?"]]), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.inference_mode():
        usual = model(input_ids=ids, attention_mask=mask).logits
        expand_keys(config)
        assert config._attn_implementation == EXPANDED
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, usual)
        calls.clear()
        Decoder(model, tokenizer, 1, 20, greedy=True).prefill([0], [[65, 66]])
    assert [heads for _, heads, _ in calls] == [2, 2], "no copies for all heads"
    assert config._attn_implementation == EXPANDED and EXPANDED not in config.to_json_string()


def test_the_memory_plan_counts_the_copies(tiny_policy_folder: Path, calls: Calls) -> None:
    """On tensors without storage transformers makes a mask, as if it were traced, and with it the copies."""
    config = load_config("demo", None, [f"model.name={tiny_policy_folder}"])
    _peak(_grpo_pass, model_shape(config), config, torch.float32, "cuda", 2)
    assert {heads for _, heads, _ in calls} == {4}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_on_a_gpu_without_bf16_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bf16: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    assert lacks_bf16(gpu) is not bf16 and not lacks_bf16(torch.device("cpu"))
    tell_of_missing_bf16(gpu)
    tell_of_missing_bf16(torch.device("cpu"))
    line = "Tesla T4 has no bf16, so it computes in fp32: slower, more memory\n"
    assert capsys.readouterr().err == ("" if bf16 else line)
