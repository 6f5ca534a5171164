"""Offline self-distillation (OFSD): the policy learns from itself under a prompt that shows its own better trajectory.

Student and teacher both read the student trajectory's tokens. The student sees the plain prompt; the teacher is the
same 4-bit base with the adapter of the stage's start, frozen, and sees the reference trajectory in its prompt. The loss
is the full-vocabulary forward KL(teacher || student), averaged over the model-written tokens (`policy/losses.py`).
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.policy.adapter import drop_adapter, keep_adapter_fp32, snapshot_adapter, use_adapter
from searche1_lite.policy.losses import completion_hidden, divergence, token_logprobs
from searche1_lite.policy.microbatch import micro_batches
from searche1_lite.policy.model import compute_context
from searche1_lite.policy.shrinking import Limit, in_smaller_passes
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.ranks import (
    average,
    average_gradients,
    fail_together,
    from_first,
    no_reduction,
    world_size,
)
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.train.pairs import Pair, teacher_prompts
from searche1_lite.train.stage_checkpoint import ResumableTrainer, train
from searche1_lite.train.stage_trainer import StageTraining, StepReporter, drop_printer, rows_of, trainer_arguments
from searche1_lite.train.tracking import reporting
from searche1_lite.train.update_guard import UpdateGuard

TEACHER = "teacher"
"""The frozen copy of the adapter."""


def trained_tokens(trajectory: Trajectory, tokens: str) -> list[int]:
    """(C,) loss mask: 1 at all model-written tokens, or only at those of search turns."""
    if tokens == "all":
        return trajectory.loss_mask
    mask = [0] * len(trajectory.completion_ids)
    for turn in trajectory.turns:
        if turn.kind == "search":
            mask[turn.start : turn.end] = trajectory.loss_mask[turn.start : turn.end]
    return mask


def padded(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> torch.Tensor:
    return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side).to(device)


@contextmanager
def as_teacher(model: PeftModel, kind: str) -> Iterator[None]:
    """The model as the teacher, without gradients: with the frozen snapshot, without adapter, or with the live one."""
    adapter = nullcontext() if kind == "live" else use_adapter(model, TEACHER if kind == "snapshot" else None)
    with torch.no_grad(), adapter:
        yield


class OFSDTrainer(ResumableTrainer, DistillationTrainer):
    """TRL's distillation trainer on stored trajectories: nothing is generated, and the teacher has its own prompt.

    Shapes: B pairs, P prompt and C completion tokens, N tokens in the loss.
    """

    def __init__(
        self,
        *args: Any,
        rows: Sequence[dict[str, Any]],
        settings: OFSDStageConfig,
        guard: UpdateGuard,
        stop: Stop,
        **kwargs: Any,
    ) -> None:
        self._rows, self._settings, self._guard, self._stop = rows, settings, guard, stop
        self.passes = Limit("ofsd.micro_batch_tokens", settings.micro_batch_tokens)
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded batch of one optimizer step: ids and masks (B, P) and (B, C), and the loss mask (B, C)."""
        rows = [self._rows[int(example["prompt"])] for example in inputs]
        device, pad_id = self.accelerator.device, self._tokenizer.pad_token_id
        batch: dict[str, Any] = {}
        for key, prefix, side in (
            ("prompt", "prompt", "left"),
            ("teacher_prompt", "prompt_teacher", "left"),
            ("completion", "completion", "right"),
        ):
            batch[f"{prefix}_ids"] = padded([row[key] for row in rows], pad_id, side, device)
            batch[f"{prefix}_mask"] = padded([[1] * len(row[key]) for row in rows], 0, side, device)
        batch["loss_mask"] = padded([row["mask"] for row in rows], 0, "right", device)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["loss_mask"].sum()).sum()
        return batch

    def _compute_loss(self, unwrapped_student: PeftModel, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """A micro-batch's summed token losses over the step's number of loss tokens, so that micro-batches add up."""
        settings = self._settings
        keep = inputs["loss_mask"].bool()
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        teacher_hidden = None
        if settings.objective == "distill":
            # Before the student's pass, so that recomputed activations find the student's adapter active.
            with as_teacher(unwrapped_student, settings.teacher):
                teacher_hidden = completion_hidden(
                    unwrapped_student,
                    inputs["prompt_teacher_ids"],
                    inputs["prompt_teacher_mask"],
                    completion,
                    mask,
                    keep,
                )  # (N, hidden)
        hidden = completion_hidden(
            unwrapped_student, inputs["prompt_ids"], inputs["prompt_mask"], completion, mask, keep
        )  # (N, hidden)
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
                )  # (N,)
        items = num_items_in_batch if num_items_in_batch is not None else keep.sum().clamp(min=1)
        return losses.sum() / items, torch.zeros((), device=losses.device), keep.sum()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a whole step and its gradient, in micro-batches. Pairs without a loss token are left out."""
        model.train()
        policy = self.accelerator.unwrap_model(model)
        inputs = self._prepare_inputs(inputs)
        self._step += 1
        prompts = torch.maximum(inputs["prompt_mask"].sum(dim=1), inputs["prompt_teacher_mask"].sum(dim=1))
        lengths = prompts + inputs["completion_mask"].sum(dim=1)
        trained = inputs["loss_mask"].any(dim=1).nonzero().flatten()
        sizes = lengths[trained].tolist()

        def passes(budget: int) -> torch.Tensor:
            return self._passes(policy, inputs, [trained[batch] for batch in micro_batches(sizes, budget)])

        with fail_together(self._stop), no_reduction(self.accelerator):
            total = in_smaller_passes(self.passes, sizes, policy, passes, "an OFSD step")
        average_gradients(policy)
        total = average(total)
        self._guard.see("loss", total)
        return total.nan_to_num(0.0, 0.0, 0.0)  # the Trainer's running mean would stay NaN

    def _passes(self, model: Any, inputs: dict[str, Any], batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Loss and gradient of these micro-batches of pairs, and TRL's metrics of them."""
        total = torch.zeros((), device=inputs["loss_mask"].device)
        noted = {name: len(values) for name, values in self._metrics["train"].items()}
        try:
            for batch in batches:
                self._stop.check()
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, rows_of(inputs, batch))
                self.accelerator.backward(loss)
                total += loss.detach()
        except BaseException:
            for name, values in self._metrics["train"].items():
                del values[noted.get(name, 0) :]  # the passes are repeated
            raise
        return total


