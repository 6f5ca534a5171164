"""How the processes of a launcher begin to train one policy together."""

from searche1_lite.config import Config, what_counts
from searche1_lite.runtime.ranks import (
    PATIENCE,
    check_same,
    detect_lost_process,
    error_once,
    world_size,
)


def check_share(config: Config) -> None:
    """Raises a UserError if a step cannot be split evenly among the processes, or for vLLM in several."""
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


def join(config: Config) -> None:
    """Joins the other processes, and computes on the GPU of this process's local rank."""
    if world_size() == 1:
        return
    check_share(config)
    import torch
    from accelerate import PartialState

    with detect_lost_process():
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    check_same(what_counts(config))
