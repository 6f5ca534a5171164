"""Measurements before an OFSD stage: where and how far the teacher differs from the student. Nothing is trained here.

The method assumes that the reference brings something that the policy does not already do. So the pairs' KL is reported
beside two controls, and each token's KL is kept for the trace viewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.policy.losses import completion_hidden, divergence
from searche1_lite.policy.microbatch import micro_batches
from searche1_lite.policy.model import compute_context
from searche1_lite.policy.shrinking import Limit, one_alone, smaller_micro_batches
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.train.ofsd import padded
from searche1_lite.train.pairs import Pair, teacher_prompts
from searche1_lite.train.session import Session

WATCHED = 64
"""Pairs that are measured, at most."""

_TOKENS_PER_CHUNK = 128
"""Tokens whose full logits are held at a time, for the teacher's likeliest token."""


@dataclass(frozen=True, slots=True)
class TokenKL:
    """Lists as long as the trajectory's `completion_ids`."""

    kl: list[float]
    """KL(teacher || student) in nats; 0.0 at environment tokens."""
    teacher: list[int]
    """The teacher's likeliest token; -1 at environment tokens."""


def pass_lengths(pairs: Sequence[Pair], prompts: Sequence[list[int]]) -> list[int]:
    """Tokens of each student with the longer of its two prompts."""
    return [
        max(len(pair.student.prompt_ids), len(prompt)) + len(pair.student.completion_ids)
        for pair, prompt in zip(pairs, prompts, strict=True)
    ]


@torch.no_grad()
def token_kl(
    model: PeftModel,
    pairs: Sequence[Pair],
    prompts: Sequence[list[int]],
    *,
    pad_id: int,
    temperature: float,
    micro_batch_tokens: int,
    stop: Stop | None = None,
) -> list[TokenKL]:
    """KL of each student's tokens between the model under `prompts` (teacher) and under the student's own prompt."""
    model.eval()
    head = model.get_output_embeddings()
    result: list[TokenKL | None] = [None] * len(pairs)
    for batch in micro_batches(pass_lengths(pairs, prompts), micro_batch_tokens):
        if stop is not None:
            stop.check()
        rows = [pairs[index].student for index in batch]
        completion = padded([t.completion_ids for t in rows], pad_id, "right", model.device)
        mask = padded([[1] * len(t.completion_ids) for t in rows], 0, "right", model.device)
        keep = padded([t.loss_mask for t in rows], 0, "right", model.device).bool()
        hidden = []
        for batch_prompts in ([t.prompt_ids for t in rows], [prompts[index] for index in batch]):
            ids = padded(batch_prompts, pad_id, "left", model.device)
            prompt_mask = padded([[1] * len(row) for row in batch_prompts], 0, "left", model.device)
            hidden.append(completion_hidden(model, ids, prompt_mask, completion, mask, keep))
        values = torch.zeros(completion.shape, device=model.device)
        likeliest = torch.full_like(completion, -1)
        with compute_context(model):
            values[keep] = divergence(head, hidden[0], hidden[1], temperature=temperature)
            chunks = [head(chunk).argmax(dim=-1) for chunk in hidden[1].split(_TOKENS_PER_CHUNK)]
        likeliest[keep] = torch.cat(chunks)
        for index, t, found, best in zip(batch, rows, values, likeliest, strict=True):
            length = len(t.completion_ids)
            result[index] = TokenKL(found[:length].tolist(), best[:length].tolist())
    return [found for found in result if found is not None]


