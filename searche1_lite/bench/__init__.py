"""What this machine does, as ratios measured in one run: every figure stands beside a baseline of the same task.

`memory`: peak memory of each stage, beside dense steps and the memory plan. `rollout`: the engine beside TRL's tool
loop and a loop that prefills again every turn. `search`: BM25 beside bare Pyserini. `round`: which part of a round
takes how long. What it leaves out: quality, which `eval` measures.
"""

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from searche1_lite.config import Config
from searche1_lite.runtime.errors import UserError

PARTS = ("memory", "rollout", "search", "round")


def run_bench(
    config: Config | None = None,
    cap_gb: float | None = None,
    on_part: Callable[[str], None] = lambda name: None,
    *,
    parts: Sequence[str] = (),
    quick: bool = False,
) -> dict[str, Any]:
    """Measures the parts asked for.

    Args:
        config: settings whose stages' memory is measured; the other parts have workloads of their own.
        cap_gb: on a GPU, the most memory that each process of the memory part may allocate, in 10^9 bytes.
        on_part: receives the name of each measurement as it begins.
        parts: of `PARTS`; default: all, or with a config `memory` alone.
        quick: smaller workloads and one repeat: a minute instead of several, and rougher figures.

    Returns:
        `machine`, and by the name of each part what its `measure_...` returns:

        - `memory`: `workload`, and for each stage (`rollout`, `grpo`, `ofsd`) `NAME_bytes` and its companions, such as
          `grpo_vs_dense` (ours / dense); `measure_memory` lists them.
        - `rollout`: by workload, `trajectories`, `tokens` (written by the model), `environment_tokens`, `searches`,
          `decoding`; for `ours`, `trl` and `reprefill` `seconds` (the median), `seconds_spread` (least and most),
          `tokens`, `trajectories_per_second` and `tokens_per_second`; `speedup_vs_trl` and `speedup_vs_reprefill`
          (their seconds / ours); `same_tokens`, the share of trajectories that all three wrote alike, None where tokens
          are sampled; `shares` of the engine's time (`prefill`, `decode`, `search_wait`, `other`) and
          `search_wait_share`; `bandwidth_fraction` (None on a CPU); and for some
          `growth`: `trajectories`, `seconds_per_trajectory` by the number of episodes side by side, and the `knee` in
          them. On a GPU None stands for a loop, and its ratios, or a workload that ran out of memory.
        - `search`: figures in batches of 1 and 64, and their ratios; `measure_search` lists them.
        - `round`: seconds and shares of a short round of the demo; `measure_round` lists them.

    Raises:
        UserError: for a part that there is not, a config with another part than `memory`, or a measurement that fails.
    """
    check_parts(parts)
    if config is not None and (others := [part for part in parts if part != "memory"]):
        raise UserError(f"the part {others[0]} has workloads of its own; leave out --preset, --config and settings")
    chosen = list(parts) or (list(PARTS) if config is None else ["memory"])
    found: dict[str, Any] = {"machine": _machine(), "quick": quick}
    # Each is imported in its turn: the memory part measures processes of its own, and needs nothing of the others.
    if "memory" in chosen:
        from searche1_lite.bench.memory import measure_memory

        found["memory"] = measure_memory(config, cap_gb, on_part, quick)
    if "rollout" in chosen:
        from searche1_lite.bench.rollout import measure_rollouts

        found["rollout"] = measure_rollouts(quick, on_part)
    if "search" in chosen:
        from searche1_lite.bench.search import measure_search

        found["search"] = measure_search(quick, on_part)
    if "round" in chosen:
        from searche1_lite.bench.round import measure_round

        found["round"] = measure_round(quick, on_part)
    return found


def check_parts(parts: Sequence[str]) -> None:
    """Raises UserError for a part that there is not."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"bench has no part {unknown[0]!r}; there are: {', '.join(PARTS)}")


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
