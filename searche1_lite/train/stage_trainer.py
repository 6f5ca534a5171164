"""What the trainers of both stages share: their arguments, and how a step is recorded."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from searche1_lite.config import Config
from searche1_lite.policy.model import compute_dtype
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.ranks import from_first
from searche1_lite.train.stage_checkpoint import StageKeeper, saving_arguments
from searche1_lite.train.tracking import Tracked, figures_of, reporting_arguments

OnStep = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class StageTraining:
    """What both stages' trainers need beside the policy and their data."""

    config: Config
    round_index: int
    """From 1."""
    output_dir: Path
    on_step: OnStep
    """Receives each step's record, as in `metrics.jsonl`."""
    deadline: float | None = None
    """On `time.monotonic()`'s clock; the step in which it passes is the last."""
    limit: int | None = None
    """Optimizer steps, at least 1, after which the stage ends early."""
    tracked: Tracked | None = None
    """Reports to TensorBoard, trackio and wandb."""
    keeper: StageKeeper | None = None
    """Saves and restores the training."""
    stop: Stop = field(default_factory=Stop)
    """Checked between passes."""


def trainer_arguments(model: PeftModel, training: StageTraining, seed: int, steps: int) -> dict[str, Any]:
    """Arguments that both stages' trainers share: a constant rate after warm-up, the data in the given order."""
    config = training.config
    return {
        "output_dir": str(training.output_dir),
        "seed": seed % 2**31,
        "max_steps": steps,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # would synchronise with the GPU at every step; `UpdateGuard` checks this
        "disable_tqdm": True,
        "log_level_replica": "error",
        "remove_unused_columns": False,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "use_cpu": model.device.type == "cpu",
        "bf16": compute_dtype(model.device) == torch.bfloat16,
        "dataloader_pin_memory": model.device.type != "cpu",
        "temperature": config.engine.temperature,
        "max_completion_length": config.protocol.max_completion_tokens,
        "shuffle_dataset": False,  # the position in the fixed order is the step
        **saving_arguments(training.keeper),
        **reporting_arguments(training.tracked),
    }


class StepReporter(TrainerCallback):
    """Records each optimizer step, and stops the trainer at its deadline or limit.

    Callbacks that come after it find our figures in the log beside TRL's.

    Args:
        describe: turns TRL's log of one step into our record.
    """

    def __init__(self, describe: Callable[[dict[str, Any]], dict[str, Any]], training: StageTraining) -> None:
        self._describe, self._on_step, self._keeper = describe, training.on_step, training.keeper
        self._deadline, self._limit = training.deadline, training.limit
        self._began = time.monotonic()
        self.steps = 0 if self._keeper is None else self._keeper.steps  # none may be left in a resumed stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps  # the current setting, not the resumed state's

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = state.global_step
        deadline = self._deadline
        late = deadline is not None and from_first(lambda: time.monotonic() >= deadline)
        if late or (self._limit is not None and self.steps >= self._limit):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            seconds = time.monotonic() - self._began
            record = {"step": state.global_step, **self._describe(logs), "seconds": round(seconds, 3)}
            self._on_step(record)
            logs |= figures_of(record)
            state.log_history[-1] |= logs  # a resumed stage reports it again
            if self._keeper is not None:
                self._keeper.note(state.global_step)


def rows_of(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """These rows of a batch's tensors; other values are unchanged."""
    return {key: value[rows] if torch.is_tensor(value) and value.dim() else value for key, value in inputs.items()}


def drop_printer(trainer: Any) -> None:
    """Keeps the trainer's logs off stdout, where results go."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
