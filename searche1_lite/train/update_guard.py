"""Skips updates with NaN or infinity: weights and optimizer state stay as they were.

The log-probs and the loss of the training pass and the gradient's norm are checked on the device and read once a step,
before the optimizer. If any is not finite, the gradients are set to None: an optimizer then changes neither weight, nor
momentum, nor step count. The step still counts as one of the stage, and so does the learning rate's warm-up.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from searche1_lite.data.trajectory import Trajectory
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.ranks import gather

SKIPS_IN_A_ROW = 3
"""Consecutive skipped updates that end a run."""

_ADVICE = {
    "rollout log-probs": "a log-prob of the rollouts is not finite",
    "log-probs": "a log-prob of the training pass is not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
}
"""Reasons to skip an update; an earlier one causes the later ones."""


class UpdateGuard(TrainerCallback):
    """Skips non-finite updates, and ends the run after `SKIPS_IN_A_ROW` of them.

    It comes after the callback that writes the step's record, so that the last skipped step is recorded.

    Args:
        stage: for messages, such as `round1.grpo`.
        setting: the learning rate's name, for the remedy.
    """

    def __init__(self, stage: str, setting: str) -> None:
        self._stage, self._setting = stage, setting
        self._seen: dict[str, torch.Tensor] = {}
        self._refused = False
        self.reason: str | None = None
        """Why the latest update was skipped: a key of `metrics.jsonl`'s `skipped`; None if it was not."""
        self.skipped = self._in_a_row = 0

    @property
    def refused(self) -> bool:
        """Whether the rollouts already rule out an update, before the training pass."""
        return self._refused

    def check_rollouts(self, trajectories: Sequence[Trajectory]) -> None:
        """Refuses the step's update if a rollout's log-probs are not finite, and drops those log-probs."""
        for trajectory in trajectories:
            if trajectory.logprobs is not None and not math.isfinite(sum(trajectory.logprobs)):
                trajectory.logprobs, self._refused = None, True

    def see(self, what: str, values: torch.Tensor) -> None:
        """Records on their device whether all `values` are finite, without synchronising.

        Args:
            what: `log-probs` or `loss`.
        """
        finite = values.detach().isfinite().all()
        self._seen[what] = finite & self._seen[what] if what in self._seen else finite

    def forget(self) -> None:
        """Drops what was recorded of a pass that is repeated."""
        self._seen = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # They were clipped before: an infinite norm has turned them into NaN.
        finite = {**self._seen, "gradient": torch.nn.utils.get_total_norm(gradients).isfinite()}
        device = next(iter(finite.values())).device  # without any gradient, its norm is not on the GPU
        read = torch.stack([flag.to(device) for flag in finite.values()]).tolist()
        fine = gather([dict(zip(finite, read, strict=True)) | {"rollout log-probs": not self._refused}])
        self.reason = next((r for r in _ADVICE if not all(found.get(r, True) for found in fine)), None)
        self._seen, self._refused = {}, False
        if self.reason is None:
            self._in_a_row = 0
            return
        model.zero_grad(set_to_none=True)
        self.skipped += 1
        self._in_a_row += 1
        say_on_stderr(f"{self._stage}, step {state.global_step + 1}: {_ADVICE[self.reason]}; this update is skipped")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Raises a UserError after `SKIPS_IN_A_ROW`."""
        if logs and "loss" in logs and self.reason is not None and self._in_a_row >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{self._stage} ends at step {state.global_step}: {self._in_a_row} updates in a row were skipped, the "
                f"last because {_ADVICE[self.reason]}. The policy is as the last sound update left it. --resume tries "
                f"again from the last checkpoint; if that ends here too, start a run with a lower {self._setting}",
                exit_code=1,
            )

    def figures(self, logs: dict[str, Any]) -> dict[str, Any]:
        """For a step's record: `loss` and `grad_norm`, None where not finite, and `skipped`, the reason or None."""
        computed = self.reason in (None, "gradient")
        norm = None if self.reason == "rollout log-probs" else finite_or_none(logs.get("grad_norm"))
        return {
            "loss": finite_or_none(logs.get("loss")) if computed else None,
            "grad_norm": norm,
            "skipped": self.reason,
        }

    def state(self) -> dict[str, int]:
        """For a checkpoint; see `restore`."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def finite_or_none(value: Any) -> Any:
    """`value`, or None for a float that JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
