"""Several processes that train one policy, a GPU each: `accelerate launch -m searche1_lite train ...`.

Every process holds the whole policy and runs the same code in the same order:

    rollouts     each process plays its share of the questions; the trajectories are gathered by all
    training     TRL gives each its share of a step's questions or pairs; gradients are averaged once a step
    the folder   the first process reads and writes it, and broadcasts what it read (`on_first_process`)
    decisions    stopping and failing are agreed on, clocks are read by the first process

With one process these functions do nothing. The policy itself is not sharded: its 4-bit base fits one GPU.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from searche1_lite.runtime.errors import UserError, explain
from searche1_lite.runtime.interrupt import Interrupted, Stop

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
P = ParamSpec("P")

PATIENCE = timedelta(hours=4)
"""How long a process waits for the others, such as for a download; a dead one is noticed at once."""

REPORTER_TIME_S = 30.0
"""How long a process without an error message waits for the one that has it; the launcher ends it sooner."""

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_LOST_PROCESS_MESSAGES = ("peer", "gloo", "nccl", "broken pipe", "tcpstore")
"""Parts of PyTorch's messages about a lost process; only some of these errors have a type of their own."""


class ReportedElsewhereError(UserError):
    """An error that another process reports; this one exits silently."""

    reported_elsewhere = True


def is_launched() -> bool:
    """Whether `accelerate launch`, `torchrun` or the like started this process."""
    return all(name in os.environ for name in _LAUNCHED)


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_first() -> bool:
    """Whether this process reads, writes and prints for all."""
    return rank() == 0


def place() -> str:
    """The prefix of a message of this process alone; empty for the first."""
    return "" if is_first() else f"process {rank()}: "


def check_single_process(what: str) -> None:
    """Raises a UserError if there are several processes."""
    if world_size() > 1:
        raise error_once(f"{what} is for one process; start it without a launcher (`train` is what runs on several)")


def error_once(message: str) -> UserError:
    """An error that every process raises by itself; only the first reports it."""
    return UserError(message) if is_first() else ReportedElsewhereError(message)


def let_the_reporter_exit_first() -> None:
    """Waits before this process exits: the launcher ends all others as soon as one exits."""
    time.sleep(REPORTER_TIME_S)


def check_same(settings: dict[str, Any]) -> None:
    """Raises a UserError that names the first value in which a process differs from the first one."""
    given = gather([settings])
    for place, theirs in enumerate(given):
        for name, value in given[0].items():
            if theirs.get(name) != value:
                raise error_once(
                    f"the processes were not given the same: {name} is {value!r} in the first and {theirs.get(name)!r} "
                    f"in process {place}; start all with the same settings and files"
                )


@contextmanager
def local_main_first() -> Iterator[None]:
    """Around downloads and builds: one process on each machine goes first, and all raise a UserError if one does."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    leads, failed = PartialState().is_local_main_process, None
    if not leads:
        _end_if_failed(None)
    try:
        yield
    except UserError as error:
        failed = error
    if leads:
        _end_if_failed(failed)
    _end_if_failed(failed)


def wait_for_all() -> None:
    """Goes on when every process has come here."""
    gather([None])


def leave() -> None:
    """Leaves the process group, when all have finished."""
    if world_size() > 1:
        wait_for_all()
        from accelerate import PartialState

        PartialState().destroy_process_group()


def share(count: int) -> slice:
    """This process's share of `count` items: consecutive slices in the order of the ranks."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gather(items: list[T]) -> list[T]:
    """The items of all processes, in the order of the ranks: JSON values and paths."""
    if world_size() == 1:
        return items
    return [item for each in _exchange(items) for item in each]


def from_first(make: Callable[[], T]) -> T:
    """The result of `make` in the first process, which alone calls it; nested calls are its own.

    Raises:
        UserError: that `make` raised there, or for an OSError; as `ReportedElsewhereError` in the other processes.
    """
    global _for_all
    if world_size() == 1 or _for_all:
        return make()
    result: Any = None
    failed: UserError | None = None
    if is_first():
        _for_all = True
        try:
            result = [make(), None]
        except (UserError, OSError) as error:
            message, code = explain(error) or (str(error), 1)
            failed, result = UserError(message, code), [None, (message, code)]
        finally:
            _for_all = False
    value, fault = _exchange(result)[0]
    if failed is not None:
        raise failed
    if fault is not None:
        raise ReportedElsewhereError(*fault)
    return value


_for_all = False
"""Whether the first process is within `from_first`."""


