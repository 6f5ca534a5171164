"""GRPO through TRL's real trainer: what moves, what must not, and which tokens the loss sees."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
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
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, ModelConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.policy import model as model_module
from searche1_lite.policy.adapter import keep_adapter_fp32, save_adapter
from searche1_lite.policy.engine import Decoder
from searche1_lite.policy.losses import token_logprobs
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.train import grpo, stage_trainer
from searche1_lite.train.grpo import RolloutGRPOTrainer, earned_reward, question_order, train_grpo
from searche1_lite.train.ofsd import train_ofsd
from searche1_lite.train.pairs import select_pairs
from searche1_lite.train.stage_trainer import StageTraining, trainer_arguments

QUESTIONS = [Question(name, f"What about {name}?", ["Peru"]) for name in ("rivers", "a sea", "hills", "towns", "rain")]
KEYS = {
    "stage", "round", "step", "loss", "reward", "em", "kl", "grad_norm", "zero_std_fraction", "searches", "tokens",
    "tokens_per_second", "rollout_seconds", "learning_rate", "seconds", "skipped_groups", "sampling_logprob_difference",
    "skipped", "unanswered_rate", "invalid_rate", "no_search_rate", "repetition", "all_wrong_fraction",
    "failed_searches",
}  # fmt: skip


def configured(**stage: Any) -> Config:
    settings = {"steps": 2, "questions_per_step": 2, "group_size": 4, "micro_batch_tokens": 300, "learning_rate": 1e-2}
    return Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(batch_size=8),
        grpo=GRPOStageConfig(**{**settings, "warmup_ratio": 0.0, **stage}),
        ofsd=OFSDStageConfig(batch_size=2, micro_batch_tokens=2000),
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
        limit: int | None = None,
        questions: Sequence[Question] = QUESTIONS,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self.batches: list[list[Trajectory]] = []
        shelf = ShelfRetriever([Passage("1", "Lima", "Lima is in Peru"), Passage("2", "Oslo", "Oslo is far away")])

        def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
            protocol = Protocol(tokenizer, config.protocol)
            return rollout(
                Agent(model, tokenizer, shelf, protocol, engine=config.engine, k=config.search.k),
                asked,
                n,
                Sampling(seed_parts, logprobs=True),
            )

        self.result = train_grpo(
            model,
            tokenizer,
            answer,
            questions,
            StageTraining(
                replace(config, seed=seed),
                round_index=round_index,
                output_dir=folder,
                on_step=self.records.append,
                deadline=deadline,
                limit=limit,
            ),
            on_rollouts=self.batches.append,
        )


def informative(batch: Sequence[Trajectory], size: int) -> list[list[Trajectory]]:
    """The groups that were answered both right and wrong."""
    groups = [list(batch[first : first + size]) for first in range(0, len(batch), size)]
    return [group for group in groups if len({t.reward for t in group}) > 1]


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
    """By the passes for the reference as by those for the update; those of skipped groups are not."""
    projected: dict[bool, int] = {False: 0, True: 0}

    def watched(head: torch.nn.Module, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        projected[hidden.requires_grad] += len(hidden)
        return token_logprobs(head, hidden, *rest)

    monkeypatch.setattr(grpo, "token_logprobs", watched)
    stage = Stage(*talker, tmp_path, configured(steps=1, kl_coefficient=0.1))
    trained = [t for group in informative(stage.batches[0], 4) for t in group]
    assert any(t.n_model_tokens < len(t.completion_ids) for t in trained), "there is environment text"
    written = sum(t.n_model_tokens for t in trained)
    assert projected == {False: written, True: written}


def test_in_bf16_the_cache_is_bf16_and_the_adapter_stays_fp32(
    talking_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the 4-bit base computes in bf16, and small updates of the adapter are not rounded away."""
    monkeypatch.setattr(model_module, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(stage_trainer, "compute_dtype", lambda device: torch.bfloat16)
    kept: set[torch.dtype] = set()
    real_release = Decoder.release

    def watched_release(decoder: Decoder, slot: int) -> None:
        kept.update(layer.keys.dtype for layer in decoder._cache.layers)
        kept.update(layer.values.dtype for layer in decoder._cache.layers)
        real_release(decoder, slot)

    monkeypatch.setattr(Decoder, "release", watched_release)
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
        assert record["skipped"] is None
        assert all(math.isfinite(value) for key, value in record.items() if key not in ("stage", "skipped"))
        assert record["em"] == pytest.approx(sum(t.reward for t in batch) / 8)
        assert record["reward"] == pytest.approx(record["em"])
        assert record["searches"] == sum(t.n_searches for t in batch) / 8
        assert record["tokens"] == sum(t.n_model_tokens for t in batch)
        groups = [{t.reward for t in batch[:4]}, {t.reward for t in batch[4:]}]
        assert record["skipped_groups"] == sum(len(rewards) == 1 for rewards in groups)
        assert record["zero_std_fraction"] == record["skipped_groups"] / 2
        assert record["sampling_logprob_difference"] < 1e-5, "the rollouts are the policy's own"
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
    pairs = select_pairs([t for batch in first.batches for t in batch]).chosen
    assert len(pairs) > 1
    save_adapter(used, tmp_path / "adapter")
    fresh, _ = load_policy(ModelConfig(name=str(talking_policy_folder)), adapter=tmp_path / "adapter", seed=9)
    protocol = Protocol(tokenizer, config.protocol)
    for model in (used, fresh):
        before = adapter_weights(model)
        train_ofsd(
            model,
            tokenizer,
            protocol,
            pairs,
            StageTraining(config, round_index=1, output_dir=tmp_path, on_step=lambda record: None),
        )
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


def test_a_stage_that_is_cut_short_did_what_a_longer_one_did_until_then(talking_policy_folder, tmp_path: Path) -> None:
    stages = [
        Stage(*fresh_policy(talking_policy_folder), tmp_path, configured(steps=4, warmup_ratio=0.5), limit=limit)
        for limit in (2, None)
    ]
    assert [stage.result["steps"] for stage in stages] == [len(stage.records) for stage in stages] == [2, 4]
    told = [[(r["loss"], r["em"], r["learning_rate"]) for r in stage.records[:2]] for stage in stages]
    assert told[0] == told[1]


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
    config = configured(steps=1, group_size=6)
    config.model.gradient_checkpointing = checkpointing
    with recorded_gradients(talker[0]) as gradient_of:
        (batch,) = Stage(*talker, tmp_path, config).batches
    environment = 0
    for t in (trained := [t for group in informative(batch, 6) for t in group]):
        size = gradient_of(t).abs().amax(dim=1)
        by_model = torch.tensor(t.loss_mask).bool()
        assert torch.all(size[~by_model] == 0.0) and torch.all(size[by_model] > 0.0)
        environment += int((~by_model).sum())
    assert environment > 100 and len(trained) >= 6


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
    rewards = earned_reward(["0", "0"], ["<answer>Peru</answer>", ""], rewards=[0.0, 1.0], trainer_state=None)
    assert rewards == [0.0, 1.0]


def padded_inputs(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Three rollouts of unequal lengths as TRL pads them; the second is of a group that teaches nothing."""
    pad = tokenizer.pad_token_id
    rows = [([5, 6, 7], [8, 9, 10, 11], [1, 0, 0, 1]), ([7, 8], [9], [1]), ([12], [13, 14], [1, 1])]
    width = (6, 9)
    prompts, completions = [row[0] for row in rows], [row[1] for row in rows]
    return {
        "prompt_ids": torch.tensor([[pad] * (width[0] - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (width[0] - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [pad] * (width[1] - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (width[1] - len(ids)) for ids in completions]),
        "tool_mask": torch.tensor([mask + [1] * (width[1] - len(mask)) for _, _, mask in rows]),
        "ref_per_token_logps": -torch.arange(27.0).reshape(3, 9) / 10,
        "sampling_per_token_logps": -torch.arange(27.0).reshape(3, 9) / 20,
        "advantages": torch.tensor([1.0, 0.0, -1.0]),
        "trained": torch.tensor([True, False, True]),
        "num_items_in_batch": torch.tensor(5),
    }


def trainer_for(
    policy: tuple[PeftModel, PreTrainedTokenizerBase], folder: Path, micro_batch_tokens: int, beta: float = 0.3
) -> RolloutGRPOTrainer:
    arguments = GRPOConfig(
        str(folder), loss_type="grpo", beta=beta, num_generations=2, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model, tokenizer = policy
    with keep_adapter_fp32(model):
        trainer = RolloutGRPOTrainer(
            model, earned_reward, arguments, Dataset.from_dict({"prompt": ["0", "1"]}),
            processing_class=tokenizer, micro_batch_tokens=micro_batch_tokens, stop=Stop(),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    return trainer


def gradient(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain_trl_loss(trainer: RolloutGRPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """TRL's loss of a whole batch by TRL's own passes: padded, and projected at every position."""
    stock = GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", stock)
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("micro_batch_tokens", [1, 14, 1000])
def test_a_steps_loss_and_gradient_are_those_of_plain_trl_and_of_the_formula(
    tiny_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_tokens: int
) -> None:
    model, tokenizer = fresh_policy(tiny_policy_folder)
    trainer = trainer_for((model, tokenizer), tmp_path, micro_batch_tokens)
    inputs = padded_inputs(tokenizer)
    # What a skipped rollout adds of its own accord is its KL, here none.
    with torch.no_grad():
        ids, mask = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        own, *_ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, ids, mask, 9)
        inputs["ref_per_token_logps"][1] = own[1]
    full = plain_trl_loss(trainer, inputs)
    full.backward()
    full_gradient = gradient(model)
    model.zero_grad()
    trainer._metrics["train"].clear()
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda batch: batch)
    loss = trainer.training_step(model, inputs)
    torch.testing.assert_close(loss, full.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(model), full_gradient, atol=1e-6, rtol=1e-4)
    assert full_gradient.abs().max() > 1e-3

    # By hand: the ratio is 1, so each model-written token costs -advantage + beta * (exp(d) - d - 1), d = ref - own.
    by_hand, gaps, apart = [torch.tensor(0.0)], [], []
    for row, prompt, completion in ((0, [5, 6, 7], [8, 9, 10, 11]), (2, [12], [13, 14])):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits, dim=-1)[range(len(completion)), completion]
        keep = inputs["tool_mask"][row, : len(completion)].bool()
        gap = (inputs["ref_per_token_logps"][row, : len(completion)] - own)[keep]
        gaps.append(gap.exp() - gap - 1)
        apart.append((inputs["sampling_per_token_logps"][row, : len(completion)] - own)[keep].abs())
        by_hand.append((0.3 * gaps[-1] - inputs["advantages"][row]).mean())
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-4, rtol=1e-4)
    told = trainer._metrics["train"]
    assert told["kl"] == [pytest.approx(float(torch.cat(gaps).mean()), rel=1e-3)], "the mean over trained tokens"
    assert told["sampling_logprob_difference"] == [pytest.approx(float(torch.cat(apart).mean()), rel=1e-3)]


def made(talker: tuple[PeftModel, PreTrainedTokenizerBase], rewards: Sequence[float]) -> list[Trajectory]:
    """Groups of four rollouts of unequal lengths, one group a question."""
    protocol = Protocol(talker[1], tiny_protocol_config())
    rollouts = []
    for index, reward in enumerate(rewards):
        question = QUESTIONS[index // 4]
        ids = talker[1].encode("<answer>" + "Peru Oslo"[: 2 + index] + "</answer>")
        prompt = protocol.prompt_ids(question.question)
        rollouts.append(Trajectory(question, index % 4, prompt, ids, [1] * len(ids), [], [], "answer", reward=reward))
    return rollouts


def trained_on(
    policy: tuple[PeftModel, PreTrainedTokenizerBase], folder: Path, steps: Sequence[Sequence[float]], **stage: Any
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """The records of a stage whose steps' rollouts earned these rewards, and the adapter before and after each."""
    records: list[dict[str, Any]] = []
    weights = [adapter_weights(policy[0])]

    def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
        return made(policy, steps[len(records)])

    train_grpo(
        *policy,
        answer,
        QUESTIONS,
        StageTraining(
            configured(steps=len(steps), **stage),
            round_index=1,
            output_dir=folder,
            on_step=lambda record: (records.append(record), weights.append(adapter_weights(policy[0]))),
        ),
    )
    return records, weights


MIXED, EQUAL = [1.0, 0.0, 0.0, 1.0], [1.0] * 4


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_skipping_a_group_without_spread_takes_nothing_from_the_update_but_its_kl(
    talking_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl_coefficient: float
) -> None:
    """Two steps, skipped and not: the second step's KL is not zero any more."""
    real = RolloutGRPOTrainer._generate_and_score_completions

    def skip_none(trainer: RolloutGRPOTrainer, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = real(trainer, inputs)
        return batch | {"trained": torch.ones_like(batch["trained"])}

    steps = [MIXED + EQUAL, EQUAL + MIXED]
    # Plain gradient descent, so that an update is as large as its gradient.
    monkeypatch.setattr(grpo, "trainer_arguments", lambda *a, **k: trainer_arguments(*a, **k) | {"optim": "sgd"})
    how = {"kl_coefficient": kl_coefficient, "learning_rate": 0.3, "max_grad_norm": 1e9}
    records, weights = trained_on(fresh_policy(talking_policy_folder), tmp_path, steps, **how)
    monkeypatch.setattr(RolloutGRPOTrainer, "_generate_and_score_completions", skip_none)
    unskipped, expected = trained_on(fresh_policy(talking_policy_folder), tmp_path, steps, **how)
    assert [record["skipped_groups"] for record in records] == [1, 1]
    moved = [max(float((new[key] - old[key]).abs().max()) for key in old) for old, new in pairwise(weights)]
    assert min(moved) > 1e-4
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], expected[1][key], atol=1e-7, rtol=1e-5)
    apart = max(float((weights[2][key] - expected[2][key]).abs().max()) for key in weights[2])
    assert apart < 1e-6 if kl_coefficient == 0 else 1e-6 < apart < 0.1 * moved[1]
    assert [record["loss"] for record in records][0] == pytest.approx(unskipped[0]["loss"], abs=1e-7)


def test_a_step_whose_every_group_is_skipped_moves_nothing_and_is_not_an_end(talker, tmp_path: Path) -> None:
    """Nor does the momentum of the steps before move anything, and the step after trains again."""
    records, weights = trained_on(talker, tmp_path, [MIXED + EQUAL, EQUAL + EQUAL, MIXED + MIXED], kl_coefficient=0.1)
    assert [record["skipped_groups"] for record in records] == [1, 2, 0]
    assert not all_equal(weights[0], weights[1]) and not all_equal(weights[2], weights[3])
    assert all_equal(weights[1], weights[2])
    empty = records[1]
    assert (empty["loss"], empty["grad_norm"], empty["kl"]) == (0.0, 0.0, None)


def test_the_reference_is_asked_about_trained_rollouts_only_and_nothing_is_passed_twice(talker, tmp_path: Path) -> None:
    seen: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}

    def watch(module: torch.nn.Module, given: tuple[torch.Tensor], ids: torch.Tensor) -> None:
        seen[torch.is_grad_enabled()] += map(tuple, given[0].tolist())

    handle = talker[0].get_input_embeddings().register_forward_hook(watch)
    config = configured(steps=1, kl_coefficient=0.1, micro_batch_tokens=10_000)
    config.model.gradient_checkpointing = False
    records: list[dict[str, Any]] = []
    rollouts = made(talker, MIXED + EQUAL)
    train_grpo(
        *talker,
        lambda asked, n, seed_parts: rollouts,
        QUESTIONS,
        StageTraining(config, round_index=1, output_dir=tmp_path, on_step=records.append),
    )
    handle.remove()
    width = max(len(t.prompt_ids) + len(t.completion_ids) for t in rollouts[:4])
    padding = talker[1].pad_token_id
    rows = [[*t.prompt_ids, *t.completion_ids] for t in rollouts[:4]]
    expected = sorted(tuple(row + [padding] * (width - len(row))) for row in rows)
    assert sorted(seen[True]) == sorted(seen[False]) == expected
    assert records[0]["sampling_logprob_difference"] is None, "these rollouts kept no log-probs"


