"""What is done when memory runs out, the GPU's or a CPU's: the same work in smaller parts, to the same result.

A training step is made anew from zeroed gradients in smaller micro-batches, a rollout's unfinished episodes with fewer
slots. The smaller size is kept for the rest of the stage.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from searche1_lite.policy.microbatch import micro_batches
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.ranks import place

Result = TypeVar("Result")

_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "std::bad_alloc",
)
"""In the messages of libraries that ask for memory by themselves, and of PyTorch where the system refuses it on a CPU;
their errors are plain RuntimeErrors."""


class Limit:
    """A setting that bounds how much is computed at once, and is lowered when that turns out to be too much.

    Args:
        setting: such as `grpo.micro_batch_tokens`.
        value: as it is set.
    """

    def __init__(self, setting: str, value: int) -> None:
        self.setting, self.asked = setting, value
        self.value = value

    def reset(self) -> None:
        """A stage begins: what is set is tried again."""
        self.value = self.asked

    def figures(self) -> dict[str, int]:
        """The setting's own name and its value where it was lowered, for the stage's figures."""
        return {} if self.value == self.asked else {self.setting.rpartition(".")[2]: self.value}

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it, for `restore`."""
        return {"value": self.value}

    def restore(self, state: dict[str, int]) -> None:
        self.value = state["value"]

    def until_it_fits(
        self, attempt: Callable[[int], Result], smaller: Callable[[int], int | None], what: str, remedy: str
    ) -> Result:
        """What `attempt` gives at the first value for which the memory suffices, beginning with the present one.

        Each value that is kept is reported once.

        Args:
            attempt: does the work from its beginning; called again, it must not mind an earlier call that broke off.
            smaller: the value to try after one that was too large; None if there is none.
            what: the work, for the messages.
            remedy: what may be changed if even the smallest part of it does not fit.

        Raises:
            UserError: if there is no smaller value.
        """
        value = self.value
        while True:
            try:
                result = attempt(value)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found = smaller(value)
            # Not before: until its handler ends, the exception holds what the frames it went through held.
            give_memory_back()
            if found is None:
                raise UserError(
                    f"out of memory for {what}: {remedy}; `searche1-lite doctor` says what fits. What was saved is "
                    "kept",
                    exit_code=1,
                )
            value = found
        if value != self.value:
            self.value = value
            say_on_stderr(
                f"{place()}memory ran out in {what}: made anew with {self.setting}={value}, kept for the rest of the "
                "stage; set it in the config",
                by_any=True,
            )
        return result


def is_out_of_memory(error: BaseException) -> bool:
    """Does it say that no memory is left, on a GPU or a CPU, whoever asked for it?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def give_memory_back() -> None:
    """Frees what nobody holds, down to the driver: another size needs other blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_micro_batches(lengths: Sequence[int], budget: int) -> int | None:
    """Half of what the largest pass of several sequences takes under `budget`; None if each goes alone already.

    Args:
        lengths: tokens of each sequence.
    """
    passes = [len(batch) * lengths[batch[0]] for batch in micro_batches(lengths, budget) if len(batch) > 1]
    return max(1, max(passes) // 2) if passes else None


def in_smaller_passes(
    limit: Limit, lengths: Sequence[int], model: Any, passes: Callable[[int], Result], what: str
) -> Result:
    """A training step's `passes`, called with a budget of tokens, begun anew with a smaller one where it must be.

    Args:
        lengths: tokens of each sequence of the step.
        model: its gradients are those of the passes that succeeded, and of no other.
    """

    def attempt(budget: int) -> Result:
        model.zero_grad(set_to_none=True)
        return passes(budget)

    return limit.until_it_fits(attempt, lambda budget: smaller_micro_batches(lengths, budget), what, one_alone(lengths))


def one_alone(lengths: Sequence[int]) -> str:
    """Of a step that is too much although each sequence goes alone: what may be changed."""
    return (
        f"one sequence of {max(lengths, default=0)} tokens by itself is too much; lower "
        "protocol.max_completion_tokens, or set model.gradient_checkpointing=true if it is not"
    )
