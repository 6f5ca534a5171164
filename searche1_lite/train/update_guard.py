"""No update by numbers that are none: a step with a NaN or an infinity in it leaves weights and optimizer as they were.

What is looked at is gathered on the device and read once a step, just before the optimizer's turn: the log-probs and
the loss of the training pass, and the norm of the gradient. If any is not finite, the gradients are taken away. An
optimizer passes over a parameter without a gradient (None, not zero), so neither weight, nor momentum, nor its count of
steps moves. The step still counts as one of the stage's, and so does the learning rate's warm-up.
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
"""Skipped updates, one after the other, that end a run."""

_ADVICE = {
    "rollout log-probs": "a log-prob of the rollouts is not finite",
    "log-probs": "a log-prob of the training pass is not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
}
"""Why an update can be skipped, in the order in which one explains the next."""


class UpdateGuard(TrainerCallback):
    """Skips the updates that would spoil the policy, and ends the run where there is no end to them.

    It belongs behind the callback that writes the step's record: the last skipped step is told before the run ends.

    Args:
        stage: as the user knows it, such as `round1.grpo`.
        setting: the learning rate's, to be named where it may help.
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
        """Is it known already, before the training pass, that there will be no update?"""
        return self._refused

    def check_rollouts(self, trajectories: Sequence[Trajectory]) -> None:
        """Refuses the step's update if the rollouts' log-probs, where kept, are no numbers; such are then dropped."""
        for trajectory in trajectories:
            if trajectory.logprobs is not None and not math.isfinite(sum(trajectory.logprobs)):
                trajectory.logprobs, self._refused = None, True

    def see(self, what: str, values: torch.Tensor) -> None:
        """Takes note whether all `values` are finite, on their device: nothing is waited for.

        Args:
            what: `log-probs` or `loss`.
        """
        finite = values.detach().isfinite().all()
        self._seen[what] = finite & self._seen[what] if what in self._seen else finite

    def forget(self) -> None:
        """A pass is made anew: what was seen of it does not count."""
        self._seen = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Clipped before: a norm that was infinite has made NaNs of them.
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
        """Ends the run after `SKIPS_IN_A_ROW`.

        Raises:
            UserError: then.
        """
        if logs and "loss" in logs and self.reason is not None and self._in_a_row >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{self._stage} ends at step {state.global_step}: {self._in_a_row} updates in a row were skipped, the "
                f"last because {_ADVICE[self.reason]}. The policy is as the last sound update left it. --resume tries "
                f"again from the last checkpoint; if that ends here too, start a run with a lower {self._setting}",
                exit_code=1,
            )

    def figures(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What a step's record says of it: `loss` and `grad_norm`, None where they are no numbers, and `skipped`, the
        reason or None."""
        computed = self.reason in (None, "gradient")
        norm = None if self.reason == "rollout log-probs" else finite_or_none(logs.get("grad_norm"))
        return {
            "loss": finite_or_none(logs.get("loss")) if computed else None,
            "grad_norm": norm,
            "skipped": self.reason,
        }

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it, for `restore`."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on counting from what `state` gave."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def finite_or_none(value: Any) -> Any:
    """`value`, or None in place of a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
