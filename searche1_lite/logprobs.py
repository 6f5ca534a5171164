"""What the policy thinks of given tokens: hidden states, log-probs and entropies, without ever holding full logits.

Only the positions asked for are projected onto the vocabulary, in tiles (TRL's kernel), a few hundred tokens at a time:
with a vocabulary of 151,936 the fp32 logits of one trajectory of 4,096 tokens would take 2.5 GB, those of a tile 64 MB.
"""

import torch
from peft import PeftModel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from searche1_lite.model import compute_context

TOKENS_PER_TILE = 512
"""Tokens that are projected onto the vocabulary together."""

_VOCABULARY_PER_TILE = 32768


def completion_hidden(
    model: PeftModel,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> torch.Tensor:
    """Hidden states (B, C, H) that predict each completion token; prompts are padded on the left. Makes no logits."""
    backbone = model.get_base_model().base_model
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    with compute_context(model):
        hidden = backbone(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1), attention_mask=mask, use_cache=False
        ).last_hidden_state
    return hidden[:, prompt_ids.shape[1] - 1 : -1]


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
            states, head.weight, head.bias, ids, temperature, _VOCABULARY_PER_TILE, None, 1.0, ("entropy",)
        )
        logprobs.append(values)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)
