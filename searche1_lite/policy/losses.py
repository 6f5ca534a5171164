"""Log-probs, entropies and divergences of given tokens, without full logits. Pure functions.

Only the requested positions are projected onto the vocabulary, in tiles of tokens and vocabulary (TRL's kernels): with
a vocabulary of 151,936 the fp32 logits of one trajectory of 4,096 tokens take 2.5 GB, those of a tile 64 MB.
Shapes: B rows, P prompt and C completion tokens, N requested tokens, H hidden size, V vocabulary.
"""

import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from searche1_lite.policy.model import compute_context
from searche1_lite.runtime.errors import UserError

TOKENS_PER_TILE = 512
"""Tokens per tile."""

VOCABULARY_PER_TILE = 32768
"""Vocabulary entries per tile."""

_TOKENS_PER_CHUNK = 128
"""Of a truncated divergence, which needs all logits of a token: 78 MB in fp32 with Qwen's vocabulary."""


def hidden_states(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, L, H) of right-padded rows (B, L).

    Attention is causal, so no token sees the padding and no mask is needed, which is fastest.
    """
    with compute_context(model):
        return model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state


def completion_hidden(
    model: PeftModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """Hidden states (N, H) that predict the N requested completion tokens, row by row.

    The pass is only as wide as the longest row of prompt and completion.

    Args:
        prompt_ids: (B, P) padded on the left, `prompt_mask` 0 there.
        completion_ids: (B, C) padded on the right, `completion_mask` 0 there.
        keep: (B, C) true at the requested tokens.
    """
    ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P + C)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    width, prompts = int(mask.sum(dim=1).max()), prompt_mask.sum(dim=1)
    # Each row is rotated left by its leading padding, which moves to its end.
    columns = torch.arange(width, device=ids.device) + (prompt_ids.shape[1] - prompts).unsqueeze(1)
    hidden = hidden_states(model, ids.gather(1, columns % ids.shape[1]))  # (B, width, H)
    row, column = keep.nonzero(as_tuple=True)
    return hidden[row, prompts[row] + column - 1]


def token_logprobs(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, in nats, both (N,) and fp32.

    Args:
        head: the output embeddings; no gradient reaches them.
        hidden: (N, H) states that predict the targets.
        targets: (N,) token ids.
        temperature: divides the logits.
    """
    logprobs, entropies = [], []
    for states, ids in zip(hidden.split(TOKENS_PER_TILE), targets.split(TOKENS_PER_TILE), strict=True):
        values, entropy, *_ = ChunkedLogProbFunction.apply(
            states, head.weight, head.bias, ids, temperature, VOCABULARY_PER_TILE, None, 1.0, ("entropy",)
        )
        logprobs.append(values)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def divergence(
    head: torch.nn.Module,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    clip: float = 0.0,
    top_k: int = 0,
) -> torch.Tensor:
    """Divergence (N,), in nats, of the next-token distributions of hidden states (N, H).

    Args:
        head: the shared output embeddings; no gradient reaches them.
        kind: `forward_kl` for KL(teacher || student), `reverse_kl` for KL(student || teacher), `jsd` for the
            Jensen-Shannon divergence with weight 0.5.
        temperature: divides the logits of both.
        clip: with `forward_kl`, no vocabulary entry contributes more than this; 0 for no clip.
        top_k: with `forward_kl`, only the teacher's `top_k` likeliest tokens are distinguished; 0 for all.
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
    """KL(teacher || student) (N,) with each entry's term clipped, or over the teacher's `top_k` and the rest.

    A clip well below ordinary tokens' terms can reverse their gradient and make the loss negative.
    """
    student, teacher = (
        torch.log_softmax(F.linear(hidden, weight, bias).float() / temperature, dim=-1)
        for hidden in (student_hidden, teacher_hidden)
    )  # (N, V) each
    if 0 < top_k < teacher.shape[-1]:
        likeliest = teacher.topk(top_k, dim=-1).indices
        student, teacher = (_with_tail(logprobs.gather(-1, likeliest)) for logprobs in (student, teacher))
    terms = teacher.exp() * (teacher - student)
    if clip:
        terms = terms.clamp(max=clip)
    return terms.sum(dim=-1)


def _with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """(N, k) -> (N, k + 1): the last entry is the log-probability of all other tokens."""
    kept = logprobs.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6)
    return torch.cat([logprobs, torch.log1p(-kept)], dim=-1)


def try_losses(device: str | torch.device) -> None:
    """Runs the tiled losses once, forward and backward: on a GPU, Triton compiles them on first use.

    Raises:
        UserError: if that fails, as it does without a C compiler.
    """
    # Without random initialisation, which would change the global random state.
    head = torch.nn.utils.skip_init(torch.nn.Linear, 16, 64, bias=False, device=device).requires_grad_(False)
    head.weight.fill_(0.1)
    hidden = torch.ones(4, 16, device=device, requires_grad=True)
    try:
        values, _ = token_logprobs(head, hidden, torch.zeros(4, dtype=torch.long, device=device))
        (values.sum() + divergence(head, hidden, hidden.detach()).sum()).backward()
    except Exception as error:  # a missing compiler or header has several symptoms
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the GPU kernels of the losses cannot be built: {reason}; install gcc and Python's headers", exit_code=1
        ) from error