def watch(
    model: PeftModel,
    protocol: Protocol,
    rollouts: Sequence[Trajectory],
    pairs: Sequence[Pair],
    config: Config,
    stop: Stop | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean KL per model-written token of the pairs beside two other teacher prompts, and the KL of single tokens.

    Args:
        rollouts: all rollouts that the pairs were chosen from.

    Returns:
        The means: `pairs`; `plain`, zero by construction up to numerical noise; and `foreign`, with another question's
        reference: the effect of the privileged form without the right content (needs two pairs). Empty without pairs.

        A record for each rollout of the watched questions: `question_id`, `sample`, `role` (`student`, `reference` or
        `sibling`), `reference_sample`, `student_sample` and, beside the trajectory's `turns`, `turns` with `pieces`
        (the decoded tokens, end token included), `kl` (nats) and `teacher` (its likeliest token).
    """
    shown = pairs[:WATCHED]
    groups: dict[str, list[Trajectory]] = {pair.student.question.id: [] for pair in shown}
    for trajectory in rollouts:
        if trajectory.question.id in groups:
            groups[trajectory.question.id].append(trajectory)
    siblings = [Pair(pair.reference, t) for pair in shown for t in groups[pair.student.question.id]]
    students = {pair.student.question.id: pair.student for pair in shown}
    tokens = max(1, sum(pair.student.n_model_tokens for pair in shown))
    limit = Limit("ofsd.micro_batch_tokens", config.ofsd.micro_batch_tokens)

    def measure(rows: Sequence[Pair], kind: str) -> list[TokenKL]:
        prompts = teacher_prompts(protocol, rows, kind, config.ofsd.reference_documents)

        def attempt(budget: int) -> list[TokenKL]:
            return token_kl(
                model,
                rows,
                prompts,
                pad_id=protocol.tokenizer.pad_token_id,
                temperature=config.engine.temperature,
                micro_batch_tokens=budget,
                stop=stop,
            )

        lengths = pass_lengths(rows, prompts)
        smaller = partial(smaller_micro_batches, lengths)
        return limit.until_it_fits(attempt, smaller, "the look at the pairs", one_alone(lengths))

    means: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    if shown:
        found = measure(siblings, "privileged")
        total = 0.0
        for pair, values in zip(siblings, found, strict=True):
            student = students[pair.student.question.id]
            if pair.student is student:
                total += sum(values.kl)
            records.append(_record(protocol.tokenizer, pair, student, values))
        means["pairs"] = total / tokens
        for kind in ("plain", "foreign")[: len(shown)]:
            means[kind] = sum(sum(values.kl) for values in measure(shown, kind)) / tokens
    return means, records


def compare_teacher(
    session: Session, pairs: Sequence[Pair], name: str, seed_parts: Sequence[int | str], limit: int = WATCHED
) -> dict[str, dict[str, float]]:
    """Fresh sampled answers to the pairs' questions under both prompts, with the same weights.

    Returns:
        `{"teacher", "student"}`, each with `em` and `searches_per_question`; empty without pairs.
    """
    shown = pairs[:limit]
    kinds = {"student": "plain", "teacher": "privileged"}
    result: dict[str, dict[str, float]] = {}
    for who, kind in kinds.items() if shown else ():
        prompts = teacher_prompts(session.protocol, shown, kind, session.config.ofsd.reference_documents)
        questions = [pair.reference.question for pair in shown]
        episodes = session.rollout_task(f"{name} ({kind})", questions, 1, Sampling(seed_parts), prompts)
        metrics = evaluate(episodes, session.config.seed)
        result[who] = {key: metrics[key] for key in ("em", "searches_per_question")}
    return result


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" within a character of several tokens."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, index) or "" for index in ids]


def _record(tokenizer: PreTrainedTokenizerBase, pair: Pair, student: Trajectory, values: TokenKL) -> dict[str, Any]:
    shown = pair.student
    roles = {id(pair.reference): "reference", id(student): "student"}
    turns = [
        {
            "pieces": token_pieces(tokenizer, shown.completion_ids[turn.start : turn.end]),
            "kl": [round(value, 4) for value in values.kl[turn.start : turn.end]],
            "teacher": [tokenizer.decode([index]) for index in values.teacher[turn.start : turn.end]],
        }
        for turn in shown.turns
    ]
    return {
        "question_id": shown.question.id,
        "sample": shown.sample,
        "role": roles.get(id(shown), "sibling"),
        "reference_sample": pair.reference.sample,
        "student_sample": student.sample,
        "turns": turns,
    }
