"""Every divergence and its gradient against the definition, worked out densely in float64."""

from collections.abc import Callable

import pytest
import torch
from conftest import dense_divergence

from searche1_lite.policy import losses as divergence_module
from searche1_lite.policy.losses import divergence, try_losses
from searche1_lite.runtime.errors import UserError

VOCABULARY, WIDTH = 150, 24


def rows(seed: int = 1, count: int = 9) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """An output layer, and hidden states of student and teacher for `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / 4)
    student, teacher = (torch.randn(count, WIDTH, generator=generator) for _ in range(2))
    return head, student.requires_grad_(True), teacher


def assert_equals(
    definition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    head: torch.nn.Linear,
    student: torch.Tensor,
    teacher: torch.Tensor,
) -> None:
    """`values` and their sum's gradient equal what `definition` makes of float64 logits, to 1e-5."""
    values.sum().backward()
    exact = student.detach().double().requires_grad_(True)
    weight = head.weight.double()
    expected = definition(exact @ weight.T, teacher.double() @ weight.T)
    expected.sum().backward()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)
    assert exact.grad.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tiled_divergence_and_its_gradient_equal_the_dense_ones_in_float64(kind: str, temperature: float) -> None:
    head, student, teacher = rows()
    values = divergence(head, student, teacher, kind, temperature)
    assert values.shape == (9,) and values.min() > 0.05
    assert_equals(lambda s, t: dense_divergence(kind, s, t, temperature), values, head, student, teacher)


@pytest.mark.parametrize("clip", [0.02, 0.1])
def test_the_clip_bounds_what_each_vocabulary_entry_adds(clip: float) -> None:
    head, student, teacher = rows()

    def clipped(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
        return torch.minimum(p * (p / q).log(), torch.tensor(clip, dtype=torch.float64)).sum(-1)

    values = divergence(head, student, teacher, clip=clip)
    assert (values < divergence(head, student, teacher) - 1e-3).any(), "something was clipped"
    assert_equals(clipped, values, head, student, teacher)


@pytest.mark.parametrize("top_k", [1, 10])
def test_top_k_lumps_together_all_but_the_teachers_likeliest_tokens(top_k: int) -> None:
    head, student, teacher = rows()

    def lumped(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
        kept = p.topk(top_k).indices
        p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
        return (p * (p / q).log()).sum(-1)

    values = divergence(head, student, teacher, top_k=top_k)
    assert (values < divergence(head, student, teacher)).all(), "lumping loses something"
    assert_equals(lumped, values, head, student, teacher)


@pytest.mark.parametrize("settings", [{"clip": 1e6}, {"top_k": VOCABULARY}, {"top_k": 10 * VOCABULARY}])
def test_a_truncation_that_cuts_nothing_is_the_exact_divergence_over_many_chunks(settings: dict[str, float]) -> None:
    head, student, teacher = rows(count=700)
    cut, exact = (divergence(head, student, teacher, temperature=0.9, **extra) for extra in (settings, {}))
    torch.testing.assert_close(cut, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"clip": 0.1}, {"top_k": 5}])
def test_equal_distributions_have_no_divergence_and_no_gradient(settings: dict[str, float]) -> None:
    head, hidden, _ = rows(2)
    values = divergence(head, hidden, hidden.detach(), **settings)
    values.sum().backward()
    assert values.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6


def test_kernels_that_cannot_be_built_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    try_losses("cpu")
    assert torch.equal(torch.get_rng_state(), before)

    def no_compiler(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(divergence_module, "token_logprobs", no_compiler)
    with pytest.raises(UserError, match=r"Failed to find C compiler\.; install gcc") as caught:
        try_losses("cpu")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