def test_rollouts_of_another_policy_show_in_the_sampling_difference(talker, tmp_path: Path) -> None:
    rollouts = made(talker, MIXED + MIXED)
    own = [model_written_logprob(talker[0], t) for t in rollouts]
    for t in rollouts:
        t.logprobs = [-1.0] * len(t.completion_ids)
    records: list[dict[str, Any]] = []
    train_grpo(
        *talker,
        lambda asked, n, seed_parts: rollouts,
        QUESTIONS,
        StageTraining(configured(steps=1), round_index=1, output_dir=tmp_path, on_step=records.append),
    )
    assert records[0]["sampling_logprob_difference"] > abs(sum(own) / len(own) + 1) / 2 > 0.01


def test_no_log_probs_of_an_older_policy_are_computed(talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one update a batch the ratio is 1 as it is."""
    batches: list[dict[str, Any]] = []
    real = RolloutGRPOTrainer._prepare_inputs

    def watched(trainer: RolloutGRPOTrainer, inputs: Any) -> dict[str, Any]:
        batches.append(real(trainer, inputs))
        return batches[-1]

    monkeypatch.setattr(RolloutGRPOTrainer, "_prepare_inputs", watched)
    trained_on(talker, tmp_path, [MIXED + EQUAL] * 2, kl_coefficient=0.1)
    assert [len(batch["prompt_ids"]) for batch in batches] == [8, 8], "a whole step at a time"
    assert all(batch.get("old_per_token_logps") is None and "ref_per_token_logps" not in batch for batch in batches)


@pytest.mark.parametrize(("count", "batch", "steps"), [(7, 3, 5), (12, 4, 3), (5, 5, 4)])
def test_questions_come_in_the_order_in_which_trl_would_shuffle_them(count: int, batch: int, steps: int) -> None:
    sampler = RepeatSampler(range(count), mini_repeat_count=1, batch_size=batch, shuffle=True, seed=11)
    trl = [index for _ in range(steps) for index in sampler][: steps * batch]
    assert question_order(count, batch, steps, 11) == trl
