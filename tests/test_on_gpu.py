"""What only a GPU can show: captured steps, the kernels that compute there, and memory that really runs out.

Skipped where there is none; they need no Java: `python -m pytest tests/test_on_gpu.py`. What is exact is asked in fp32,
as on a card without bf16; in bf16 what rollouts and training say must be near each other.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import (
    ShelfRetriever,
    adapter_weights,
    all_equal,
    dense_divergence,
    fixed_weights,
    fresh_policy,
    tiny_protocol_config,
)
from distillation import make_pairs
from peft import PeftModel
from test_shrinking import QUESTIONS, Stage
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.policy import engine
from searche1_lite.policy import model as model_module
from searche1_lite.policy.engine import Decoder, UniformStream
from searche1_lite.policy.losses import divergence, token_logprobs
from searche1_lite.policy.model import shadow_weights
from searche1_lite.policy.shrinking import Limit
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.train import stage_trainer
from searche1_lite.train.grpo import train_grpo
from searche1_lite.train.ofsd import train_ofsd
from searche1_lite.train.stage_trainer import StageTraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

Policy = tuple[PeftModel, PreTrainedTokenizerBase]
STEPS = 2 * engine.CAPTURE_AFTER
"""Of a turn: enough for its first ones to be computed, one to be captured and the others to be replayed."""


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card that has no bf16."""
    for module in (model_module, stage_trainer):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)


@pytest.fixture
def policy(tiny_policy_folder: Path, in_fp32: None) -> Policy:
    return fresh_policy(tiny_policy_folder)


@pytest.fixture(params=["4-bit", "plain"])
def plain(request: pytest.FixtureRequest) -> bool:
    return request.param == "plain"


@contextmanager
def counted_replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """An entry for each step that a graph made."""
    replays: list[object] = []
    real = torch.cuda.CUDAGraph.replay
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), real(graph))[1])
        yield replays


def ids_of(model: PeftModel, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)


def fresh_logits(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """(T, V) of a pass over these tokens alone."""
    with torch.inference_mode(), model_module.compute_context(model):
        return model(input_ids=ids_of(model, ids)).logits[0].float()


def write_turn(decoder: Decoder, texts: dict[int, list[int]], budget: int) -> dict[int, list[int]]:
    """Has each row read its text and write one turn, greedily."""
    decoder.prefill(list(texts), [ids[:-1] for ids in texts.values()])
    for slot, ids in texts.items():
        decoder.begin(slot, ids[-1], budget, None)
    written: dict[int, list[int]] = {}
    while decoder.writing.any():
        written |= {slot: sampled.ids for slot, sampled in decoder.step()}
    return written


@torch.inference_mode()
def three_turns(policy: Policy, rows: int) -> list[tuple[list[int], list[int]]]:
    """What each row had read and what it wrote then, turn by turn."""
    rng = Random(0)
    texts = {slot: [*b"Q: ", *rng.choices(range(97, 123), k=rng.randrange(1, 30))] for slot in range(rows)}
    so_far, turns = dict(texts), []
    decoder = Decoder(*policy, rows, 400, greedy=True)
    for _ in range(3):
        written = write_turn(decoder, texts, STEPS)
        turns += [(so_far[slot], written[slot]) for slot in so_far]
        replies = {slot: rng.choices(range(97, 123), k=rng.randrange(0, 40)) for slot in so_far}
        texts = {slot: [written[slot][-1], *replies[slot]] for slot in so_far}
        so_far = {slot: so_far[slot] + written[slot] + replies[slot] for slot in so_far}
    return turns


@torch.inference_mode()
def generated(model: PeftModel, before: list[int], count: int) -> list[int]:
    ids = ids_of(model, before)
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, len(before) :].tolist()


