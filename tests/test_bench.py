"""Peaks measured in processes of their own: beside the memory plan, and beside dense steps of the same task."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Qwen2Config

from searche1_lite.bench import run_bench as bench
from searche1_lite.bench.measure import (
    _dense_step,
    _grpo_step,
    _ofsd_step,
    full_pairs,
    full_trajectories,
    measure,
    save_random_base,
)
from searche1_lite.bench.memory import _one_step, standard_workload
from searche1_lite.cli.tables import bench_tables
from searche1_lite.config import Config, dump_config, load_config, parse_config, preset_names
from searche1_lite.policy.microbatch import fullest, micro_batches
from searche1_lite.policy.model import load_policy
from searche1_lite.runtime.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

STAGES = ("rollout", "grpo", "ofsd")


def settings(model: Path | str, *overrides: str) -> Config:
    """One optimizer step of three trajectories of 512 tokens, in one micro-batch."""
    return load_config(
        "demo",
        None,
        [
            f"model.name={model}", "model.gradient_checkpointing=true", "protocol.max_prompt_tokens=64",
            "protocol.max_completion_tokens=448", "engine.batch_size=8", "grpo.steps=1", "grpo.questions_per_step=1",
            "grpo.group_size=3", "grpo.micro_batch_tokens=1536", "ofsd.batch_size=3", "ofsd.micro_batch_tokens=2880",
            "ofsd.epochs=1", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def shape() -> Qwen2Config:
    """Few weights and a large vocabulary, as large models have it: the logits are what takes memory."""
    return Qwen2Config(
        vocab_size=60_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def base(shape: Qwen2Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large_vocabulary")
    save_random_base(shape, folder)
    return folder


@pytest.fixture(scope="module")
def found(shape: Qwen2Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench` finds for a model of which it is given no more than the shape; `parts` is what it said it did."""
    folder = tmp_path_factory.mktemp("shape")
    shape.save_pretrained(folder)
    parts: list[str] = []
    return bench(settings(folder), on_part=parts.append) | {"parts": parts, "folder": str(folder)}


@pytest.mark.slow
def test_bench_gives_measured_and_planned_bytes_of_every_stage(found: dict[str, Any]) -> None:
    memory = found["memory"]
    names = {f"{stage}_{kind}" for stage in STAGES for kind in ("bytes", "plan_bytes", "plan_vs_measured")}
    reserved = {f"{stage}_reserved_bytes" for stage in STAGES}
    assert memory.keys() == names | reserved | {"workload"} and memory["workload"] == found["folder"]
    assert all((memory[name] is None) is not torch.cuda.is_available() for name in reserved), "a GPU's allocator tells"
    assert all(memory[name] > 0 for name in names)
    assert all(isinstance(memory[f"{stage}_bytes"], int) for stage in STAGES)
    for stage in STAGES:
        ratio = memory[f"{stage}_plan_bytes"] / memory[f"{stage}_bytes"]
        assert memory[f"{stage}_plan_vs_measured"] == pytest.approx(ratio, abs=6e-4)
    assert found["machine"].keys() == {"gpu", "cpu_cores", "threads", "platform", "torch"}
    assert found["parts"] == ["making random weights", "rollout", "GRPO step", "OFSD step"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_plan_is_near_what_a_process_takes(found: dict[str, Any], stage: str) -> None:
    assert 0.85 < found["memory"][f"{stage}_plan_vs_measured"] < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["GRPO step", "OFSD step"])
def test_a_dense_step_takes_far_more_memory(found: dict[str, Any], base: Path, stage: str) -> None:
    ours = found["memory"]["grpo_bytes" if stage == "GRPO step" else "ofsd_bytes"]
    dense = measure(stage, settings(base), dense=True)["peak_bytes"]
    assert ours < 0.7 * dense


def passes(step: Callable[..., None], *arguments: Any) -> tuple[set[tuple[int, ...]], list[tuple[int, int]]]:
    """The sequences that a step passes through the demo policy with a gradient, and the sizes of passes without."""
    config = settings("demo")
    model, tokenizer = load_policy(config.model, seed=0)
    learnt: set[tuple[int, ...]] = set()
    others: list[tuple[int, int]] = []

    def watch(module: torch.nn.Module, given: tuple[torch.Tensor], ids: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            learnt.update(map(tuple, given[0].tolist()))
        else:
            others.append(tuple(given[0].shape))

    model.get_input_embeddings().register_forward_hook(watch)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if step is _dense_step:
        step(model, config, *arguments)
    else:
        step(model, tokenizer, config, *arguments)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed), "an update of the adapter, and of nothing else"
    return learnt, others


def test_ours_and_the_dense_grpo_step_are_the_same_task(tmp_path: Path) -> None:
    own, dense = passes(_grpo_step, tmp_path), passes(_dense_step, "GRPO step")
    assert own == dense, "the same trajectories with a gradient, and as many as large for the reference"
    assert {len(ids) for ids in dense[0]} == {512} and len(dense[0]) == 3 and dense[1] == [(3, 512)]


