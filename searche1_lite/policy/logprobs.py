"""What the policy thinks of given tokens: hidden states, log-probs and entropies, without ever holding full logits.

Only the positions asked for are projected onto the vocabulary, in tiles (TRL's kernel), a few hundred tokens at a time:
with a vocabulary of 151,936 the fp32 logits of one trajectory of 4,096 tokens would take 2.5 GB, those of a tile 64 MB.
"""

import torch
from peft import PeftModel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from searche1_lite.policy.model import compute_context

TOKENS_PER_TILE = 512
"""Tokens that are projected onto the vocabulary together."""

VOCABULARY_PER_TILE = 32768
"""Entries of the vocabulary that they are projected onto together."""


def hidden_states(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, L, H) of rows (B, L) padded at their ends, if at all. Makes no logits.

    No token looks ahead, so that none sees padding: no mask is needed, and attention runs at its fastest without.
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
    """Hidden states (N, H) that predict the N completion tokens asked for, row by row.

    The pass is as wide as the longest row, prompt and completion, whatever the padding of what is given.

    Args:
        prompt_ids: (B, P) padded on the left, `prompt_mask` 0 there.
        completion_ids: (B, C) padded on the right, `completion_mask` 0 there.
        keep: (B, C) true at the tokens asked for.
    """
    ids, mask = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)
    width, prompts = int(mask.sum(dim=1).max()), prompt_mask.sum(dim=1)
    # Each row is turned to the left by its leading padding, which comes out at its end.
    columns = torch.arange(width, device=ids.device) + (prompt_ids.shape[1] - prompts).unsqueeze(1)
    hidden = hidden_states(model, ids.gather(1, columns % ids.shape[1]))
    row, column = keep.nonzero(as_tuple=True)
    return hidden[row, prompts[row] + column - 1]


def token_logprobs(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, in nats, both (N,) and fp32.

    Args:
        head: the output embeddings; no gradient reaches them.
        hidden: (N, H) the states that predict the targets.
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