def test_captured_steps_write_what_generate_writes_on_64_questions_with_three_turns_each(
    policy: Policy, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_replays(monkeypatch) as replays, shadow_weights(policy[0], plain):
        turns = three_turns(policy, 64)
    assert len(replays) > STEPS
    for before, ids in turns:
        assert generated(policy[0], before, len(ids)) == ids


def test_a_step_after_an_update_computes_with_the_new_weights(
    policy: Policy, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy[0]
    with shadow_weights(model, plain):
        before = three_turns(policy, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    with counted_replays(monkeypatch) as replays, shadow_weights(model, plain):
        after = three_turns(policy, 8)
    assert replays and after != before
    for text, ids in after:
        assert generated(model, text, len(ids)) == ids


@torch.inference_mode()
def test_kept_kv_equals_a_fresh_prefill(policy: Policy, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = policy
    seen: list[torch.Tensor] = []
    real = engine.pick_tokens
    monkeypatch.setattr(engine, "pick_tokens", lambda logits, *rest: (seen.append(logits), real(logits, *rest))[1])
    rows = {0: list(b"What?"), 2: list(b"A much longer prompt than the others"), 3: list(b"Mid one")}
    with shadow_weights(model, plain):
        decoder = Decoder(model, tokenizer, 5, 300, greedy=True)
        texts = dict(rows)
        for index in range(3):
            seen.clear()
            written = write_turn(decoder, texts, 3)
            for slot, ids in rows.items():
                torch.testing.assert_close(seen[0][slot].float(), fresh_logits(model, ids)[-1], atol=1e-4, rtol=1e-4)
                rows[slot] = ids + written[slot]
            texts = {slot: [rows[slot][-1], *b" docs" * (1 + (slot + index) % 3)] for slot in rows}
            rows = {slot: ids + texts[slot][1:] for slot, ids in rows.items()}


def play(policy: Policy, shelf: ShelfRetriever, rows: int, **how: object) -> list[Trajectory]:
    protocol = Protocol(policy[1], tiny_protocol_config())
    engine_config = EngineConfig(batch_size=rows, shadow=how.pop("shadow", "always"))  # type: ignore[arg-type]
    agent = Agent(*policy, shelf, protocol, engine=engine_config, k=2)
    return rollout(agent, QUESTIONS, 16, Sampling(("gpu",), **how))  # type: ignore[arg-type]


def told(played: list[Trajectory]) -> list[list[int]]:
    return [trajectory.completion_ids for trajectory in played]


def test_the_same_trajectory_comes_out_of_1_8_and_64_rows(
    talking_policy_folder: Path, in_fp32: None, shelf: ShelfRetriever
) -> None:
    policy = fresh_policy(talking_policy_folder)
    alone = told(play(policy, shelf, 1))
    assert len({tuple(ids) for ids in alone}) > 20
    assert told(play(policy, shelf, 8)) == alone and told(play(policy, shelf, 64)) == alone


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@torch.inference_mode()
def test_sampled_logprobs_agree_with_recomputed_ones(
    tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, plain: bool
) -> None:
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    monkeypatch.setattr(model_module, "compute_dtype", lambda device: torch.bfloat16 if bf16 else torch.float32)
    model, tokenizer = fresh_policy(tiny_policy_folder)
    prompts = [list(b"Q: row %d" % row) for row in range(32)]
    with shadow_weights(model, plain), model_module.compute_context(model):
        decoder = Decoder(model, tokenizer, 32, 100, temperature=0.7, logprobs=True)
        decoder.prefill(range(32), [ids[:-1] for ids in prompts])
        for slot, ids in enumerate(prompts):
            decoder.begin(slot, ids[-1], 40, UniformStream(derive_seed("gpu", slot)))
        ended = {}
        while decoder.writing.any():
            ended |= dict(decoder.step())
    differences = []
    for slot, ids in enumerate(prompts):
        found = torch.tensor(ended[slot].ids, device=model.device).unsqueeze(1)
        logits = fresh_logits(model, ids + ended[slot].ids)[len(ids) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, found).squeeze(1)
        differences.append((torch.tensor(ended[slot].logprobs, device=model.device) - expected).abs())
    every = torch.cat(differences)
    assert len(every) > 300 and (every.mean() < 0.1 if bf16 else every.max() < 1e-3), (every.mean(), every.max())


def head_and_states(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """More tokens and words than one tile holds."""
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(64, 5000, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / 4)
    student, teacher = (torch.randn(700, 64, generator=generator).to("cuda", dtype) for _ in range(2))
    return head.to("cuda", dtype), student.requires_grad_(True), teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_kernels_divergence_and_gradient_equal_the_dense_ones(kind: str, dtype: torch.dtype) -> None:
    head, student, teacher = head_and_states(dtype)
    values = divergence(head, student, teacher, kind, 0.8)
    values.sum().backward()
    exact = student.detach().double().requires_grad_(True)
    weight = head.weight.double()
    expected = dense_divergence(kind, exact @ weight.T, teacher.double() @ weight.T, 0.8)
    expected.sum().backward()
    near = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(values.double(), expected, **near)
    assert student.grad is not None and exact.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiled_logprobs_and_their_gradient_equal_the_dense_ones(dtype: torch.dtype) -> None:
    head, hidden, _ = head_and_states(dtype)
    targets = torch.randint(5000, (700,), generator=torch.Generator().manual_seed(3)).to("cuda")
    values, _ = token_logprobs(head, hidden, targets, 0.8)
    values.sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    dense = torch.log_softmax(exact @ head.weight.double().T / 0.8, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    dense.sum().backward()
    near = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(values.double(), dense, **near)
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, **near)


def stage_config() -> Config:
    return Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(batch_size=16, shadow="always"),
        grpo=GRPOStageConfig(steps=3, questions_per_step=4, group_size=8, learning_rate=1e-2, micro_batch_tokens=600),
        ofsd=OFSDStageConfig(batch_size=4, epochs=2, learning_rate=1e-2, micro_batch_tokens=600),
    )


@pytest.mark.parametrize("kind", ["grpo", "ofsd"])
def test_a_stage_trains_the_adapter_in_fp32_and_leaves_the_4_bit_base_as_it_was(
    talking_policy_folder: Path, tiny_policy_folder: Path, tmp_path: Path, shelf: ShelfRetriever, kind: str
) -> None:
    """In the dtype that this GPU computes in; what rollouts sampled from is what training computes, nearly."""
    # The policy that talks does not mind what it is shown, so there is nothing in it to distil.
    model, tokenizer = policy = fresh_policy(talking_policy_folder if kind == "grpo" else tiny_policy_folder)
    config, records = stage_config(), []
    protocol = Protocol(tokenizer, config.protocol)
    fixed, adapter = fixed_weights(model), adapter_weights(model)
    how = {"round_index": 1, "output_dir": tmp_path, "on_step": records.append}

    def rollouts(asked, n: int, seed_parts) -> list[Trajectory]:
        return rollout(
            Agent(*policy, shelf, protocol, engine=config.engine, k=2), asked, n, Sampling(seed_parts, logprobs=True)
        )

    if kind == "grpo":
        train_grpo(*policy, rollouts, QUESTIONS, StageTraining(config, **how))
        assert all(record["sampling_logprob_difference"] < 0.1 for record in records if not record["skipped"])
    else:
        train_ofsd(*policy, protocol, make_pairs(protocol), StageTraining(config, **how))
        assert records[-1]["loss"] < records[0]["loss"]
    after = adapter_weights(model)
    assert records and all(torch.isfinite(torch.tensor(record["loss"])) for record in records)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in after.values())
    assert not all_equal(after, adapter) and all_equal(fixed_weights(model), fixed)


A_TOKEN, LEFT = 2 * 2**20, 320 * 2**20
"""Bytes that a training pass is made to take for each token, and those that are to be had."""


@contextmanager
def little_memory(left: int) -> Iterator[None]:
    """This process may allocate only so many bytes more."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + left) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_for_which_memory_runs_out_comes_to_what_one_with_enough_comes_to(
    talking_policy_folder: Path, tmp_path: Path, in_fp32: None
) -> None:
    def stage(name: str, left: int) -> Stage:
        policy = fresh_policy(talking_policy_folder)

        def take(module: torch.nn.Module, args: tuple, given: dict, output) -> None:
            if output.last_hidden_state.requires_grad:
                kept = [torch.empty(given["input_ids"].numel() * A_TOKEN, dtype=torch.uint8, device="cuda")]
                output.last_hidden_state.register_hook(lambda gradient: kept.clear())

        policy[0].get_base_model().base_model.register_forward_hook(take, with_kwargs=True)
        (tmp_path / name).mkdir()
        with little_memory(left):
            return Stage("grpo", policy, tmp_path / name, 100_000)

    few, enough = stage("few", LEFT), stage("enough", 2**32)
    assert few.result["micro_batch_tokens"] < 100_000 and "micro_batch_tokens" not in enough.result
    for one, other in zip(few.gradients, enough.gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_rollouts_for_which_memory_runs_out_are_the_same_in_fewer_rows(
    talking_policy_folder: Path, in_fp32: None, shelf: ShelfRetriever
) -> None:
    policy = fresh_policy(talking_policy_folder)
    prompts = [[5] * 2000] * len(QUESTIONS)
    config = tiny_protocol_config(max_prompt_tokens=2000)

    def long_prompts(slots: Limit | None) -> list[Trajectory]:
        return rollout(
            Agent(*policy, shelf, Protocol(policy[1], config), engine=EngineConfig(batch_size=256), k=1, slots=slots),
            QUESTIONS,
            64,
            Sampling(("gpu",)),
            prompts=prompts,
        )

    enough = told(long_prompts(None))
    slots = Limit("engine.batch_size", 256)
    with little_memory(160 * 2**20):
        with pytest.raises(torch.OutOfMemoryError):
            long_prompts(None)
        assert told(long_prompts(slots)) == enough
    assert slots.value < 256


def test_rollouts_give_their_memory_back(talking_policy_folder: Path, shelf: ShelfRetriever) -> None:
    policy = fresh_policy(talking_policy_folder)
    play(policy, shelf, 64)
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5):
        play(policy, shelf, 64)
    assert torch.cuda.memory_allocated() <= held[0] and torch.cuda.memory_reserved() <= held[1]


def test_logits_that_are_no_numbers_are_told(tiny_policy_folder: Path, in_fp32: None) -> None:
    model, tokenizer = fresh_policy(tiny_policy_folder)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
    with torch.inference_mode(), pytest.raises(UserError, match="computes no numbers"):
        write_turn(Decoder(model, tokenizer, 2, 100, greedy=True), {0: list(b"What?"), 1: list(b"Why?")}, STEPS)
