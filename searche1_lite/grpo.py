"""GRPO through TRL: its trainer, fed by our rollouts.

Vanilla GRPO: a group of rollouts a question, reward = exact match, advantage normalised within the group, one update a
batch of fresh rollouts, clipped ratio, a small KL to the adapter as the stage began. Environment tokens are masked.
What it leaves out: reuse of a batch for several updates, and skipping groups whose rewards are all equal (counted).
"""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import pad as pad_columns
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from searche1_lite.benchmarks import check_enough
from searche1_lite.config import Config
from searche1_lite.logprobs import completion_hidden, token_logprobs
from searche1_lite.model import compute_context, compute_dtype, drop_adapter, keep_adapter_fp32
from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Question, Trajectory

REFERENCE = "ref"
"""The frozen adapter that TRL adds for the KL term."""

OnStep = Callable[[dict[str, Any]], None]

Answer = Callable[[Sequence[Question], int, Sequence[int | str]], list[Trajectory]]
"""Questions, rollouts a question, and the parts of the seed -> trajectories."""


def trainer_arguments(model: PeftModel, config: Config, *, seed: int, output_dir: Path, steps: int) -> dict[str, Any]:
    """Arguments that both stages' trainers share: one process, no saving, no reporting, constant rate after warm-up."""
    return {
        "output_dir": str(output_dir),
        "seed": seed % 2**31,
        "max_steps": steps,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "use_cpu": model.device.type == "cpu",
        "bf16": compute_dtype(model.device) == torch.bfloat16,
        "dataloader_pin_memory": model.device.type != "cpu",
        "temperature": config.engine.temperature,
        "max_completion_length": config.protocol.max_completion_tokens,
    }


class StepReporter(TrainerCallback):
    """Hands each optimizer step's figures on, and stops the trainer when the time is up.

    Args:
        describe: turns TRL's log of one step into our record.
        deadline: `time.monotonic()`; the step in which it passes is the last (so at least one is done). None: no limit.
    """

    def __init__(
        self, describe: Callable[[dict[str, Any]], dict[str, Any]], on_step: OnStep, deadline: float | None
    ) -> None:
        self._describe, self._on_step, self._deadline = describe, on_step, deadline
        self._began = time.monotonic()
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = state.global_step
        if self._deadline is not None and time.monotonic() >= self._deadline:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            seconds = time.monotonic() - self._began
            self._on_step({"step": state.global_step, **self._describe(logs), "seconds": round(seconds, 3)})


class RolloutGRPOTrainer(GRPOTrainer):
    """TRL's trainer, with padding cut and only model-written tokens projected onto the vocabulary."""

    scored: torch.Tensor
    """(B, C) 1 at the model-written tokens of the batch at hand, whose log-probs are asked for."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        inputs = trim_padding(inputs)
        self.scored = inputs["completion_mask"] * inputs["tool_mask"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Log-probs and entropies (B, `logits_to_keep`), 0 where a token is not the model's; no loss of experts."""
        policy = self.accelerator.unwrap_model(model)
        logprobs, entropies = [], []
        for first in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(first, first + (batch_size or len(input_ids)))
            split = input_ids.shape[1] - logits_to_keep
            batch = trim_padding(
                {
                    "prompt_ids": input_ids[rows, :split],
                    "prompt_mask": attention_mask[rows, :split],
                    "completion_ids": input_ids[rows, split:],
                    "completion_mask": attention_mask[rows, split:],
                    "scored": self.scored[rows],
                }
            )
            keep = batch.pop("scored").bool()
            hidden = completion_hidden(policy, **batch)[keep]
            with compute_context(policy):
                found = token_logprobs(
                    policy.get_output_embeddings(), hidden, batch["completion_ids"][keep], self.temperature
                )
            for values, kept in zip(found, (logprobs, entropies), strict=True):
                # `masked_scatter` keeps the graph when nothing is scored, so that the backward pass still works.
                rowed = values.new_zeros(keep.shape).masked_scatter(keep, values)
                kept.append(pad_columns(rowed, (0, logits_to_keep - keep.shape[1])))
        return torch.cat(logprobs), torch.cat(entropies), None


def trim_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cuts columns that are padding in every row: prompts (padded on the left) and completions (on the right)."""
    prompt = int((inputs["prompt_mask"].sum(dim=1)).max())
    completion = max(1, int((inputs["completion_mask"].sum(dim=1)).max()))
    trimmed = dict(inputs)
    for key, value in inputs.items():
        if not torch.is_tensor(value) or value.dim() != 2:
            continue
        if key.startswith("prompt"):
            trimmed[key] = value[:, value.shape[1] - prompt :]
        elif value.shape[1] == inputs["completion_mask"].shape[1]:
            trimmed[key] = value[:, :completion]
    return trimmed


def exact_match_reward(prompts: list[str], completions: list[str], em: list[float], **_: Any) -> list[float]:
    """The rewards that `rollout` computed from model-written tokens; TRL's own decoded text is not looked at."""
    return em


