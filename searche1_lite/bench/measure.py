"""The peak memory of one real stage, measured in a process of its own.

`python -m searche1_lite.bench.measure` reads from stdin the settings, a stage (`rollout`, `GRPO step`, `OFSD step`) and
whether the step is the toolkit's own or a plain dense one, which holds full logits. Sequences have the full length that
the protocol allows; the ids are random. On a GPU the figure is the allocator's peak; else the growth of the resident
memory since before the model was loaded, after the same stage was run once on a tiny model, so that code is not in it.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searche1_lite.config import Config, dump_config, load_config
from searche1_lite.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from searche1_lite.data.trajectory import Question, Trajectory


def measure(stage: str, config: Config, *, dense: bool = False, cap_gb: float | None = None) -> dict[str, Any]:
    """Runs one stage in a process of its own.

    Args:
        config: with `model.name` the folder of a base model.
        dense: the plain implementation instead of the toolkit's.
        cap_gb: on a GPU, the most that the process may allocate.

    Returns:
        `{"peak_bytes", "reserved_bytes", "seconds"}`; all None if the memory did not suffice. What the GPU's allocator
        reserved at most is None on a CPU. For a training step the seconds are those that it takes for one trajectory,
        without setting up the trainer.

    Raises:
        UserError: if the process failed otherwise.
    """
    request = {"stage": stage, "config": dump_config(config), "dense": dense, "cap_gb": cap_gb}
    answer = _child(json.dumps(request), f"measuring the {stage}")
    nothing = dict.fromkeys(("peak_bytes", "reserved_bytes", "seconds"))
    return nothing if answer is None else json.loads(answer)


def _child(request: str, what: str) -> str | None:
    """The last line that a process of its own prints for this request; None if it ran out of memory."""
    # Freed memory goes back to the system at once, so that resident memory follows what is alive.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "searche1_lite.bench.measure"],
        input=request,
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    if child.returncode != 0:
        if child.returncode == -9 or "out of memory" in child.stderr.lower() or "can't allocate" in child.stderr:
            return None
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{what} failed: {last}", exit_code=1)
    return (child.stdout.strip().splitlines() or [""])[-1]


def save_random_base(shape: "PretrainedConfig", folder: Path) -> None:
    """A base model of this shape with random weights, and the demo's tokenizer: fit for memory and speed, no more.

    Made in a process of its own, so that on a GPU its memory is free again afterwards.

    Raises:
        UserError: if it cannot be made or saved.
    """
    from searche1_lite.policy.model import resolve_model

    shape.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve_model("demo")) / name, folder)
    request = json.dumps({"stage": "random weights", "folder": str(folder)})
    _child(request, "making random weights")


def _make_weights(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from searche1_lite.policy.model import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)

    def make(place: torch.device) -> Any:
        with place:
            return AutoModelForCausalLM.from_config(shape, dtype=compute_dtype(device))

    try:
        model = make(device)
    except torch.OutOfMemoryError:  # in 4 bits, as they are loaded, they may fit
        model = make(torch.device("cpu"))
    model.save_pretrained(folder)


def _trajectory(config: Config, vocabulary: int, question: int, sample: int) -> "Trajectory":
    """A full-length episode of random ids, right or wrong in turn; a third of it is the environment's."""
    from random import Random

    from searche1_lite.data.trajectory import Question, Trajectory

    rng = Random(question * 1000 + sample)
    prompt, completion = (
        [rng.randrange(vocabulary) for _ in range(length)]
        for length in (config.protocol.max_prompt_tokens, config.protocol.max_completion_tokens)
    )
    mask = [int(position % 3 != 2) for position in range(len(completion))]
    asked = Question(str(question), "?", ["yes"])
    return Trajectory(asked, sample, prompt, completion, mask, [], [], "end", reward=float(sample % 2))


class _Peak:
    """The most memory in use between `begin` and `end`: the GPU allocator's, or the resident memory."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self.reserved: int | None = None

    def begin(self) -> None:
        import torch

        _forget()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._began = time.monotonic()

    def end(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.bytes, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        else:
            self.bytes = _resident("VmHWM")
        self.seconds = time.monotonic() - self._began


def _rollout(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", config: Config, folder: Path, peak: _Peak
) -> None:
    """The second GRPO step's rollouts, when the optimizer has its state; the first step is on very short episodes."""
    from searche1_lite.train.grpo import train_grpo
    from searche1_lite.train.stage_trainer import StageTraining

    vocabulary = model.get_input_embeddings().weight.shape[0]
    short = deepcopy(config)
    short.protocol.max_prompt_tokens, short.protocol.max_completion_tokens = 8, 16
    short.grpo.steps, calls = 2, 0

    def answer(asked: "Sequence[Question]", n: int, seed_parts: Sequence[int | str]) -> "list[Trajectory]":
        nonlocal calls
        calls += 1
        if calls == 2:
            peak.begin()
            _decode(model, tokenizer, config)
            peak.end()
        return [_trajectory(short, vocabulary, int(q.id), sample) for q in asked for sample in range(n)]

    train_grpo(
        model,
        tokenizer,
        answer,
        _questions(config),
        StageTraining(short, round_index=1, output_dir=folder, on_step=lambda record: None),
    )


