"""The peak memory of each stage.

Beside the toolkit's own GRPO and OFSD steps stand plain dense ones, which hold the full logits of every position, and
beside every figure what the memory plan said before. Each is measured in a process of its own (`measure.py`).
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from searche1_lite.bench.measure import full_pairs, full_trajectories
from searche1_lite.config import Config, load_config
from searche1_lite.runtime.errors import UserError

STAGES = ("rollout", "GRPO step", "OFSD step")
_JSON_NAMES = {"rollout": "rollout", "GRPO step": "grpo", "OFSD step": "ofsd"}


def measure_memory(
    config: Config | None = None,
    cap_gb: float | None = None,
    on_part: Callable[[str], None] = lambda name: None,
    quick: bool = False,
) -> dict[str, Any]:
    """Measures the peak memory of the stages.

    Args:
        config: settings whose stages are measured, on random weights of the model's shape; then without the dense
            steps. None: the standard workload, one trajectory of 4,096 tokens and a vocabulary of 151,936 through a
            small model on a CPU and through one of Qwen2.5-3B's shape on a GPU, beside dense steps.
        cap_gb: on a GPU, the most memory that each process may allocate, in 10^9 bytes.
        on_part: receives the name of each measurement as it begins.
        quick: a standard workload of 1,024 tokens.

    Returns:
        `workload`; for each stage `NAME_bytes`, `NAME_reserved_bytes` (by a GPU's allocator; None on a CPU),
        `NAME_plan_bytes` and `NAME_plan_vs_measured`; with the dense steps
        `grpo_dense_bytes` and `grpo_vs_dense` (ours / dense), `grpo_seconds` and `grpo_dense_seconds` a trajectory and
        `grpo_seconds_vs_dense`, and the same for `ofsd`. None stands for what did not fit into the memory.
    """
    import torch

    from searche1_lite.bench.measure import measure, save_random_base
    from searche1_lite.policy.capacity import gpu_capacity, model_shape
    from searche1_lite.policy.memory import plan_memory
    from searche1_lite.policy.model import compute_dtype
    from searche1_lite.search.index import cache_folder

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    if cap_gb is not None and device == "cpu":
        raise UserError("--cap-gb is for a GPU, and there is none here; leave it out")
    own = config is not None
    config = config if config is not None else standard_workload(1024 if quick else 4096)
    shape = model_shape(config) if own or device == "cuda" else small_shape()
    capacity = None
    if device == "cuda":
        capacity = min(gpu_capacity(), int((cap_gb or 1e6) * 1e9))
    plan = plan_memory(config, shape, device, compute_dtype(torch.device(device)), capacity)
    shadow: Literal["always", "never"] = "always" if "shadow weights" in plan.stages["rollout"] else "never"
    config = replace(config, engine=replace(config.engine, shadow=shadow))  # what is planned is what is measured
    memory: dict[str, Any] = {"workload": config.model.name if own else f"standard ({shape.model_type})"}
    cache_folder().mkdir(parents=True, exist_ok=True)  # /tmp may lie in memory
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        base = Path(scratch) / "base"
        on_part("making random weights")
        save_random_base(shape, base)
        there = _one_step(config, base)
        for stage in [name for name in STAGES if name in plan.stages]:
            name = _JSON_NAMES[stage]
            on_part(stage)
            measured = measure(stage, there, cap_gb=cap_gb)
            bytes_, memory[f"{name}_reserved_bytes"] = measured["peak_bytes"], measured["reserved_bytes"]
            memory[f"{name}_bytes"], memory[f"{name}_plan_bytes"] = bytes_, plan.peaks[stage]
            memory[f"{name}_plan_vs_measured"] = round(plan.peaks[stage] / bytes_, 3) if bytes_ else None
            if not own and stage != "rollout":
                on_part(f"{stage}, dense")
                plain = measure(stage, there, dense=True, cap_gb=cap_gb)
                dense = plain["peak_bytes"]
                memory[f"{name}_dense_bytes"] = dense
                memory[f"{name}_vs_dense"] = round(bytes_ / dense, 3) if bytes_ and dense else None
                # The same work: of self-distillation the one pair whose reference is as long as can be.
                alike = replace(there, ofsd=replace(there.ofsd, batch_size=full_pairs(there)[0]))
                own_seconds, dense_seconds = measure(stage, alike, cap_gb=cap_gb)["seconds"], plain["seconds"]
                memory[f"{name}_seconds"], memory[f"{name}_dense_seconds"] = own_seconds, dense_seconds
                memory[f"{name}_seconds_vs_dense"] = (
                    round(own_seconds / dense_seconds, 3) if own_seconds and dense_seconds else None
                )
    return memory


def _one_step(config: Config, base: Path) -> Config:
    """The settings on the base in `base`, one step a stage of two micro-batches, as full as the run's own can be.

    Of self-distillation one has full-length references, which make the teacher's pass the longest, and the other short
    ones (`measure.py`), so that more students go together.
    """
    grpo, ofsd = config.grpo, config.ofsd
    teachers, students = full_pairs(config)
    rollouts, held = grpo.questions_per_step * grpo.group_size, full_trajectories(config)
    return replace(
        config,
        model=replace(config.model, name=str(base), revision=None),
        grpo=replace(grpo, steps=1, questions_per_step=1, group_size=2 * held if held <= rollouts else rollouts),
        ofsd=replace(
            ofsd,
            epochs=1,
            batch_size=teachers + min(students, ofsd.batch_size) if teachers <= ofsd.batch_size else ofsd.batch_size,
        ),
    )


def standard_workload(tokens: int = 4096) -> Config:
    """One trajectory of so many tokens at a time, its prompt 512 of them."""
    return load_config(
        None,
        None,
        [
            "protocol.max_prompt_tokens=512", f"protocol.max_completion_tokens={tokens - 512}", "engine.batch_size=16",
            "grpo.questions_per_step=1", "grpo.group_size=2", f"grpo.micro_batch_tokens={tokens}", "grpo.steps=1",
            "ofsd.batch_size=1", f"ofsd.micro_batch_tokens={tokens}",
        ],
    )  # fmt: skip


def small_shape() -> Any:
    """Qwen2.5's vocabulary on a model that a CPU can take through 4,096 tokens in seconds."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
