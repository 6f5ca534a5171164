"""Offline self-distillation (OFSD): the policy learns from what it says when it is shown its own better trajectory.

After a GRPO stage the policy answers its training questions afresh. Where one rollout is right and more efficient than
a sibling, both are a pair. Along the sibling's own tokens, the student (plain prompt) is pulled towards the teacher:
the same 4-bit base with the adapter as the stage began, frozen, under a prompt that shows the better rollout. The loss
is the full-vocabulary KL(teacher || student), averaged over model-written tokens (`divergence.py`).
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.utils import pad

from searche1_lite.config import Config, OFSDStageConfig
from searche1_lite.divergence import divergence
from searche1_lite.grpo import OnStep, StepReporter, drop_printer, rows_of, trainer_arguments
from searche1_lite.logprobs import completion_hidden, token_logprobs
from searche1_lite.microbatch import micro_batches
from searche1_lite.model import compute_context, drop_adapter, keep_adapter_fp32, snapshot_adapter, use_adapter
from searche1_lite.protocol import Protocol
from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Trajectory

TEACHER = "teacher"
"""The frozen copy of the adapter."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A right and efficient rollout, and a sibling of the same question that was wrong or less efficient."""

    reference: Trajectory
    student: Trajectory


def _efficiency(trajectory: Trajectory) -> tuple[int, int]:
    return trajectory.n_searches, trajectory.n_model_tokens


def difference(one: Trajectory, other: Trajectory) -> tuple[int, float, int]:
    """How much two rollouts of a question differ, compared left to right.

    Number of searches; then the share of distinct queries they do not have in common; then model-written tokens.
    """
    ours = {" ".join(search.query.lower().split()) for search in one.searches}
    theirs = {" ".join(search.query.lower().split()) for search in other.searches}
    union = ours | theirs
    apart = 1 - len(ours & theirs) / len(union) if union else 0.0
    return abs(one.n_searches - other.n_searches), apart, abs(one.n_model_tokens - other.n_model_tokens)


def select_pairs(trajectories: Sequence[Trajectory], students: str = "any") -> tuple[list[Pair], dict[str, int]]:
    """At most one pair a question, in the order in which the questions come.

    The reference is the correct rollout with the fewest searches, then the fewest model tokens, then the lowest sample.
    The student is the rollout that differs most from it (`difference`; ties: the lowest sample): a wrong one if there
    is one, else a correct one that is less efficient.

    Args:
        trajectories: rollouts of any questions, several each.
        students: `any`, `wrong` or `correct`: which siblings may be students.

    Returns:
        The pairs, and counts: `questions`, `pairs`, `none_correct`, `none_less_efficient`, `wrong_students`,
        `correct_students`.
    """
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.question.id, []).append(trajectory)
    pairs: list[Pair] = []
    counts = dict.fromkeys(["none_correct", "none_less_efficient", "wrong_students", "correct_students"], 0)
    for group in groups.values():
        right = [t for t in group if t.correct]
        if not right:
            counts["none_correct"] += 1
            continue
        reference = min(right, key=lambda t: (*_efficiency(t), t.sample))
        wrong = [t for t in group if not t.correct] if students != "correct" else []
        worse = [t for t in right if _efficiency(t) > _efficiency(reference)] if students != "wrong" else []
        candidates = wrong or worse
        if not candidates:
            counts["none_less_efficient"] += 1
            continue
        student = max(candidates, key=lambda t: (*difference(reference, t), -t.sample))
        counts["wrong_students" if wrong else "correct_students"] += 1
        pairs.append(Pair(reference, student))
    return pairs, {"questions": len(groups), "pairs": len(pairs), **counts}


def teacher_prompts(protocol: Protocol, pairs: Sequence[Pair], kind: str, with_documents: bool) -> list[list[int]]:
    """Each pair's teacher prompt: `privileged`, `plain` (the control) or `foreign` (the next pair's reference)."""
    if kind == "plain":
        return [pair.student.prompt_ids for pair in pairs]
    shift = 1 if kind == "foreign" else 0
    return [
        protocol.privileged_prompt_ids(
            pair.student.question.question, pairs[(index + shift) % len(pairs)].reference, with_documents
        )
        for index, pair in enumerate(pairs)
    ]


def trained_tokens(trajectory: Trajectory, tokens: str) -> list[int]:
    """1 at the positions that are in the loss: all model-written ones, or only those of search turns."""
    if tokens == "all":
        return trajectory.loss_mask
    mask = [0] * len(trajectory.completion_ids)
    for turn in trajectory.turns:
        if turn.kind == "search":
            mask[turn.start : turn.end] = trajectory.loss_mask[turn.start : turn.end]
    return mask


def _padded(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> torch.Tensor:
    return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side).to(device)


