"""How far apart student and teacher are at each token: the losses of offline self-distillation. Pure functions.

The exact divergences run in tiles of tokens and vocabulary (TRL's kernel), so full logits are never kept. The two
truncated forms, each an ablation, need every logit of a token at once and take the tokens in smaller chunks instead.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from searche1_lite.policy.logprobs import TOKENS_PER_TILE, token_logprobs
from searche1_lite.runtime.errors import UserError

_TOKENS_PER_CHUNK = 128
"""Of a truncated divergence; 128 tokens of Qwen's vocabulary are 78 MB of fp32 logits."""


def divergence(
    head: torch.nn.Module,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    clip: float = 0.0,
    top_k: int = 0,
) -> torch.Tensor:
    """Divergence (N,), in nats, of the next-token distributions behind hidden states (N, H).

    Args:
        head: the output embeddings that both share; no gradient reaches them.
        kind: `forward_kl` for KL(teacher || student), `reverse_kl` for KL(student || teacher), `jsd` for the
            Jensen-Shannon divergence with weight 0.5.
        temperature: divides the logits of both.
        clip: with `forward_kl`, no vocabulary entry contributes more than this; 0 for no clip.
        top_k: with `forward_kl`, only the teacher's `top_k` likeliest tokens are told apart; 0 for all.
    """
    if clip or top_k:
        chunks = [
            checkpoint(truncated_kl, *rows, head.weight, head.bias, temperature, clip, top_k, use_reentrant=False)
            for rows in zip(
                student_hidden.split(_TOKENS_PER_CHUNK), teacher_hidden.split(_TOKENS_PER_CHUNK), strict=True
            )
        ]
        return torch.cat(chunks)
    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[kind]
    tiles = [
        ChunkedDivergenceFunction.apply(
            student, head.weight, head.bias, teacher, head.weight, head.bias, beta, temperature
        )[0]
        for student, teacher in zip(
            student_hidden.split(TOKENS_PER_TILE), teacher_hidden.split(TOKENS_PER_TILE), strict=True
        )
    ]
    return torch.cat(tiles)


def truncated_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    clip: float,
    top_k: int,
) -> torch.Tensor:
    """KL(teacher || student) (N,) with each entry's term cut at `clip`, or over the teacher's `top_k` and a rest.

    A clip well below the terms of ordinary tokens can turn their gradient round and make the loss negative.
    """
    student, teacher = (
        torch.log_softmax(F.linear(hidden, weight, bias).float() / temperature, dim=-1)
        for hidden in (student_hidden, teacher_hidden)
    )
    if 0 < top_k < teacher.shape[-1]:
        likeliest = teacher.topk(top_k, dim=-1).indices
        student, teacher = (_with_tail(logprobs.gather(-1, likeliest)) for logprobs in (student, teacher))
    terms = teacher.exp() * (teacher - student)
    if clip:
        terms = terms.clamp(max=clip)
    return terms.sum(dim=-1)


def _with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """(N, k) -> (N, k + 1): the last entry is the log-probability of all that is left out."""
    kept = logprobs.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6)
    return torch.cat([logprobs, torch.log1p(-kept)], dim=-1)


def try_losses(device: str | torch.device) -> None:
    """Runs the tiled losses once, forward and backward: on a GPU, Triton compiles them on first use.

    Raises:
        UserError: if that fails, as it does without a C compiler.
    """
    # Not initialised at random: nobody's random state may notice.
    head = torch.nn.utils.skip_init(torch.nn.Linear, 16, 64, bias=False, device=device).requires_grad_(False)
    head.weight.fill_(0.1)
    hidden = torch.ones(4, 16, device=device, requires_grad=True)
    try:
        values, _ = token_logprobs(head, hidden, torch.zeros(4, dtype=torch.long, device=device))
        (values.sum() + divergence(head, hidden, hidden.detach()).sum()).backward()
    except Exception as error:  # a compiler or a header that is missing shows in several ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the GPU kernels of the losses cannot be built: {reason}; install gcc and Python's headers", exit_code=1
        ) from error
