"""What this machine has, and what a configuration will ask of it: the checks and the memory plan of `doctor`."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searche1_lite.config import Config
from searche1_lite.policy.capacity import CUDA_RESERVE, GIB, gpu_capacity, model_shape
from searche1_lite.policy.microbatch import fullest
from searche1_lite.runtime.errors import UserError, first_line

if TYPE_CHECKING:
    from searche1_lite.policy.memory import MemoryPlan

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "pyserini")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `warn`: it works, or is not needed here, but should be known."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


def examine(config: Config, gpu_gib: float | None = None) -> dict[str, Any]:
    """Looks at everything a run of `config` needs. Downloads nothing but the model's `config.json`.

    Args:
        gpu_gib: plan for a card of this size, with bf16, instead of the one that is here.

    Returns:
        `checks` (`[{name, status, detail}]`), `memory` (`device`, `capacity_bytes`, `stages` as in `MemoryPlan`,
        `peaks`, `fits`, `advice`; None if the model's shape is not known) and `ok`: no check failed, and it fits.
    """
    checks = [_guard(name, look, config) for name, look in _CHECKS.items()]
    memory = None
    try:
        memory = _memory(config, gpu_gib)
    except UserError as error:
        checks.append(Check("memory plan", "fail", str(error)))
    ok = all(check.status != "fail" for check in checks) and (memory is None or memory["fits"])
    return {"checks": [asdict(check) for check in checks], "memory": memory, "ok": ok}


def _guard(name: str, look: Callable[[Config], tuple[str, str]], config: Config) -> Check:
    try:
        status, detail = look(config)
    except Exception as error:  # a package that is missing or broken fails its check, not the others
        status, detail = "fail", first_line(error)
    return Check(name, status, detail)  # type: ignore[arg-type]


def _packages(config: Config) -> tuple[str, str]:
    return "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _java(config: Config) -> tuple[str, str]:
    from searche1_lite.search.jvm import find_java

    if config.search.url is not None:
        return "ok", "not needed: a server searches"
    java = find_java()
    return "ok", f"Java {java.version} ({java.source})"


def _gpu(config: Config) -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        if config.model.name == "demo":
            return "ok", "none; the demo does not need one"
        why = ""
        if torch.version.cuda is None:
            why = "; this PyTorch is a CPU build and would not see one: install one with CUDA"
        elif driver := _driver():
            why = f"; driver {driver} is there, so it is too old for CUDA {torch.version.cuda}, or the GPU is hidden"
        return "warn", f"PyTorch sees no NVIDIA GPU, training would be very slow{why}"
    from searche1_lite.policy.model import NO_BF16, lacks_bf16

    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    detail = (
        f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {properties.major}."
        f"{properties.minor}, CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}"
    )
    return ("warn", f"{detail}; {NO_BF16}") if lacks_bf16(torch.device("cuda")) else ("ok", detail)


def _driver() -> str | None:
    """The NVIDIA driver's version, as the kernel module tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)


def _four_bits(config: Config) -> tuple[str, str]:
    """Quantises a small matrix and looks how far the result is off."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if config.model.quantization != "nf4":
        return "ok", "not used: model.quantization=none"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 128 * 64, device=device).reshape(128, 64)
    try:
        error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().max().item()
    except (RuntimeError, NotImplementedError, OSError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return (
            "fail",
            f"bitsandbytes does not work on this {device}: {reason}; reinstall it, or model.quantization=none",
        )
    # Of values in [-1, 1], NF4's widest gap is 0.30, so none is more than half of that off.
    return (
        ("ok", f"NF4 works on the {device}") if error < 0.16 else ("fail", f"NF4 is off by {error:.2f}; reinstall it")
    )


def _kernels(config: Config) -> tuple[str, str]:
    import torch

    from searche1_lite.policy.losses import try_losses

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try_losses(device)
    return "ok", f"the tiled losses run on the {device}"


def _disk(config: Config) -> tuple[str, str]:
    """Free space where models, indexes and runs go, against what is still to be fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    from searche1_lite.policy.model import resolve_model
    from searche1_lite.search.catalog import bytes_to_fetch
    from searche1_lite.search.index import cache_folder
    from searche1_lite.search.prebuilt import pyserini_cache

    needed = {Path(HF_HUB_CACHE): 0, pyserini_cache(): 0, cache_folder(): 0, Path("runs"): GIB // 2}
    with suppress(UserError):  # the memory plan reports a missing model
        source = resolve_model(config.model.name)
        if not Path(source).is_dir() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            from searche1_lite.policy.memory import parameter_count

            needed[Path(HF_HUB_CACHE)] += 2 * parameter_count(model_shape(config))
    with suppress(UserError):  # and an index by the search's check
        for place, size in bytes_to_fetch(config.search).items():
            needed[place] += size
    by_disk: dict[int, tuple[Path, int, int]] = {}
    for folder, size in needed.items():
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        disk = there.stat().st_dev
        before = by_disk[disk][1] if disk in by_disk else 0
        by_disk[disk] = (folder, before + size, shutil.disk_usage(there).free)
    detail = ", ".join(
        f"{free / GIB:.0f} GiB free on the disk of {folder}, about {size / GIB:.1f} needed"
        for folder, size, free in by_disk.values()
    )
    short = any(size > free for _, size, free in by_disk.values())
    return (
        ("fail", f"{detail}; make room, or set HF_HOME, PYSERINI_CACHE or SEARCHE1_LITE_CACHE to another disk")
        if (short)
        else ("ok", detail)
    )


def _hub(config: Config) -> tuple[str, str]:
    from huggingface_hub import constants, get_session

    from searche1_lite.policy.model import resolve_model

    source = resolve_model(config.model.name)
    names = [config.data.train, config.data.evaluation]
    local = Path(source).is_dir() and all(name is None or name == "demo" or Path(name).exists() for name in names)
    if constants.is_offline_mode():
        return ("ok" if local else "warn"), "HF_HUB_OFFLINE is set: only what is in the cache can be used"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the HTTP library of this version raises
        detail = f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
        return ("ok", f"{detail}; not needed here") if local else ("fail", f"{detail}; check the connection")
    return "ok", f"{constants.ENDPOINT} answers"


def _search(config: Config) -> tuple[str, str]:
    from searche1_lite.search.catalog import describe_source

    return describe_source(config.search)


_CHECKS: dict[str, Callable[[Config], tuple[str, str]]] = {
    "packages": _packages,
    "Java": _java,
    "GPU": _gpu,
    "bitsandbytes": _four_bits,
    "kernels": _kernels,
    "disk": _disk,
    "hub": _hub,
    "search": _search,
}


def _memory(config: Config, gpu_gib: float | None) -> dict[str, Any]:
    import torch

    from searche1_lite.policy.memory import plan_memory
    from searche1_lite.policy.model import compute_dtype

    device: Literal["cuda", "cpu"] = "cuda" if gpu_gib is not None or torch.cuda.is_available() else "cpu"
    if gpu_gib is not None:
        capacity = int(gpu_gib * GIB) - CUDA_RESERVE
    elif device == "cuda":
        capacity = gpu_capacity()
    else:
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = model_shape(config)
    dtype = compute_dtype(torch.device(device)) if gpu_gib is None else torch.bfloat16
    plan = plan_memory(config, shape, device, dtype, capacity)
    return {
        "device": device,
        "dtype": plan.dtype,
        "capacity_bytes": capacity,
        "stages": plan.stages,
        "peaks": plan.peaks,
        "fits": max(plan.peaks.values()) <= capacity,
        "advice": advise(config, plan, capacity),
    }


def advise(config: Config, plan: "MemoryPlan", capacity: int) -> list[str]:
    """For each stage that exceeds `capacity` bytes, the setting to change, as an override."""
    advice = []
    for stage, parts in plan.stages.items():
        peak = plan.peaks[stage]
        if peak <= capacity:
            continue
        if stage == "rollout":
            rows, cache, rest = config.engine.batch_size, parts["KV cache"], parts.get("activations, logits", 0)
            fitting = int(rows - (peak - capacity) / (cache / rows))
            if fitting < 1:  # where little is cached, most of what a row takes is activations
                fitting = int(rows * (capacity - peak + cache + rest) / (cache + rest))
            knob = f"engine.batch_size={fitting}" if fitting >= 1 else "a smaller protocol.max_completion_tokens"
        else:
            section = "grpo" if stage == "GRPO step" else "ofsd"
            longest = config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens
            rollouts = config.grpo.questions_per_step * config.grpo.group_size
            sequences = rollouts if section == "grpo" else config.ofsd.batch_size
            rows, _ = fullest(longest, getattr(config, section).micro_batch_tokens, sequences)
            if not config.model.gradient_checkpointing:
                knob = "model.gradient_checkpointing=true"
            elif rows > 1:
                knob = f"{section}.micro_batch_tokens={rows // 2 * longest}"
            else:
                knob = "a smaller protocol.max_completion_tokens"
        advice.append(f"{stage}: {peak / GIB:.1f} GiB are more than {capacity / GIB:.1f}; try {knob}")
    return advice