@contextmanager
def as_teacher(model: PeftModel, kind: str) -> Iterator[None]:
    """The model as the teacher: the frozen snapshot, the bare base, or as it is now. No gradient."""
    adapter = nullcontext() if kind == "live" else use_adapter(model, TEACHER if kind == "snapshot" else None)
    with torch.no_grad(), adapter:
        yield


@torch.no_grad()
def token_kl(
    model: PeftModel,
    pairs: Sequence[Pair],
    prompts: Sequence[list[int]],
    *,
    pad_id: int,
    temperature: float,
    micro_batch_tokens: int,
) -> list[list[float]]:
    """KL(teacher || student) at every token of each student: teacher = the model as it is now, under `prompts`.

    Returns:
        For each pair a list as long as the student's `completion_ids`, in nats, 0.0 at environment tokens.
    """
    model.eval()
    result: list[list[float]] = [[] for _ in pairs]
    lengths = [
        max(len(pair.student.prompt_ids), len(prompt)) + len(pair.student.completion_ids)
        for pair, prompt in zip(pairs, prompts, strict=True)
    ]
    for batch in micro_batches(lengths, micro_batch_tokens):
        rows = [pairs[index].student for index in batch]
        completion = _padded([t.completion_ids for t in rows], pad_id, "right", model.device)
        mask = _padded([[1] * len(t.completion_ids) for t in rows], 0, "right", model.device)
        keep = _padded([t.loss_mask for t in rows], 0, "right", model.device).bool()
        hidden = []
        for batch_prompts in ([t.prompt_ids for t in rows], [prompts[index] for index in batch]):
            ids = _padded(batch_prompts, pad_id, "left", model.device)
            prompt_mask = _padded([[1] * len(row) for row in batch_prompts], 0, "left", model.device)
            hidden.append(completion_hidden(model, ids, prompt_mask, completion, mask, keep))
        values = torch.zeros(completion.shape, device=model.device)
        with compute_context(model):
            values[keep] = divergence(model.get_output_embeddings(), hidden[0], hidden[1], temperature=temperature)
        for index, t, found in zip(batch, rows, values, strict=True):
            result[index] = found[: len(t.completion_ids)].tolist()
    return result


def kl_diagnostics(
    model: PeftModel, protocol: Protocol, pairs: Sequence[Pair], config: Config, limit: int = 64
) -> dict[str, float]:
    """Mean KL per model-written token of the pairs, beside the same with two other teacher prompts.

    `plain` is zero by construction: it shows what numerical noise amounts to. `foreign` shows another question's
    reference: what the privileged form alone does, without the right content; it is left out where there is one pair.
    Empty where there are no pairs.
    """
    shown = pairs[:limit]
    pad_id = protocol.tokenizer.pad_token_id
    means = {}
    for kind in ("privileged", "plain", "foreign"):
        if len(shown) < (2 if kind == "foreign" else 1):
            continue
        prompts = teacher_prompts(protocol, shown, kind, config.ofsd.reference_documents)
        values = token_kl(
            model,
            shown,
            prompts,
            pad_id=pad_id,
            temperature=config.engine.temperature,
            micro_batch_tokens=config.ofsd.micro_batch_tokens,
        )
        tokens = sum(pair.student.n_model_tokens for pair in shown)
        means["pairs" if kind == "privileged" else kind] = sum(map(sum, values)) / max(1, tokens)
    return means


