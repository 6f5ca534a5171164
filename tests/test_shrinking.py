"""Memory that runs out: the work is done again in smaller parts, and comes to what an unbroken run comes to.

There is no GPU in these tests. A hook raises PyTorch's own error where a pass is larger than a made-up device holds. On
a CPU the system refuses the memory: `little_memory.py`.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ShelfRetriever, adapter_weights, all_equal, fresh_policy, tiny_protocol_config
from distillation import make_pairs
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from searche1_lite.bench import measure
from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.engine import Decoder
from searche1_lite.policy.microbatch import micro_batches
from searche1_lite.policy.shrinking import Limit, is_out_of_memory, smaller_micro_batches
from searche1_lite.rollout import scheduler as rollout_module
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Hooks, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.train.diagnostics import watch
from searche1_lite.train.grpo import RolloutGRPOTrainer, train_grpo
from searche1_lite.train.ofsd import train_ofsd
from searche1_lite.train.stage_trainer import StageTraining

Policy = tuple[PeftModel, PreTrainedTokenizerBase]

QUESTIONS = [Question(name, f"What about {name}?", ["Peru"]) for name in ("rivers", "a sea", "hills", "towns")]


@contextmanager
def memory_for(policy: Policy, tokens: int, seen: list[torch.Size], rows: int = 10**9) -> Iterator[None]:
    """A device on which a pass of more `tokens`, or one that writes in more `rows`, finds no memory.

    Half of such passes fail on their way back only.
    """
    failed = 0

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(module: torch.nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        nonlocal failed
        shape = given["input_ids"].shape
        seen.append(shape)
        if shape.numel() > tokens or (shape[1] == 1 and shape[0] > rows):
            failed += 1
            if output.last_hidden_state.requires_grad and failed % 2:
                output.last_hidden_state.register_hook(refuse)
            else:
                refuse()

    handle = policy[0].get_base_model().base_model.register_forward_hook(forward, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def written(policy: Policy) -> list[Trajectory]:
    """Two groups of four rollouts of unequal lengths, some right and some wrong."""
    protocol, rollouts = Protocol(policy[1], tiny_protocol_config()), []
    for index in range(8):
        question = QUESTIONS[index // 4]
        ids = policy[1].encode("<answer>" + "Peru Oslo Lima Rome"[: 2 + 2 * index] + "</answer>")
        prompt = protocol.prompt_ids(question.question)
        reward = float(index % 2)
        rollouts.append(Trajectory(question, index % 4, prompt, ids, [1] * len(ids), [], [], "answer", reward=reward))
    return rollouts


class Stage:
    """Two steps of a stage of either kind: `records`, `result`, the adapter's end, and each step's gradient."""

    def __init__(self, kind: str, policy: Policy, folder: Path, micro_batch_tokens: int) -> None:
        self.records: list[dict[str, Any]] = []
        self.gradients: list[torch.Tensor] = []
        shared = {"micro_batch_tokens": micro_batch_tokens, "learning_rate": 1e-2, "warmup_ratio": 0.0}
        config = Config(
            protocol=tiny_protocol_config(),
            grpo=GRPOStageConfig(**shared, steps=2, questions_per_step=2, group_size=4, kl_coefficient=0.1),
            ofsd=OFSDStageConfig(**shared, batch_size=4, epochs=2),
        )
        how: dict[str, Any] = {
            "round_index": 1, "output_dir": folder, "on_step": self.records.append,
        }  # fmt: skip

        def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

        handle = register_optimizer_step_pre_hook(keep)
        try:
            if kind == "grpo":
                self.result = train_grpo(*policy, lambda *_: written(policy), QUESTIONS, StageTraining(config, **how))
            else:
                protocol = Protocol(policy[1], config.protocol)
                self.result = train_ofsd(*policy, protocol, make_pairs(protocol), StageTraining(config, **how))
        finally:
            handle.remove()
        self.end = adapter_weights(policy[0])


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "memory" in line]


@pytest.mark.parametrize(("kind", "tokens"), [("grpo", 200), ("ofsd", 500)])
def test_a_step_that_ran_out_of_memory_ends_as_one_in_smaller_passes_does_bit_for_bit(
    talking_policy_folder: Path, tmp_path: Path, capsys, kind: str, tokens: int
) -> None:
    seen: list[torch.Size] = []
    policy = fresh_policy(talking_policy_folder)
    with memory_for(policy, tokens, seen):
        broken = Stage(kind, policy, tmp_path, 100_000)
    kept = broken.result["micro_batch_tokens"]
    assert kept < 100_000 and max(shape.numel() for shape in seen) > tokens, "it did fail, and shrank"
    (line,) = told(capsys)
    assert f"{kind}.micro_batch_tokens={kept}" in line
    unbroken = Stage(kind, fresh_policy(talking_policy_folder), tmp_path, kept)
    assert "micro_batch_tokens" not in unbroken.result and not told(capsys)
    assert all(torch.equal(*pair) for pair in zip(broken.gradients, unbroken.gradients, strict=True))
    assert all_equal(broken.end, unbroken.end)
    measured = {"seconds", "rollout_seconds", "tokens_per_second"}
    for one, other in zip(broken.records, unbroken.records, strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }, "nothing is counted twice"


@pytest.mark.parametrize(("kind", "tokens"), [("grpo", 200), ("ofsd", 500)])
def test_its_gradient_is_that_of_the_step_that_had_the_memory(
    talking_policy_folder: Path, tmp_path: Path, kind: str, tokens: int
) -> None:
    policy = fresh_policy(talking_policy_folder)
    with memory_for(policy, tokens, []):
        broken = Stage(kind, policy, tmp_path, 100_000)
    whole = Stage(kind, fresh_policy(talking_policy_folder), tmp_path, 100_000)
    size = float(whole.gradients[0].abs().max())
    assert size > 1e-4
    torch.testing.assert_close(broken.gradients[0], whole.gradients[0], atol=1e-4 * size, rtol=1e-4)
    for figure in ("loss", "grad_norm"):
        assert broken.records[0][figure] == pytest.approx(whole.records[0][figure], rel=1e-4, abs=1e-6)


def test_the_smaller_passes_are_kept_for_the_rest_of_the_stage(talking_policy_folder: Path, tmp_path: Path) -> None:
    seen: list[torch.Size] = []
    policy = fresh_policy(talking_policy_folder)
    with memory_for(policy, 200, seen):
        stage = Stage("grpo", policy, tmp_path, 100_000)
    fits = [shape.numel() <= 200 for shape in seen]
    first_that_fits = fits.index(True)
    assert not any(fits[:first_that_fits]) and all(fits[first_that_fits:]) and len(stage.records) == 2


@pytest.mark.parametrize("kind", ["grpo", "ofsd"])
def test_what_the_passes_before_the_one_that_failed_had_added_is_not_added_twice(
    talking_policy_folder: Path, tmp_path: Path, kind: str
) -> None:
    """As where memory is in pieces: the second pass of a step fails, though a larger one did not."""
    policy, count = fresh_policy(talking_policy_folder), 0

    def fail(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        count += output.last_hidden_state.requires_grad
        if count == 2:
            count += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    budget = 200 if kind == "grpo" else 500
    handle = policy[0].get_base_model().base_model.register_forward_hook(fail)
    broken = Stage(kind, policy, tmp_path, budget)
    handle.remove()
    kept = broken.result["micro_batch_tokens"]
    assert kept < budget
    unbroken = Stage(kind, fresh_policy(talking_policy_folder), tmp_path, kept)
    assert all(torch.equal(*pair) for pair in zip(broken.gradients, unbroken.gradients, strict=True))
    assert [record["loss"] for record in broken.records] == [record["loss"] for record in unbroken.records]


@pytest.mark.parametrize("kind", ["grpo", "ofsd"])
def test_a_sequence_that_does_not_fit_alone_ends_the_run_with_what_to_do(
    talking_policy_folder: Path, tmp_path: Path, kind: str
) -> None:
    policy = fresh_policy(talking_policy_folder)
    before, seen = adapter_weights(policy[0]), []
    with memory_for(policy, 10, seen), pytest.raises(UserError) as caught:
        Stage(kind, policy, tmp_path, 100_000)
    message = str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in message and "protocol.max_completion_tokens" in message
    assert caught.value.__context__ is None, "nothing holds on to the frames of the pass that failed"
    assert seen[-1][0] == 1, "it was tried"
    assert all_equal(adapter_weights(policy[0]), before) and list(policy[0].peft_config) == ["default"]
    assert all(parameter.grad is None for parameter in policy[0].parameters())


def test_what_a_pass_that_failed_had_computed_is_gone_before_the_next_begins(
    talking_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = fresh_policy(talking_policy_folder)
    computed: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real = RolloutGRPOTrainer._passes

    def watched(trainer: RolloutGRPOTrainer, *given: Any) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in computed))
        return real(trainer, *given)

    def note(module: torch.nn.Module, given: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            computed.append(weakref.ref(output.last_hidden_state))

    monkeypatch.setattr(RolloutGRPOTrainer, "_passes", watched)
    handle = policy[0].get_base_model().base_model.register_forward_hook(note)
    with memory_for(policy, 200, []):
        Stage("grpo", policy, tmp_path, 100_000)
    handle.remove()
    assert len(alive) > 2 and len(computed) > len(alive) and alive == [0] * len(alive)


def test_the_kl_of_pairs_is_the_same_in_smaller_passes(talker: Policy, capsys) -> None:
    config = Config(protocol=tiny_protocol_config(), ofsd=OFSDStageConfig(micro_batch_tokens=100_000))
    protocol = Protocol(talker[1], config.protocol)
    pairs = make_pairs(protocol)
    rollouts = [t for pair in pairs for t in (pair.student, pair.reference)]
    whole, _ = watch(talker[0], protocol, rollouts, pairs, config)
    with memory_for(talker, 500, []):
        broken, _ = watch(talker[0], protocol, rollouts, pairs, config)
    assert len(told(capsys)) == 1 and broken == pytest.approx(whole, rel=1e-4, abs=1e-6)


def play(
    policy: Policy, shelf: ShelfRetriever, slots: Limit | None, on_progress: Callable[[int], None] | None = None,
    prompts: Sequence[list[int]] | None = None, n: int = 4,
) -> list[Trajectory]:  # fmt: skip
    model, tokenizer = policy
    protocol = Protocol(tokenizer, tiny_protocol_config())
    return rollout(
        Agent(model, tokenizer, shelf, protocol, engine=EngineConfig(batch_size=64), k=3, slots=slots),
        QUESTIONS,
        n,
        Sampling(("test",), logprobs=True),
        prompts=prompts,
        hooks=Hooks(on_progress=on_progress),
    )


@pytest.fixture(scope="module")
def talker(talking_policy_folder: Path) -> Policy:
    return fresh_policy(talking_policy_folder)


@pytest.mark.parametrize("rows", [1, 5, 15])
def test_rollouts_that_ran_out_of_memory_are_those_of_an_unbroken_run(talker, shelf, capsys, rows: int) -> None:
    unbroken = play(talker, shelf, None)
    slots, seen, progress = Limit("engine.batch_size", 64), [], []
    with memory_for(talker, 10**9, seen, rows):
        broken = play(talker, shelf, slots, progress.append)
    assert [t.to_dict() | {"logprobs": None} for t in broken] == [t.to_dict() | {"logprobs": None} for t in unbroken]
    for one, other in zip(broken, unbroken, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert slots.value <= rows and slots.figures() == {"batch_size": slots.value}
    assert sum(progress) == 16, "each episode is counted once"
    (line,) = told(capsys)
    assert f"engine.batch_size={slots.value}" in line
    with memory_for(talker, 10**9, seen := [], rows):
        play(talker, shelf, slots)
    assert max(shape[0] for shape in seen if shape[1] == 1) <= rows and not told(capsys), "kept, and told once"


def test_episodes_that_were_over_are_not_played_again(talker, shelf) -> None:
    """Memory runs out as the first long document is read: who had answered by then had answered."""
    writes, over = 0, []

    def fail(module: torch.nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        nonlocal writes
        writes += given["input_ids"].shape[1] == 1
        if writes == 12:
            writes += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    played: list[int] = []
    real = rollout_module.Play.run

    def watched(play: Any, seats: Sequence[Any]) -> None:
        played.append(len(seats))
        over.append(writes)
        real(play, seats)

    handle = talker[0].get_base_model().base_model.register_forward_hook(fail, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module.Play, "run", watched)
        found = play(talker, shelf, Limit("engine.batch_size", 64))
    handle.remove()
    unbroken = play(talker, shelf, None)
    assert len(played) == 2 and played[0] == 16 and 0 < played[1] < 16
    assert [t.completion_ids for t in found] == [t.completion_ids for t in unbroken]


def test_a_rollout_that_failed_has_given_its_cache_back_before_the_next_is_made(talker, shelf, monkeypatch) -> None:
    made: list[weakref.ref[Decoder]] = []
    alive: list[int] = []
    real = Decoder.__init__

    def watched(decoder: Decoder, *given: Any, **how: Any) -> None:
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(decoder))
        real(decoder, *given, **how)

    monkeypatch.setattr(Decoder, "__init__", watched)
    with memory_for(talker, 10**9, [], rows=3):
        play(talker, shelf, Limit("engine.batch_size", 64))
    assert len(made) >= 3 and alive == [0] * len(made)


def test_an_episode_that_does_not_fit_alone_ends_the_run_with_what_to_do(talker, shelf) -> None:
    with memory_for(talker, 10**9, [], rows=0), pytest.raises(UserError) as caught:
        play(talker, shelf, Limit("engine.batch_size", 64))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value) and "rollouts" in str(caught.value)
    assert not talker[0].training and play(talker, shelf, None, n=1), "the policy can be used again"


def test_longer_prompts_shrink_to_fewer_rows_too(talker, shelf) -> None:
    """Rows are fewer to begin with, so that a half of the setting can be too little."""
    prompts = [[5] * 650 for _ in QUESTIONS]
    slots = Limit("engine.batch_size", 64)
    with memory_for(talker, 10**9, seen := [], rows=7):
        play(talker, shelf, slots, prompts=prompts)
    steps = [shape[0] for shape in seen if shape[1] == 1]
    assert max(steps) == 16 and steps[-1] <= 7 and 0 < slots.value < 16


def test_without_a_limit_the_error_is_the_callers(talker, shelf) -> None:
    with memory_for(talker, 10**9, [], rows=3), pytest.raises(torch.OutOfMemoryError):
        play(talker, shelf, None)


def test_a_measurement_of_a_stage_that_had_to_shrink_says_that_memory_ran_out() -> None:
    measure._check_not_shrunk({"steps": 2, "skipped": 0})
    with pytest.raises(torch.OutOfMemoryError):
        measure._check_not_shrunk({"steps": 2, "skipped": 0, "micro_batch_tokens": 199})


def test_memory_that_the_system_refuses_on_a_cpu_is_memory_that_ran_out(talking_policy_folder: Path) -> None:
    """Steps and rollouts of a process whose address space is limited come to what they come to without a limit."""
    script = Path(__file__).with_name("little_memory.py")
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run([sys.executable, script, talking_policy_folder], capture_output=True, text=True, env=settings)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    told = [line for line in ran.stderr.splitlines() if "memory ran out" in line]
    kept, slots = result["kept"][0], result["slots"]
    assert kept < 100_000 and result["kept"][1] is None and slots < 128
    assert len(told) == 2 and f"grpo.micro_batch_tokens={kept}" in told[0] and f"engine.batch_size={slots}" in told[1]
    assert result["gradient"] > 1e-4 and result["difference"] < 1e-4 * result["gradient"]
    assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-4, abs=1e-6)
    assert result["same_episodes"]
    error, (line, code) = result["refused"]
    assert "DefaultCPUAllocator" in error and code == 1 and line.startswith("memory ran out; `searche1-lite doctor`")


def test_other_errors_are_not_taken_for_it() -> None:
    def attempt(value: int) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Limit("x.y", 8).until_it_fits(attempt, lambda value: value // 2, "a test", "nothing")
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory")) and not is_out_of_memory(ValueError("out of it"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(UserError("the GPU's memory: out of memory"))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 2000))
def test_halving_ends_with_each_sequence_by_itself(lengths: list[int], budget: int) -> None:
    tried = [budget]
    while (smaller := smaller_micro_batches(lengths, tried[-1])) is not None:
        assert smaller <= tried[-1] / 2
        assert micro_batches(lengths, smaller) != micro_batches(lengths, tried[-1])
        tried.append(smaller)
    assert len(micro_batches(lengths, tried[-1])) == len(lengths)


def test_a_limit_goes_on_where_another_stopped_and_a_stage_begins_with_what_is_set() -> None:
    one, other = Limit("grpo.micro_batch_tokens", 64), Limit("grpo.micro_batch_tokens", 64)

    def attempt(value: int) -> int:
        if value > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return value

    assert one.until_it_fits(attempt, lambda value: value // 2, "a test", "nothing") == 16
    other.restore(one.state())
    assert other.value == 16 and other.figures() == {"micro_batch_tokens": 16}
    other.reset()
    assert other.value == 64 and other.figures() == {}