def training_rows(protocol: Protocol, pairs: Sequence[Pair], config: Config) -> list[dict[str, Any]]:
    """Each pair's ids: `prompt`, `teacher_prompt`, `completion`, and the loss `mask`."""
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
    training: StageTraining,
) -> dict[str, Any]:
    """One OFSD stage; the trained adapter is changed in place, the snapshot is dropped at the end.

    Returns:
        `{"steps"}`: updates done, skipped ones included; none without pairs, or with one alone for a foreign reference.
        Where there were any, also `skipped`, the number of those, and `micro_batch_tokens` if memory made it smaller.

    Raises:
        UserError: if update after update has to be skipped.
        Interrupted: if it was stopped.
    """
    config, stage, keeper = training.config, training.config.ofsd, training.keeper
    steps = ofsd_steps(pairs, stage)
    if steps == 0:
        return {"steps": 0}
    seed = derive_seed(config.seed, "ofsd", training.round_index)
    order: list[int] = []
    rng = Random(seed)
    while len(order) < steps * stage.batch_size:
        order += rng.sample(range(len(pairs)), len(pairs))

    def describe(logs: dict[str, Any]) -> dict[str, Any]:
        record = {
            "stage": "ofsd",
            "round": training.round_index,
            **guard.figures(logs),
            "learning_rate": logs.get("learning_rate"),
        }
        return from_first(lambda: record)

    guard = UpdateGuard(f"round{training.round_index}.ofsd", "ofsd.learning_rate")
    reporter = StepReporter(describe, training)
    arguments = DistillationConfig(
        **trainer_arguments(model, training, seed, steps),
        per_device_train_batch_size=stage.batch_size // world_size(),
        learning_rate=stage.learning_rate,
        warmup_steps=round(stage.warmup_ratio * steps),
        max_grad_norm=stage.max_grad_norm,
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
                callbacks=[reporter, guard],
                rows=training_rows(protocol, pairs, config),
                settings=stage,
                stop=training.stop,
                guard=guard,
            )
        drop_printer(trainer)
        if keeper is not None:
            keeper.hold(guard=guard, passes=trainer.passes)
        with reporting(trainer, training.tracked):
            train(trainer, keeper)
    finally:
        drop_adapter(model, TEACHER)
        model.eval()
    return {"steps": reporter.steps, "skipped": guard.skipped} | trainer.passes.figures()