def on_first_process(method: Callable[P, T]) -> Callable[P, T]:
    """A method that the first process calls for all (`from_first`)."""

    @wraps(method)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        return from_first(lambda: method(*arguments, **named))

    return call


def _exchange(value: Any) -> list[Any]:
    """Every process's value, in the order of the ranks; as JSON, since PyTorch's own collective pickles objects."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    device = PartialState().device
    said = torch.frombuffer(bytearray(json.dumps(value, default=_as_json).encode()), dtype=torch.uint8).to(device)
    with detect_lost_process():
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(said)], device=device))
        longest = max(int(size) for size in sizes)
        found = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world_size())]
        dist.all_gather(found, torch.nn.functional.pad(said, (0, longest - len(said))))
    texts = [bytes(each[: int(size)].cpu().numpy()) for each, size in zip(found, sizes, strict=True)]
    return [json.loads(text, object_hook=_from_json) for text in texts]


_PATH = "searche1_lite.path"
"""The key that marks a path in JSON; no record uses it."""


def _as_json(value: Any) -> dict[str, str]:
    if isinstance(value, Path):
        return {_PATH: str(value)}
    raise TypeError(f"{type(value).__name__} is not sent from process to process")


def _from_json(found: dict[str, Any]) -> Any:
    return Path(found[_PATH]) if _PATH in found else found


@contextmanager
def fail_together(stop: Stop | None = None) -> Iterator[None]:
    """Around work that each process does alone: if one fails or is interrupted, all raise, and none waits forever.

    Raises:
        Interrupted: in all of them, if any was asked to stop.
        UserError: in all of them, if any has failed.
    """
    if world_size() == 1:
        yield
        return
    failed: UserError | None = None
    try:
        yield
    except Interrupted:
        pass  # `stop` knows of it
    except UserError as error:
        failed = error
    _end_if_failed(failed)
    if stop is not None and (signum := next((signum for signum in gather([stop.signum]) if signum is not None), None)):
        raise Interrupted(signum)


def _end_if_failed(failed: UserError | None) -> None:
    """Raises in all processes if any has failed; the first of those reports its error."""
    found = gather([None if failed is None else (str(failed), failed.exit_code)])
    for place, fault in enumerate(found):
        if fault is not None:
            if failed is not None and place == rank():
                raise failed
            raise ReportedElsewhereError(f"process {place} has failed: {fault[0]}", fault[1])


@contextmanager
def detect_lost_process() -> Iterator[None]:
    """Around collectives: raises a UserError if another process is lost."""
    try:
        yield
    except RuntimeError as error:
        kind = type(error).__name__.startswith("Dist")  # torch.distributed's own
        if world_size() == 1 or not (kind or any(sign in str(error).lower() for sign in _LOST_PROCESS_MESSAGES)):
            raise
        raise UserError(
            f"another of the {world_size()} processes is gone, or does not answer; what it said before tells why, if "
            "anything does. What was saved is kept: the same command with --resume goes on from there",
            exit_code=1,
        ) from error


def average_gradients(model: "torch.nn.Module") -> None:
    """Averages each gradient over the processes, once a step: they do not have the same number of passes.

    A parameter without a gradient in any process keeps None.
    """
    if world_size() == 1:
        return
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    there = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=trained[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = _mean(torch.cat([there, *(part.flatten().float() for part in parts)]))
    flags, *means = flat.split([len(trained), *(part.numel() for part in parts)])
    for parameter, flag, mean in zip(trained, flags.tolist(), means, strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if flag else None


def average(value: "torch.Tensor") -> "torch.Tensor":
    """The mean over the processes."""
    return value if world_size() == 1 else _mean(value.clone())


def _mean(values: "torch.Tensor") -> "torch.Tensor":
    import torch.distributed as dist

    with detect_lost_process():
        dist.all_reduce(values)
    return values.div_(world_size())


@contextmanager
def no_reduction(accelerator: Any) -> Iterator[None]:
    """Within, TRL's metrics are this process's own: processes do not have the same number of passes."""
    if world_size() == 1:
        yield
        return
    alone: dict[str, Callable[..., Any]] = {"gather": _same, "gather_for_metrics": _same, "reduce": _same}
    vars(accelerator).update(alone)
    try:
        yield
    finally:
        for name in alone:
            del vars(accelerator)[name]


def _same(value: T, *_: Any, **__: Any) -> T:
    return value


def merged(parts: Sequence[tuple[dict[str, float], int]]) -> tuple[dict[str, float], int]:
    """Sums by name and numbers of tokens, added up over the parts."""
    sums: dict[str, float] = {}
    for part, _ in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums, sum(tokens for _, tokens in parts)