def test_ours_and_the_dense_distillation_step_are_the_same_task(tmp_path: Path) -> None:
    own, dense = passes(_ofsd_step, tmp_path), passes(_dense_step, "OFSD step")
    assert own[0] == dense[0] and len(dense[0]) == 3
    assert dense[1] == [(3, 512 + 448)]
    [(rows, width)] = own[1]
    assert rows == 3 and abs(width - (512 + 448)) <= 64, "the privileged template takes the random prompt's place"


@pytest.mark.slow
def test_a_stage_that_does_not_fit_into_the_memory_is_told_as_none(base: Path, tmp_path: Path) -> None:
    """In a process that may map no more than 6 GiB; the dense logits alone would take 11.8 GB."""
    config = settings(base, "grpo.questions_per_step=32", "grpo.micro_batch_tokens=49152")
    file = tmp_path / "config.yaml"
    program = (
        "import json, resource, sys; from pathlib import Path; from searche1_lite.config import load_config\n"
        "from searche1_lite.bench.measure import measure\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)\n"
        "print(json.dumps(measure('GRPO step', load_config(None, Path(sys.argv[1])), dense=True)))"
    )
    file.write_text(dump_config(config), encoding="utf-8")
    ran = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"peak_bytes": None, "reserved_bytes": None, "seconds": None}


def test_a_measurement_that_fails_is_one_line(tmp_path: Path) -> None:
    config = settings("demo")
    config.grpo.micro_batch_tokens = 0
    with pytest.raises(UserError) as caught:
        measure("GRPO step", config)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert str(caught.value).startswith("measuring the GRPO step failed: ")
    assert "grpo.micro_batch_tokens=0 is impossible" in str(caught.value)


@pytest.mark.parametrize("preset", preset_names())
def test_a_presets_stages_are_measured_on_one_step_of_two_full_micro_batches(preset: str) -> None:
    config = load_config(preset)
    short = _one_step(config, Path("base"))
    assert parse_config(asdict(short)) == short and short.model.name == "base", "possible settings"
    assert (short.protocol, short.engine) == (config.protocol, config.engine)
    assert short.grpo.micro_batch_tokens == config.grpo.micro_batch_tokens
    assert short.ofsd.micro_batch_tokens == config.ofsd.micro_batch_tokens
    assert short.grpo.steps == short.ofsd.epochs == 1
    prompt, completion = config.protocol.max_prompt_tokens, config.protocol.max_completion_tokens
    rollouts = short.grpo.questions_per_step * short.grpo.group_size
    grpo = micro_batches([prompt + completion] * rollouts, config.grpo.micro_batch_tokens)
    fullest_, _ = fullest(prompt + completion, config.grpo.micro_batch_tokens, rollouts)
    assert [len(batch) for batch in grpo] == [fullest_] * 2
    teachers, students = full_pairs(config)
    assert short.ofsd.batch_size == teachers + students
    lengths = [prompt + 2 * completion] * teachers + [prompt + completion] * students
    ofsd = micro_batches(lengths, config.ofsd.micro_batch_tokens)
    assert [len(batch) for batch in ofsd] == [teachers, students]


def test_the_standard_workload_is_one_trajectory_of_4096_tokens_at_a_time() -> None:
    config = standard_workload()
    assert config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens == 4096
    assert config.grpo.micro_batch_tokens == config.ofsd.micro_batch_tokens == 4096
    assert full_trajectories(config) == 1 and full_pairs(config) == (1, 1)
    assert config.grpo.steps == 1 and config.ofsd.enabled


@pytest.mark.slow
def test_the_table_tells_what_did_not_fit(found: dict[str, Any]) -> None:
    console = Console(width=120)
    memory = found["memory"] | {
        "grpo_dense_bytes": 2_000_000_000, "grpo_vs_dense": 0.125, "ofsd_bytes": None, "ofsd_plan_vs_measured": None,
    }  # fmt: skip
    with console.capture() as shown:
        console.print(*bench_tables(found | {"memory": memory}))
    lines = {line.split()[1]: line for line in shown.get().splitlines() if line.startswith("│")}
    assert f"{memory['grpo_bytes'] / 1e6:.0f}" in lines["grpo"] and "2000" in lines["grpo"] and "0.125" in lines["grpo"]
    assert "out of memory" in lines["ofsd"] and f"{memory['ofsd_plan_bytes'] / 1e6:.0f}" in lines["ofsd"]


def test_a_preset_with_another_part_than_memory_is_refused_not_ignored() -> None:
    with pytest.raises(UserError, match="rollout has workloads of its own"):
        bench(load_config("demo"), parts=["memory", "rollout"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it means something")
def test_a_cap_on_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="--cap-gb is for a GPU"):
        bench(cap_gb=4.0, parts=["memory"])
