"""GRPO through TRL's real trainer: what moves, what must not, and which tokens the loss sees."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ShelfRetriever,
    adapter_weights,
    all_equal,
    fixed_weights,
    fresh_policy,
    gradient_flags,
    recorded_gradients,
    tiny_protocol_config,
)
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from searche1_lite import grpo
from searche1_lite import model as model_module
from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, ModelConfig, OFSDStageConfig
from searche1_lite.engine import Decoder
from searche1_lite.errors import UserError
from searche1_lite.grpo import RolloutGRPOTrainer, exact_match_reward, train_grpo, trim_padding
from searche1_lite.logprobs import token_logprobs
from searche1_lite.model import keep_adapter_fp32, load_policy, save_adapter
from searche1_lite.ofsd import select_pairs, train_ofsd
from searche1_lite.protocol import Protocol
from searche1_lite.rollout import rollout
from searche1_lite.search.base import Passage
from searche1_lite.trajectory import Question, Trajectory

QUESTIONS = [Question(name, f"What about {name}?", ["Peru"]) for name in ("rivers", "a sea", "hills", "towns", "rain")]
KEYS = {
    "stage", "round", "step", "loss", "reward", "em", "kl", "grad_norm", "zero_std_fraction", "searches", "tokens",
    "tokens_per_second", "rollout_seconds", "learning_rate", "seconds",
}  # fmt: skip


def configured(**stage: Any) -> Config:
    settings = {"steps": 2, "questions_per_step": 2, "group_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}
    return Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(batch_size=8),
        grpo=GRPOStageConfig(**{**settings, "warmup_ratio": 0.0, **stage}),
        ofsd=OFSDStageConfig(batch_size=2, micro_batch_size=2),
    )


class Stage:
    """One GRPO stage on a policy, with what it reported: `records`, `batches` of trajectories, `result`."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        config: Config,
        *,
        seed: int = 0,
        round_index: int = 1,
        deadline: float | None = None,
        questions: Sequence[Question] = QUESTIONS,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self.batches: list[list[Trajectory]] = []
        shelf = ShelfRetriever([Passage("1", "Lima", "Lima is in Peru"), Passage("2", "Oslo", "Oslo is far away")])

        def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
            protocol = Protocol(tokenizer, config.protocol)
            return rollout(
                model, tokenizer, shelf, protocol, asked, n, engine=config.engine, k=config.search.k,
                seed_parts=seed_parts,
            )  # fmt: skip

        self.result = train_grpo(
            model,
            tokenizer,
            answer,
            questions,
            config,
            run_seed=seed,
            round_index=round_index,
            output_dir=folder,
            on_step=self.records.append,
            on_rollouts=self.batches.append,
            deadline=deadline,
        )


