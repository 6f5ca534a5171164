"""Log-probs without full logits: equal to dense ones, and asked for model-written tokens only."""

import pytest
import torch

from searche1_lite.policy import losses
from searche1_lite.policy import losses as divergence_module
from searche1_lite.policy.losses import completion_hidden, divergence, token_logprobs


def head_and_states(count: int) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(16, 90, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / 3)
    hidden = torch.randn(count, 16, generator=generator).requires_grad_(True)
    return head, hidden, torch.randint(90, (count,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tile", [4, 512])
def test_values_entropies_and_gradient_equal_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, tile: int, temperature: float
) -> None:
    monkeypatch.setattr(losses, "TOKENS_PER_TILE", tile)
    head, hidden, targets = head_and_states(11)
    values, entropies = token_logprobs(head, hidden, targets, temperature)
    values.sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    dense = torch.log_softmax(exact @ head.weight.double().T / temperature, dim=-1)
    expected = dense.gather(1, targets.unsqueeze(1)).squeeze(1)
    expected.sum().backward()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), -(dense.exp() * dense).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_no_token_gives_no_value_and_a_backward_pass_all_the_same() -> None:
    head, hidden, targets = head_and_states(3)
    values, entropies = token_logprobs(head, hidden[:0], targets[:0])
    assert values.shape == entropies.shape == (0,)
    values.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_the_divergence_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    head, student, _ = head_and_states(11)
    teacher = student.detach().flip(0)
    whole = divergence(head, student, teacher)
    whole.sum().backward()
    gradient, student.grad = student.grad, None
    monkeypatch.setattr(divergence_module, "TOKENS_PER_TILE", 3)
    tiled = divergence(head, student, teacher)
    tiled.sum().backward()
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(student.grad, gradient)


def test_padding_changes_no_state_and_makes_no_pass_wider_than_its_longest_row(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    pad, rows = tokenizer.pad_token_id, [([5, 6, 7, 8], [9]), ([10], [11, 12, 13, 14, 15]), ([16, 17], [18, 19])]
    keeps = [[True], [True, False, True, True, False], [False, True]]
    prompts = torch.tensor([[pad] * (6 - len(prompt)) + prompt for prompt, _ in rows])
    completions = torch.tensor([completion + [pad] * (9 - len(completion)) for _, completion in rows])
    keep = torch.tensor([found + [False] * (9 - len(found)) for found in keeps])
    seen: list[torch.Size] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
    with torch.no_grad():
        states = completion_hidden(
            model, prompts, (prompts != pad).long(), completions, (completions != pad).long(), keep
        )
        handle.remove()
        expected = [
            model.get_base_model().base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[
                0, len(prompt) - 1 : -1
            ][torch.tensor(kept)]
            for (prompt, completion), kept in zip(rows, keeps, strict=True)
        ]  # fmt: skip
    assert seen == [(3, 6)]
    torch.testing.assert_close(states, torch.cat(expected), atol=1e-5, rtol=1e-4)
