"""The most memory that a stage takes: the GPU allocator's, or the process's resident memory on a CPU."""

import resource
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """`peak_memory_mb` counts from here on; without a GPU on Linux only, elsewhere from the process's start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**10, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
