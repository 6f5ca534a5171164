"""Log-probs without full logits: equal to dense ones, and asked for model-written tokens only."""

import pytest
import torch

from searche1_lite import divergence as divergence_module
from searche1_lite import logprobs
from searche1_lite.divergence import divergence
from searche1_lite.logprobs import token_logprobs


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
    monkeypatch.setattr(logprobs, "TOKENS_PER_TILE", tile)
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