def train_grpo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    answer: Answer,
    questions: Sequence[Question],
    config: Config,
    *,
    run_seed: int,
    round_index: int,
    output_dir: Path,
    on_step: OnStep,
    on_rollouts: Callable[[list[Trajectory]], None] | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """One GRPO stage; the trained adapter is changed in place.

    Args:
        answer: gives the fresh rollouts of the policy as it is, `group_size` a question, question by question.
        questions: training questions; each step takes `questions_per_step` of them in a seeded order.
        on_step: told each step's figures.
        on_rollouts: shown each step's trajectories.
        deadline: `time.monotonic()` after which the stage ends early.

    Returns:
        `{"steps", "rollout_seconds"}`.

    Raises:
        UserError: if there are fewer questions than one step takes.
    """
    stage = config.grpo
    if stage.steps == 0:
        return {"steps": 0, "rollout_seconds": 0.0}
    check_enough(questions, stage)
    seed = derive_seed(run_seed, "grpo", round_index)
    latest: dict[str, Any] = {"seconds": 0.0, "total": 0.0, "trajectories": []}

    def roll(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        began = time.monotonic()
        size = stage.group_size
        asked = [questions[int(key)] for key in prompts[::size]]
        if len(prompts) % size or [key for key in prompts[::size] for _ in range(size)] != list(prompts):
            raise RuntimeError("TRL no longer passes each prompt group_size times in a row; pin trl<1.17")
        trajectories = answer(asked, size, (run_seed, "grpo", round_index, trainer.state.global_step))
        latest["trajectories"], latest["seconds"] = trajectories, time.monotonic() - began
        latest["total"] += latest["seconds"]
        masks = [torch.tensor(t.loss_mask, device=model.device) for t in trajectories]
        trainer.scored = pad(masks, padding_value=0, padding_side="right")
        if on_rollouts is not None:
            on_rollouts(trajectories)
        return {
            "prompt_ids": [t.prompt_ids for t in trajectories],
            "completion_ids": [t.completion_ids for t in trajectories],
            "logprobs": None,
            "env_mask": [t.loss_mask for t in trajectories],
            "em": [t.reward for t in trajectories],
        }

    def describe(logs: dict[str, Any]) -> dict[str, Any]:
        trajectories = latest["trajectories"]
        tokens = sum(t.n_model_tokens for t in trajectories)
        return {
            "stage": "grpo",
            "round": round_index,
            "loss": logs.get("loss"),
            "reward": logs.get("reward"),
            "em": sum(t.reward for t in trajectories) / len(trajectories),
            "kl": logs.get("kl"),
            "grad_norm": logs.get("grad_norm"),
            "zero_std_fraction": logs.get("frac_reward_zero_std"),
            "searches": sum(t.n_searches for t in trajectories) / len(trajectories),
            "tokens": tokens,
            "tokens_per_second": round(tokens / latest["seconds"], 1),
            "rollout_seconds": round(latest["seconds"], 3),
            "learning_rate": logs.get("learning_rate"),
        }

    reporter = StepReporter(describe, on_step, deadline)
    arguments = GRPOConfig(
        **trainer_arguments(model, config, seed=seed, output_dir=output_dir, steps=stage.steps),
        loss_type="grpo",
        scale_rewards="group",
        epsilon=stage.clip,
        beta=stage.kl_coefficient,
        num_generations=stage.group_size,
        num_iterations=1,
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=stage.questions_per_step * stage.group_size // stage.micro_batch_size,
        learning_rate=stage.learning_rate,
        warmup_steps=round(stage.warmup_ratio * stage.steps),
        max_grad_norm=stage.max_grad_norm,
    )
    try:
        with keep_adapter_fp32(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rollout_func announces that it is experimental
            trainer = RolloutGRPOTrainer(
                model=model,
                reward_funcs=exact_match_reward,
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(questions))]}),
                processing_class=tokenizer,
                callbacks=[reporter],
                rollout_func=roll,
            )
        for name, parameter in model.named_parameters():
            if f".{REFERENCE}." in name:
                parameter.requires_grad_(False)
        drop_printer(trainer)
        trainer.train()
    finally:
        drop_adapter(model, REFERENCE)
        model.eval()
    return {"steps": reporter.steps, "rollout_seconds": round(latest["total"], 3)}


def drop_printer(trainer: Any) -> None:
    """Results go to stdout, so the trainer must not print its logs there."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
