"""What several processes need beside `runtime/ranks.py` to train one policy: a fitting config, and one run folder."""

from collections.abc import Callable
from typing import Any, cast

from searche1_lite.config import Config, what_counts
from searche1_lite.runtime.ranks import (
    PATIENCE,
    check_alike,
    error_once,
    from_first,
    is_first,
    telling_of_losses,
    uses_deepspeed,
    world_size,
)
from searche1_lite.train.checkpoint import RunFolder


def check_share(config: "Config") -> None:
    """Refuses a number of processes among which a step cannot be shared out evenly, and vLLM in several.

    Raises:
        UserError: for such a one.
    """
    if world_size() > 1 and config.engine.backend == "vllm":
        raise error_once("engine.backend=vllm is for one process; set engine.backend=torch to train with several")
    sizes = {"grpo.questions_per_step": config.grpo.questions_per_step}
    if config.ofsd.enabled:
        sizes["ofsd.batch_size"] = config.ofsd.batch_size
    for setting, size in sizes.items():
        if size % world_size():
            raise error_once(
                f"{setting}={size} is the size of a step of all processes together, and cannot be shared out among "
                f"{world_size()} of them; set it to a multiple of {world_size()}, or --num_processes to a divisor of it"
            )


def join(config: "Config") -> None:
    """Meets the other processes, and has this one compute on the GPU of its place.

    Raises:
        UserError: as `check_share` and `check_alike` do.
    """
    if world_size() == 1:
        return
    check_share(config)
    import torch
    from accelerate import PartialState

    with telling_of_losses():
        PartialState(cpu=not (torch.cuda.is_available() or uses_deepspeed()), timeout=PATIENCE)
    check_alike(what_counts(config))


def shared_folder(folder: "RunFolder") -> "RunFolder":
    """The folder as all processes may use it: see `SharedFolder`."""
    return folder if world_size() == 1 else cast("RunFolder", SharedFolder(folder))


class SharedFolder:
    """A run's folder for several processes. All call the same methods in the same order; the first one does what they
    say, and tells the others what came of it.

    Only checkpoints to go on from are read by each: the folder has to be where every process sees it.
    """

    def __init__(self, folder: "RunFolder") -> None:
        self._folder = folder
        self.path, self.summary_path = folder.path, folder.summary_path

    def release(self) -> None:
        """By the first process alone: it is called when others may be gone."""
        if is_first():
            self._folder.release()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._folder, name)

        def call(*arguments: Any, **named: Any) -> Any:
            return from_first(lambda: _told(method(*arguments, **named), self._folder))

        return call


def _told(value: Any, folder: "RunFolder") -> Any:
    """What a method gave, as far as others may know it."""
    return None if value is folder else value