def _questions(config: Config) -> "list[Question]":
    from searche1_lite.data.trajectory import Question

    return [Question(str(index), "?", ["yes"]) for index in range(config.grpo.questions_per_step)]


def _decode(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", config: Config) -> None:
    """A full batch reads up to its last few tokens, and writes those: on a GPU enough for a step to be captured."""
    import torch

    from searche1_lite.policy.engine import CAPTURE_AFTER, PREFILL_TOKENS, Decoder, UniformStream, rollout_context

    vocabulary, rows = model.get_input_embeddings().weight.shape[0], config.engine.batch_size
    episodes = [_trajectory(config, vocabulary, row, 0) for row in range(rows)]
    texts = [episode.prompt_ids + episode.completion_ids for episode in episodes]
    written, was_training = CAPTURE_AFTER + 2 if model.device.type == "cuda" else 4, model.training
    model.eval()  # as in a rollout; in training mode, gradient checkpointing would leave the cache out
    try:
        with torch.inference_mode(), rollout_context(model, config.engine, rows):
            decoder = Decoder(model, tokenizer, rows, len(texts[0]), logprobs=True)
            size = max(1, PREFILL_TOKENS // rows)
            for start in range(0, len(texts[0]) - written, size):
                chunk = slice(start, min(start + size, len(texts[0]) - written))
                # Every other slot first: rows that do not lie side by side take the most.
                for first in (0, 1):
                    decoder.prefill(range(first, rows, 2), [text[chunk] for text in texts[first::2]])
            for slot, text in enumerate(texts):
                decoder.begin(slot, text[-written], written, UniformStream(slot))
            while decoder.writing.any():
                decoder.step()
    finally:
        model.train(was_training)


def _grpo_step(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", config: Config, folder: Path) -> float:
    """Seconds a trajectory."""
    from searche1_lite.train.grpo import train_grpo
    from searche1_lite.train.stage_trainer import StageTraining

    vocabulary = model.get_input_embeddings().weight.shape[0]
    records: list[dict[str, Any]] = []

    def answer(asked: "Sequence[Question]", n: int, seed_parts: Sequence[int | str]) -> "list[Trajectory]":
        return [_trajectory(config, vocabulary, int(q.id), sample) for q in asked for sample in range(n)]

    result = train_grpo(
        model,
        tokenizer,
        answer,
        _questions(config),
        StageTraining(config, round_index=1, output_dir=folder, on_step=records.append),
    )
    _check_not_shrunk(result)
    return records[-1]["seconds"] / (config.grpo.questions_per_step * config.grpo.group_size)


def _ofsd_step(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", config: Config, folder: Path) -> float:
    """Seconds a pair."""
    from searche1_lite.rollout.protocol import Protocol
    from searche1_lite.train.ofsd import train_ofsd
    from searche1_lite.train.stage_trainer import StageTraining

    records: list[dict[str, Any]] = []
    result = train_ofsd(
        model,
        tokenizer,
        Protocol(tokenizer, config.protocol),
        _pairs(model, config),
        StageTraining(config, round_index=1, output_dir=folder, on_step=records.append),
    )
    _check_not_shrunk(result)
    return records[-1]["seconds"] / config.ofsd.batch_size


def _check_not_shrunk(result: dict[str, Any]) -> None:
    """What a stage in smaller micro-batches takes is not what was asked."""
    import torch

    if "micro_batch_tokens" in result:
        raise torch.OutOfMemoryError("out of memory with the micro-batches that are set")


def full_trajectories(config: Config) -> int:
    """How many full-length trajectories a micro-batch of GRPO holds."""
    longest = config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens
    return max(1, config.grpo.micro_batch_tokens // longest)


def full_pairs(config: Config) -> tuple[int, int]:
    """How many pairs of full-length students a micro-batch holds, with full-length references and with short ones."""
    student = config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens
    teacher = student + config.protocol.max_completion_tokens
    return max(1, config.ofsd.micro_batch_tokens // teacher), max(1, config.ofsd.micro_batch_tokens // student)


def _pairs(model: "PeftModel", config: Config) -> list[Any]:
    """A step's pairs: as many with full-length references as a micro-batch holds, the others with short ones."""
    from searche1_lite.train.pairs import Pair

    vocabulary, (full, _) = model.get_input_embeddings().weight.shape[0], full_pairs(config)
    short = deepcopy(config)
    short.protocol.max_completion_tokens = 8
    return [
        Pair(
            _trajectory(config if index < full else short, vocabulary, index, 1),
            _trajectory(config, vocabulary, index, 0),
        )
        for index in range(config.ofsd.batch_size)
    ]


def _dense_step(model: "PeftModel", config: Config, stage: str) -> float:
    """One micro-batch and its update as a short script would have them: full logits of every position, in fp32.

    Returns:
        Seconds a trajectory.
    """
    import torch
    from torch.nn import functional as F

    from searche1_lite.policy.adapter import drop_adapter, snapshot_adapter, use_adapter
    from searche1_lite.policy.model import compute_context

    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    snapshot_adapter(model, "frozen")
    grpo = stage == "GRPO step"
    rows = full_trajectories(config) if grpo else full_pairs(config)[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if grpo:
        size = config.grpo.group_size
        episodes = references = [_trajectory(config, vocabulary, row // size, row % size) for row in range(rows)]
    else:
        pairs = _pairs(model, config)[:rows]
        episodes, references = [pair.student for pair in pairs], [pair.reference for pair in pairs]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    prompt, completion = config.protocol.max_prompt_tokens, config.protocol.max_completion_tokens
    own = torch.tensor([e.prompt_ids + e.completion_ids for e in episodes], device=model.device)
    mask = torch.tensor([e.loss_mask for e in episodes], device=model.device)
    # The teacher's prompt shows the reference's completion too.
    shown = torch.tensor(
        [e.prompt_ids + r.completion_ids + e.completion_ids for e, r in zip(episodes, references, strict=True)],
        device=model.device,
    )

    began = time.monotonic()

    def logprobs(ids: torch.Tensor) -> torch.Tensor:
        with compute_context(model):
            logits = model(input_ids=ids).logits
        return F.log_softmax(logits.float(), dim=-1)[:, -completion - 1 : -1]

    with torch.no_grad(), use_adapter(model, "frozen"):
        fixed = logprobs(own).gather(-1, own[:, prompt:, None]).squeeze(-1) if grpo else logprobs(shown)
    student = logprobs(own)
    if grpo:
        values = student.gather(-1, own[:, prompt:, None]).squeeze(-1)
        ratio = (values - values.detach()).exp()
        losses = -ratio + config.grpo.kl_coefficient * ((fixed - values).exp() - (fixed - values) - 1)
    else:
        losses = F.kl_div(student, fixed, reduction="none", log_target=True).sum(dim=-1)
    del student
    ((losses * mask).sum() / mask.sum()).backward()
    optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.monotonic() - began
    drop_adapter(model, "frozen")
    return taken / rows


def _run(request: dict[str, Any], name: str, config: Config, folder: Path) -> _Peak:
    """Loads the base `name` and runs the stage."""
    import torch

    from searche1_lite.policy.model import load_policy

    config.model.name, peak = name, _Peak()
    model, tokenizer = load_policy(config.model, seed=0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not torch.cuda.is_available():
            # Weights that were not quantised still lie in the mapped file, all of which counts as resident.
            parameter.data = parameter.data.clone()
    if request["stage"] == "rollout":
        _rollout(model, tokenizer, config, folder, peak)
        return peak
    peak.begin()
    if request["dense"]:
        seconds = _dense_step(model, config, request["stage"])
    elif request["stage"] == "GRPO step":
        seconds = _grpo_step(model, tokenizer, config, folder)
    else:
        seconds = _ofsd_step(model, tokenizer, config, folder)
    peak.end()
    peak.seconds = seconds
    return peak


def _forget() -> None:
    """Gives what is free back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes of resident memory: `VmRSS` now, or `VmHWM` at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _main() -> None:
    import torch

    from searche1_lite.runtime.quiet import quieten

    quieten()
    request = json.load(sys.stdin)
    if request["stage"] == "random weights":
        return _make_weights(Path(request["folder"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(request["config"], encoding="utf-8")
        config = load_config(file=folder / "config.yaml")
        if torch.cuda.is_available():
            if request["cap_gb"] is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, request["cap_gb"] * 1e9 / total))
            before, peak = 0, _run(request, config.model.name, config, folder)
        else:
            small = load_config(file=folder / "config.yaml")
            small.protocol.max_prompt_tokens, small.protocol.max_completion_tokens = 8, 16
            _run(request, "demo", small, folder)
            _forget()
            before = _resident("VmRSS")
            peak = _run(request, config.model.name, config, folder)
    print(json.dumps({"peak_bytes": peak.bytes - before, "reserved_bytes": peak.reserved, "seconds": peak.seconds}))


if __name__ == "__main__":
    _main()
