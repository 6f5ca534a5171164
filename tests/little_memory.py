"""GRPO's steps and rollouts in a process to which the system really refuses memory, and once more where it does not.

    python tests/little_memory.py FOLDER    FOLDER: the talking policy's

Prints one JSON object; what the user is told goes to stderr. It is the address space that is limited; start it with
MALLOC_MMAP_THRESHOLD_=65536, so that what is freed is given back and can be had again.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import ShelfRetriever, fresh_policy, tiny_protocol_config
from test_shrinking import QUESTIONS, Policy, Stage

from searche1_lite.config import EngineConfig
from searche1_lite.data.trajectory import Passage, Trajectory
from searche1_lite.policy.shrinking import Limit
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.runtime.errors import explain

LEFT = 320 * 2**20
"""Bytes. A step asks for more than twice as much if it is made at once, and for half as much in its smallest parts."""
ROLLOUTS_LEFT = 128 * 2**20
"""The same for 128 episodes, which take about twice as much."""
A_TOKEN = 2 * 2**20
"""Bytes that a training pass is made to take for each token, in one tensor: the policy's own are too few."""


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def little_memory(policy: Policy, left: int) -> Iterator[None]:
    """From the policy's next pass on only `left` bytes are to be had."""
    usual, hard = resource.getrlimit(resource.RLIMIT_AS)

    def limit(*_: Any) -> None:
        handle.remove()
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + left, hard))

    handle = policy[0].get_base_model().base_model.register_forward_pre_hook(limit)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (usual, hard))


def steps(policy: Policy) -> Stage:
    def take(module: torch.nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            kept = [torch.empty(given["input_ids"].numel() * A_TOKEN, dtype=torch.uint8)]  # nothing is written to it
            output.last_hidden_state.register_hook(lambda gradient: kept.clear())

    handle = policy[0].get_base_model().base_model.register_forward_hook(take, with_kwargs=True)
    try:
        return Stage("grpo", policy, Path(tempfile.mkdtemp()), 100_000)
    finally:
        handle.remove()


def play(policy: Policy, slots: Limit | None) -> list[Trajectory]:
    """128 episodes with long prompts, whose keys and values are what takes the memory."""
    shelf = ShelfRetriever([Passage("1", "Lima", "Lima is the capital of Peru")])
    protocol = Protocol(policy[1], tiny_protocol_config(max_prompt_tokens=2000))
    return rollout(
        Agent(*policy, shelf, protocol, engine=EngineConfig(batch_size=128), k=1, slots=slots),
        QUESTIONS[:1],
        128,
        Sampling(("test",)),
        prompts=[[5] * 2000],
    )


def main(folder: Path) -> None:
    policy = fresh_policy(folder)
    with little_memory(policy, LEFT):
        few = steps(policy)
    enough = steps(fresh_policy(folder))
    size = float(enough.gradients[0].abs().max())
    policy, slots = fresh_policy(folder), Limit("engine.batch_size", 128)
    unlimited = play(policy, None)  # first, so that the thread that searches is there
    try:
        with little_memory(policy, ROLLOUTS_LEFT):
            play(policy, None)
        refused: Any = None
    except RuntimeError as error:
        refused = [str(error), explain(error)]
    with little_memory(policy, ROLLOUTS_LEFT):
        played = play(policy, slots)
    result = {
        "kept": [few.result.get("micro_batch_tokens"), enough.result.get("micro_batch_tokens")],
        "gradient": size,
        "difference": float((few.gradients[0] - enough.gradients[0]).abs().max()),
        "losses": [[record["loss"] for record in stage.records] for stage in (few, enough)],
        "slots": slots.value,
        "refused": refused,
        "same_episodes": [t.completion_ids for t in played] == [t.completion_ids for t in unlimited],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