@pytest.fixture
def talker(talking_policy_folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    return fresh_policy(talking_policy_folder)


def test_each_step_rolls_out_group_size_rows_for_each_question_in_a_row(talker, tmp_path: Path) -> None:
    stage = Stage(*talker, tmp_path, configured(steps=4))
    assert stage.result["steps"] == len(stage.batches) == len(stage.records) == 4
    protocol = Protocol(talker[1], tiny_protocol_config())
    for batch in stage.batches:
        asked = [t.question.id for t in batch[::4]]
        assert len(set(asked)) == 2 and set(asked) <= {question.id for question in QUESTIONS}
        assert [(t.question.id, t.sample) for t in batch] == [(name, sample) for name in asked for sample in range(4)]
        assert all(t.prompt_ids == protocol.prompt_ids(t.question.question) for t in batch)
    orders = [[t.question.id for t in batch[::4]] for batch in stage.batches]
    assert len({name for order in orders[:2] for name in order}) == 4, "no question comes twice in one pass"


def test_only_the_adapter_moves_and_the_policy_is_given_back_as_it_was(talker, tmp_path: Path) -> None:
    model, _ = talker
    before, fixed, flags = adapter_weights(model), fixed_weights(model), gradient_flags(model)
    stage = Stage(*talker, tmp_path, configured())
    assert stage.result["steps"] == 2
    after = adapter_weights(model)
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert all(not torch.equal(before[key], after[key]) for key in before), "every LoRA matrix is trained"
    assert any(key.endswith("absmax") for key in fixed), "the 4-bit scales are compared too"
    assert all_equal(fixed_weights(model), fixed)
    assert gradient_flags(model) == flags and list(model.peft_config) == ["default"]
    assert model.active_adapter == "default" and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_model_written_tokens_are_projected_onto_the_vocabulary(
    talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pass for the reference as by those for the update."""
    projected: list[int] = []

    def watched(head: torch.nn.Module, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        projected.append(len(hidden))
        return token_logprobs(head, hidden, *rest)

    monkeypatch.setattr(grpo, "token_logprobs", watched)
    stage = Stage(*talker, tmp_path, configured(steps=1, kl_coefficient=0.1))
    written = [t.n_model_tokens for t in stage.batches[0]]
    assert any(t.n_model_tokens < len(t.completion_ids) for t in stage.batches[0]), "there is environment text"
    by_micro_batch = [sum(written[first : first + 2]) for first in range(0, 8, 2)]
    assert projected[:4] == by_micro_batch and sum(projected[4:]) == sum(written)


def test_in_bf16_the_cache_is_bf16_and_the_adapter_stays_fp32(
    talking_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the 4-bit base computes in bf16, and small updates of the adapter are not rounded away."""
    monkeypatch.setattr(model_module, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(grpo, "compute_dtype", lambda device: torch.bfloat16)
    kept: set[torch.dtype] = set()
    real_keep = Decoder.keep

    def watched_keep(decoder: Decoder, rows: Sequence[int]) -> None:
        kept.update(layer.keys.dtype for layer in decoder._cache.layers)
        kept.update(layer.values.dtype for layer in decoder._cache.layers)
        real_keep(decoder, rows)

    monkeypatch.setattr(Decoder, "keep", watched_keep)
    model, tokenizer = fresh_policy(talking_policy_folder)
    before = adapter_weights(model)
    stage = Stage(model, tokenizer, tmp_path, configured(steps=1, learning_rate=1e-6, kl_coefficient=0.1))
    assert kept == {torch.bfloat16}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name} == {torch.bfloat16}
    middle = adapter_weights(model)
    changed = [key for key in before if not torch.equal(before[key], middle[key])]
    assert changed and all(weight.dtype == torch.float32 for weight in middle.values())
    # An update of 1e-6 to a weight of 0.05 is far below what bf16 can tell apart.
    assert any(torch.equal(before[key].bfloat16(), middle[key].bfloat16()) for key in changed)
    assert math.isfinite(stage.records[0]["loss"])


def test_a_stage_that_breaks_off_still_gives_the_policy_back(talker, tmp_path: Path) -> None:
    model, tokenizer = talker
    before, fixed, flags = adapter_weights(model), fixed_weights(model), gradient_flags(model)
    hopeless = [Question("long", "Why? " * 100, ["x"]), Question("too", "How? " * 100, ["x"])]
    with pytest.raises(UserError, match="max_prompt_tokens"):
        Stage(model, tokenizer, tmp_path, configured(), questions=hopeless)
    assert list(model.peft_config) == ["default"] and gradient_flags(model) == flags and not model.training
    assert all_equal(adapter_weights(model), before) and all_equal(fixed_weights(model), fixed)


def test_records_have_the_documented_keys_and_finite_figures_that_fit_the_rollouts(talker, tmp_path: Path) -> None:
    stage = Stage(*talker, tmp_path, configured(steps=3, kl_coefficient=0.1), round_index=2)
    for step, (record, batch) in enumerate(zip(stage.records, stage.batches, strict=True), start=1):
        assert record.keys() == KEYS
        assert record["stage"] == "grpo" and record["round"] == 2 and record["step"] == step
        assert all(math.isfinite(value) for key, value in record.items() if key != "stage")
        assert record["em"] == pytest.approx(sum(t.reward for t in batch) / 8)
        assert record["reward"] == pytest.approx(record["em"])
        assert record["searches"] == sum(t.n_searches for t in batch) / 8
        assert record["tokens"] == sum(t.n_model_tokens for t in batch)
        groups = [{t.reward for t in batch[:4]}, {t.reward for t in batch[4:]}]
        assert record["zero_std_fraction"] == sum(len(rewards) == 1 for rewards in groups) / 2
        assert record["learning_rate"] == 1e-2
    assert stage.records[0]["kl"] == pytest.approx(0.0, abs=1e-7), "the reference is the adapter as the stage began"
    assert stage.records[1]["kl"] > 1e-4 and stage.records[2]["kl"] > 1e-4, "and stays there"


def test_two_stages_with_the_same_seed_end_bit_equal_and_another_seed_does_not(
    talking_policy_folder: Path, tmp_path: Path
) -> None:
    ends = []
    for seed in (3, 3, 4):
        model, tokenizer = fresh_policy(talking_policy_folder)
        torch.rand(seed)  # whatever was drawn before
        Stage(model, tokenizer, tmp_path, configured(), seed=seed)
        ends.append(adapter_weights(model))
    assert all_equal(ends[0], ends[1]) and not all_equal(ends[0], ends[2])


def test_stages_on_a_used_policy_equal_those_on_a_freshly_loaded_one(
    talker, talking_policy_folder: Path, tmp_path: Path
) -> None:
    used, tokenizer = talker
    config = configured()
    first = Stage(used, tokenizer, tmp_path, config)
    pairs, _ = select_pairs([t for batch in first.batches for t in batch])
    assert len(pairs) > 1
    save_adapter(used, tmp_path / "adapter")
    fresh, _ = load_policy(ModelConfig(name=str(talking_policy_folder)), adapter=tmp_path / "adapter", seed=9)
    protocol = Protocol(tokenizer, config.protocol)
    for model in (used, fresh):
        before = adapter_weights(model)
        train_ofsd(
            model, tokenizer, protocol, pairs, config, run_seed=0, round_index=1, output_dir=tmp_path,
            on_step=lambda record: None,
        )  # fmt: skip
        assert not all_equal(adapter_weights(model), before)
        Stage(model, tokenizer, tmp_path, config, round_index=2)
    assert all_equal(adapter_weights(used), adapter_weights(fresh))


def model_written_logprob(model: PeftModel, trajectory: Trajectory) -> float:
    """Mean log-probability of the trajectory's model-written tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])).logits[0]
    scores = torch.log_softmax(logits[len(trajectory.prompt_ids) - 1 : -1], dim=-1)
    own = scores.gather(1, torch.tensor(trajectory.completion_ids).unsqueeze(1)).squeeze(1)
    return float(own[torch.tensor(trajectory.loss_mask).bool()].mean())


def test_a_step_makes_what_was_rewarded_more_likely_than_its_siblings(
    talker, talking_policy_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = talker
    (batch,) = Stage(model, tokenizer, tmp_path, configured(steps=1, group_size=8, learning_rate=1e-3)).batches
    untrained, _ = fresh_policy(talking_policy_folder)
    gains = [model_written_logprob(model, t) - model_written_logprob(untrained, t) for t in batch]
    for group in (slice(0, 8), slice(8, 16)):
        right = [gain for gain, t in zip(gains[group], batch[group], strict=True) if t.correct]
        wrong = [gain for gain, t in zip(gains[group], batch[group], strict=True) if not t.correct]
        assert right and wrong
        assert sum(right) / len(right) > 0 > sum(wrong) / len(wrong)


def test_the_step_in_which_the_deadline_passes_is_the_last(talker, tmp_path: Path) -> None:
    stage = Stage(*talker, tmp_path, configured(steps=50), deadline=time.monotonic())
    assert stage.result["steps"] == len(stage.records) == len(stage.batches) == 1
    assert stage.result["rollout_seconds"] == pytest.approx(stage.records[0]["rollout_seconds"], abs=1e-3)


def test_fewer_questions_than_a_step_takes_are_an_error_that_says_what_to_lower(talker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grpo.questions_per_step=6 is more than the 5 training questions"):
        Stage(*talker, tmp_path, configured(questions_per_step=6))
    assert Stage(*talker, tmp_path, configured(questions_per_step=5, steps=1)).result["steps"] == 1


def test_a_stage_of_no_steps_does_nothing(talker, tmp_path: Path) -> None:
    before = adapter_weights(talker[0])
    stage = Stage(*talker, tmp_path, configured(steps=0))
    assert stage.result == {"steps": 0, "rollout_seconds": 0.0} and not stage.batches
    assert all_equal(adapter_weights(talker[0]), before)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_gradient_is_zero_at_every_environment_token_and_only_there(
    talker, tmp_path: Path, checkpointing: bool
) -> None:
    config = configured(steps=1, group_size=6, micro_batch_size=3)
    config.model.gradient_checkpointing = checkpointing
    with recorded_gradients(talker[0]) as gradient_of:
        (batch,) = Stage(*talker, tmp_path, config).batches
    environment, learning = 0, 0
    for group in (batch[:6], batch[6:]):
        spread = len({t.reward for t in group}) > 1
        for t in group:
            size = gradient_of(t).abs().amax(dim=1)
            by_model = torch.tensor(t.loss_mask).bool()
            assert torch.all(size[~by_model] == 0.0)
            assert torch.all(size[by_model] > 0.0) if spread else torch.all(size == 0.0)
            environment += int((~by_model).sum())
            learning += spread
    assert environment > 100 and learning >= 6


def test_the_first_gradient_is_that_of_the_published_objective(
    talker, talking_policy_folder: Path, tmp_path: Path
) -> None:
    # Fresh rollouts and a fresh reference: ratio 1, KL 0. What is left of the gradient of a token's logits is
    # (p - onehot) * advantage / temperature, over the rollout's number of model-written tokens and of rollouts.
    temperature, size = 0.7, 4
    config = configured(steps=1, group_size=size)
    config.engine.temperature = temperature
    with recorded_gradients(talker[0]) as gradient_of:
        (batch,) = Stage(*talker, tmp_path, config).batches
    untrained, _ = fresh_policy(talking_policy_folder)
    head = untrained.get_output_embeddings().weight.detach().double()
    for group in (batch[:size], batch[size:]):
        rewards = torch.tensor([t.reward for t in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert rewards.std() > 0
        for t, advantage in zip(group, advantages, strict=True):
            ids, keep = torch.tensor(t.completion_ids), torch.tensor(t.loss_mask).unsqueeze(1)
            with torch.no_grad():
                logits = untrained(input_ids=torch.tensor([t.prompt_ids + t.completion_ids])).logits[0].double()
            likely = torch.softmax(logits[len(t.prompt_ids) - 1 : -1] / temperature, dim=-1)
            expected = (likely @ head - head[ids]) * keep * advantage / temperature / (t.n_model_tokens * len(batch))
            torch.testing.assert_close(gradient_of(t).double(), expected, atol=1e-6, rtol=1e-4)


def test_the_reward_function_hands_on_the_exact_match_and_reads_no_text() -> None:
    rewards = exact_match_reward(["0", "0"], ["<answer>Peru</answer>", ""], em=[0.0, 1.0], trainer_state=None)
    assert rewards == [0.0, 1.0]


def padded_inputs(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Two trajectories of unequal lengths in a micro-batch of TRL's, padded for a longer neighbour."""
    pad = tokenizer.pad_token_id
    rows = [([5, 6, 7], [8, 9, 10, 11], [1, 0, 0, 1]), ([12], [13, 14], [1, 1])]
    width = (6, 9)
    prompts, completions = [row[0] for row in rows], [row[1] for row in rows]
    return {
        "prompt_ids": torch.tensor([[pad] * (width[0] - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (width[0] - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [pad] * (width[1] - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (width[1] - len(ids)) for ids in completions]),
        "tool_mask": torch.tensor([mask + [1] * (width[1] - len(mask)) for _, _, mask in rows]),
        "ref_per_token_logps": -torch.arange(18.0).reshape(2, 9) / 10,
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(6),
    }


def test_trimming_cuts_padding_and_nothing_else(tiny_policy) -> None:
    inputs = padded_inputs(tiny_policy[1])
    trimmed = trim_padding(inputs)
    assert trimmed.keys() == inputs.keys()
    for side in ("prompt", "completion"):
        full, cut = inputs[f"{side}_mask"].bool(), trimmed[f"{side}_mask"].bool()
        assert cut.shape[1] == full.sum(dim=1).max(), "as narrow as the longest row"
        assert torch.equal(inputs[f"{side}_ids"][full], trimmed[f"{side}_ids"][cut])
        assert full.sum(dim=1).tolist() == cut.sum(dim=1).tolist()
    for key in ("tool_mask", "ref_per_token_logps"):
        assert torch.equal(trimmed[key], inputs[key][:, :4])
    for key in ("advantages", "num_items_in_batch"):
        assert torch.equal(trimmed[key], inputs[key])
    again = trim_padding(trimmed)
    assert all(torch.equal(again[key], trimmed[key]) for key in trimmed)
    assert inputs["prompt_ids"].shape == (2, 6), "what was given is not changed"


def test_the_loss_and_its_gradient_are_those_of_the_untrimmed_batch_and_of_the_formula(
    tiny_policy_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = fresh_policy(tiny_policy_folder)
    arguments = GRPOConfig(
        str(tmp_path), loss_type="grpo", beta=0.3, num_generations=2, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    with keep_adapter_fp32(model):
        trainer = RolloutGRPOTrainer(
            model, exact_match_reward, arguments, Dataset.from_dict({"prompt": ["0", "1"]}), processing_class=tokenizer
        )
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    inputs = padded_inputs(tokenizer)

    def loss_and_gradient(compute: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = compute(model, inputs)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    trimmed, trimmed_gradient = loss_and_gradient(trainer._compute_loss)
    full, full_gradient = loss_and_gradient(super(RolloutGRPOTrainer, trainer)._compute_loss)
    torch.testing.assert_close(trimmed, full, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trimmed_gradient, full_gradient, atol=1e-6, rtol=1e-4)
    assert full_gradient.abs().max() > 1e-3

    # By hand: the ratio is 1, so each model-written token costs -advantage + beta * (exp(d) - d - 1), d = ref - own.
    by_hand = []
    for row, (prompt, completion) in enumerate((([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14]))):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits, dim=-1)[range(len(completion)), completion]
        gap = inputs["ref_per_token_logps"][row, : len(completion)] - own
        costs = 0.3 * (gap.exp() - gap - 1) - inputs["advantages"][row]
        by_hand.append(costs[inputs["tool_mask"][row, : len(completion)].bool()].mean())
    torch.testing.assert_close(full, torch.stack(by_hand).mean(), atol=1e-4, rtol=1e-4)