class OFSDTrainer(DistillationTrainer):
    """TRL's distillation trainer on stored trajectories: nothing is generated, and the teacher has its own prompt."""

    def __init__(self, *args: Any, rows: Sequence[dict[str, Any]], settings: Any, **kwargs: Any) -> None:
        self._rows, self._settings = rows, settings
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Pads the stored ids of one optimizer step's pairs."""
        rows = [self._rows[int(example["prompt"])] for example in inputs]
        device, pad_id = self.accelerator.device, self._tokenizer.pad_token_id
        batch: dict[str, Any] = {}
        for key, prefix, side in (
            ("prompt", "prompt", "left"),
            ("teacher_prompt", "prompt_teacher", "left"),
            ("completion", "completion", "right"),
        ):
            batch[f"{prefix}_ids"] = _padded([row[key] for row in rows], pad_id, side, device)
            batch[f"{prefix}_mask"] = _padded([[1] * len(row[key]) for row in rows], 0, side, device)
        batch["loss_mask"] = _padded([row["mask"] for row in rows], 0, "right", device)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["loss_mask"].sum()).sum()
        return batch

    def _compute_loss(self, unwrapped_student: PeftModel, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """A micro-batch's sum of the per-token loss over the step's number of trained tokens: they add up exactly."""
        settings = self._settings
        keep = inputs["loss_mask"].bool()
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        teacher_hidden = None
        if settings.objective == "distill":
            # Before the student's pass: recomputed activations must find the student's adapter active.
            with as_teacher(unwrapped_student, settings.teacher):
                teacher_hidden = completion_hidden(
                    unwrapped_student,
                    inputs["prompt_teacher_ids"],
                    inputs["prompt_teacher_mask"],
                    completion,
                    mask,
                    keep,
                )
        hidden = completion_hidden(
            unwrapped_student, inputs["prompt_ids"], inputs["prompt_mask"], completion, mask, keep
        )
        head = unwrapped_student.get_output_embeddings()
        with compute_context(unwrapped_student):
            if teacher_hidden is None:
                losses = -token_logprobs(head, hidden, completion[keep], self.temperature)[0]
            else:
                losses = divergence(
                    head,
                    hidden,
                    teacher_hidden,
                    settings.divergence,
                    self.temperature,
                    settings.clip,
                    settings.top_k,
                )
        items = num_items_in_batch if num_items_in_batch is not None else keep.sum().clamp(min=1)
        return losses.sum() / items, torch.zeros((), device=losses.device), keep.sum()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a whole step and its gradient, in micro-batches. A pair without a token in the loss is left out;
        if all are, there is no gradient and nothing moves."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._step += 1
        prompts = torch.maximum(inputs["prompt_mask"].sum(dim=1), inputs["prompt_teacher_mask"].sum(dim=1))
        lengths = prompts + inputs["completion_mask"].sum(dim=1)
        trained = inputs["loss_mask"].any(dim=1).nonzero().flatten()
        total = torch.zeros((), device=lengths.device)
        for batch in micro_batches(lengths[trained].tolist(), self._settings.micro_batch_tokens):
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, rows_of(inputs, trained[batch]))
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


def training_rows(protocol: Protocol, pairs: Sequence[Pair], config: Config) -> list[dict[str, Any]]:
    """What the trainer needs of each pair, as ids: `prompt`, `teacher_prompt`, `completion`, and the loss `mask`."""
    stage = config.ofsd
    prompts = teacher_prompts(protocol, pairs, stage.teacher_prompt, stage.reference_documents)
    rows = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        trajectory = pair.student if stage.objective == "distill" else pair.reference
        rows.append(
            {
                "prompt": trajectory.prompt_ids,
                "teacher_prompt": prompt if stage.objective == "distill" else trajectory.prompt_ids,
                "completion": trajectory.completion_ids,
                "mask": trained_tokens(trajectory, stage.tokens),
            }
        )
    return rows


def ofsd_steps(pairs: Sequence[Pair], stage: OFSDStageConfig) -> int:
    """Optimizer steps of a stage with these pairs; a lone pair has no foreign reference to learn from."""
    if stage.teacher_prompt == "foreign" and len(pairs) < 2:
        return 0
    return math.ceil(stage.epochs * len(pairs) / stage.batch_size)


def train_ofsd(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    pairs: Sequence[Pair],
    config: Config,
    *,
    run_seed: int,
    round_index: int,
    output_dir: Path,
    on_step: OnStep,
    deadline: float | None = None,
) -> dict[str, Any]:
    """One OFSD stage; the trained adapter is changed in place, the snapshot is dropped at the end.

    Returns:
        `{"steps"}`: updates done; none without pairs, or with one alone for a foreign reference.
    """
    stage = config.ofsd
    steps = ofsd_steps(pairs, stage)
    if steps == 0:
        return {"steps": 0}
    seed = derive_seed(run_seed, "ofsd", round_index)
    order: list[int] = []
    rng = Random(seed)
    while len(order) < steps * stage.batch_size:
        order += rng.sample(range(len(pairs)), len(pairs))

    def describe(logs: dict[str, Any]) -> dict[str, Any]:
        return {
            "stage": "ofsd",
            "round": round_index,
            "loss": logs.get("loss"),
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
        }

    reporter = StepReporter(describe, on_step, deadline)
    arguments = DistillationConfig(
        **trainer_arguments(model, config, seed=seed, output_dir=output_dir, steps=steps),
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        warmup_steps=round(stage.warmup_ratio * steps),
        max_grad_norm=stage.max_grad_norm,
        shuffle_dataset=False,
    )
    snapshot_adapter(model, TEACHER)
    try:
        with keep_adapter_fp32(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = OFSDTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict(
                    {"prompt": [str(index) for index in order[: steps * stage.batch_size]]}
                ),
                processing_class=tokenizer,
                callbacks=[reporter],
                rows=training_rows(protocol, pairs, config),
                settings=stage,
            )
        drop_printer(trainer)
        trainer.train()
    finally:
        drop_adapter(model, TEACHER)
        model.eval()
    return {"steps": reporter.steps}
