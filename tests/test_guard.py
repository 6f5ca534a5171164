"""Steps with a number that is none: nothing moves, it is told, and there is an end to it. Also those of little use."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ShelfRetriever, adapter_weights, all_equal, fresh_policy, tiny_protocol_config
from distillation import make_pairs
from peft import PeftModel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, OFSDStageConfig, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.rollout import scheduler as rollout_module
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT
from searche1_lite.train.grpo import RolloutGRPOTrainer, train_grpo
from searche1_lite.train.ofsd import train_ofsd
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.stage_checkpoint import Resumed, StageKeeper
from searche1_lite.train.stage_trainer import StageTraining
from searche1_lite.train.update_guard import UpdateGuard

Policy = tuple[PeftModel, PreTrainedTokenizerBase]
State = dict[str, torch.Tensor]

QUESTIONS = [Question(name, f"What about {name}?", ["Peru"]) for name in ("rivers", "a sea", "hills", "towns")]
MIXED, RIGHT, WRONG = [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0] * 4


def configured(**settings: Any) -> Config:
    shared = {"micro_batch_tokens": 100_000, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    grpo = {**shared, "steps": 3, "questions_per_step": 2, "group_size": 4, "kl_coefficient": 0.1}
    return Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(batch_size=8),
        grpo=GRPOStageConfig(**{**grpo, **settings}),
        ofsd=OFSDStageConfig(**shared, batch_size=2, epochs=2),
    )


@pytest.fixture
def policy(talking_policy_folder: Path) -> Policy:
    return fresh_policy(talking_policy_folder)


class Stage:
    """One stage of either kind: its `records`, its `result`, and the adapter and optimizer before and after each step.

    Args:
        rewards: of each GRPO step's rollouts.
        change: what is done to the rollouts of a step, counted from 1.
    """

    def __init__(
        self,
        kind: str,
        policy: Policy,
        folder: Path,
        rewards: Sequence[Sequence[float]] = (MIXED + MIXED,) * 3,
        change: Callable[[int, list[Trajectory]], object] = lambda step, rollouts: None,
        **settings: Any,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self.weights = [adapter_weights(policy[0])]
        self.optimizer: list[tuple[State, State]] = []
        config = configured(steps=len(rewards), **settings)
        how: dict[str, Any] = {
            "round_index": 1, "output_dir": folder,
            "on_step": lambda record: (self.records.append(record), self.weights.append(adapter_weights(policy[0]))),
        }  # fmt: skip

        def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
            rollouts = written(policy, rewards[len(self.records)])
            change(len(self.records) + 1, rollouts)
            return rollouts

        with self._watched_optimizer():
            if kind == "grpo":
                self.result = train_grpo(*policy, answer, QUESTIONS, StageTraining(config, **how))
            else:
                protocol = Protocol(policy[1], config.protocol)
                self.result = train_ofsd(*policy, protocol, make_pairs(protocol)[:3], StageTraining(config, **how))

    @contextmanager
    def _watched_optimizer(self) -> Iterator[None]:
        before: list[State] = []
        hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: before.append(optimizer_state(optimizer))),
            register_optimizer_step_post_hook(
                lambda optimizer, *_: self.optimizer.append((before.pop(), optimizer_state(optimizer)))
            ),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """A copy of all moments and step counts."""
    state = optimizer.state_dict()["state"]
    return {f"{index} {name}": value.clone() for index, of in state.items() for name, value in of.items()}


def written(policy: Policy, rewards: Sequence[float]) -> list[Trajectory]:
    """Groups of four rollouts of unequal lengths, whose log-probs are kept."""
    protocol, rollouts = Protocol(policy[1], tiny_protocol_config()), []
    for index, reward in enumerate(rewards):
        question = QUESTIONS[index // 4]
        ids = policy[1].encode("<answer>" + "Peru Oslo"[: 2 + index] + "</answer>")
        rollouts.append(
            Trajectory(
                question, index % 4, protocol.prompt_ids(question.question), ids, [1] * len(ids), [], [], "answer",
                reward=reward, logprobs=[-1.0] * len(ids),
            )
        )  # fmt: skip
    return rollouts


@contextmanager
def spoilt(policy: Policy, kind: str, steps: set[int]) -> Iterator[None]:
    """Makes what the hidden states or a weight's gradient are at these training passes, from 1, not finite."""
    passes = 0

    def spoil_hidden(module: torch.nn.Module, given: Any, output: Any) -> Any:
        nonlocal passes
        if output.last_hidden_state.requires_grad:
            passes += 1
            if passes in steps:
                output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes in steps:
            gradient = gradient.clone()
            gradient.view(-1)[3] = math.inf
        return gradient

    weight = next(p for name, p in policy[0].named_parameters() if "lora_B.default" in name)
    backbone = policy[0].get_base_model().base_model
    handle = backbone.register_forward_hook(spoil_hidden) if kind == "hidden" else weight.register_hook(spoil_gradient)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("stage", ["grpo", "ofsd"])
@pytest.mark.parametrize(("fault", "reasons"), [("hidden", {"grpo": "log-probs", "ofsd": "loss"}), ("gradient", None)])
def test_one_bad_update_is_skipped_with_weights_and_moments_bit_equal_and_the_next_is_made(
    policy, tmp_path: Path, capsys, stage: str, fault: str, reasons: dict[str, str] | None
) -> None:
    reason = reasons[stage] if reasons else "gradient"
    with spoilt(policy, fault, {2}):
        ran = Stage(stage, policy, tmp_path)
    assert [record["skipped"] for record in ran.records] == [None, reason, None]
    assert ran.result["skipped"] == 1 and ran.result["steps"] == 3
    assert [all_equal(*pair) for pair in pairwise(ran.weights)] == [False, True, False]
    assert [all_equal(*pair) for pair in ran.optimizer] == [False, True, False]
    assert len(ran.optimizer[1][0]) > 10, "moments and step counts of every matrix"
    bad = ran.records[1]
    assert bad["grad_norm"] is None and (bad["loss"] is None) == (reason != "gradient")
    for record in (ran.records[0], ran.records[2]):
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
    assert all(math.isfinite(value) for record in ran.records for value in record.values() if isinstance(value, float))
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert told == [line for line in told if line.startswith(f"round1.{stage}, step 2: ")] and len(told) == 1


def test_a_loss_that_is_no_number_skips_the_update_though_its_gradient_is_one(
    policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = RolloutGRPOTrainer._compute_loss, 0

    def infinite(trainer: RolloutGRPOTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(trainer, model, inputs) + (math.inf if calls == 1 else 0.0)

    monkeypatch.setattr(RolloutGRPOTrainer, "_compute_loss", infinite)
    ran = Stage("grpo", policy, tmp_path, [MIXED + MIXED] * 2)
    assert [record["skipped"] for record in ran.records] == ["loss", None]
    assert ran.records[0]["loss"] is None and ran.records[0]["grad_norm"] > 0 and math.isfinite(ran.records[1]["loss"])
    assert [all_equal(*pair) for pair in pairwise(ran.weights)] == [True, False]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_rollout_with_a_logprob_that_is_no_number_is_not_trained_on(policy, tmp_path: Path, value: float) -> None:
    kept: list[Trajectory] = []

    def spoil(step: int, rollouts: list[Trajectory]) -> None:
        if step == 2:
            rollouts[3].logprobs[1] = value
            kept.extend(rollouts)

    ran = Stage("grpo", policy, tmp_path, change=spoil)
    assert [record["skipped"] for record in ran.records] == [None, "rollout log-probs", None]
    assert ran.records[1]["loss"] is ran.records[1]["grad_norm"] is ran.records[1]["kl"] is None
    assert [all_equal(*pair) for pair in pairwise(ran.weights)] == [False, True, False]
    assert [all_equal(*pair) for pair in ran.optimizer] == [False, True, False]
    assert [t.logprobs is None for t in kept] == [False, False, False, True] + [False] * 4, "it is not kept as a number"


@pytest.mark.parametrize("stage", ["grpo", "ofsd"])
def test_three_skipped_updates_in_a_row_end_the_run_with_the_last_sound_policy(
    policy, tmp_path: Path, stage: str
) -> None:
    config, weights = configured(), []
    folder = RunFolder(tmp_path / "run", config, resume=False).start()
    seen: list[dict[str, Any]] = []

    def on_step(record: dict[str, Any]) -> None:
        folder.log(record)
        seen.append(record)
        weights.append(adapter_weights(policy[0]))

    how: dict[str, Any] = {"round_index": 1, "output_dir": tmp_path, "on_step": on_step}
    with spoilt(policy, "gradient", set(range(2, 100))), pytest.raises(UserError) as caught:
        if stage == "grpo":
            long = configured(steps=9)
            train_grpo(*policy, lambda *_: written(policy, MIXED + MIXED), QUESTIONS, StageTraining(long, **how))
        else:
            protocol = Protocol(policy[1], config.protocol)
            long = configured()
            long.ofsd.epochs = 9
            train_ofsd(*policy, protocol, make_pairs(protocol)[:3], StageTraining(long, **how))
    message = str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in message
    assert f"round1.{stage} ends at step 4" in message and "--resume" in message and f"{stage}.learning_rate" in message
    assert [record["skipped"] for record in seen] == [None, "gradient", "gradient", "gradient"]
    assert all(all_equal(later, weights[0]) for later in weights[1:])
    assert all_equal(adapter_weights(policy[0]), weights[0]) and list(policy[0].peft_config) == ["default"]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("planned", [4, 9], ids=["as many as planned", "as many as the budget leaves"])
def test_a_stage_that_was_ended_at_its_last_step_is_resumed_with_all_its_steps_counted(
    policy, tmp_path: Path, planned: int
) -> None:
    config = configured(steps=planned)
    folder = RunFolder(tmp_path / "run", config, resume=False).start()

    def train(resumed: Resumed | None) -> dict[str, Any]:
        keeper = StageKeeper(folder, "round1.grpo", policy[0], every=0, state={"stages": []}, resumed=resumed)
        return train_grpo(
            *policy,
            lambda *_: written(policy, MIXED + MIXED),
            QUESTIONS,
            StageTraining(config, round_index=1, output_dir=tmp_path, on_step=folder.log, limit=4, keeper=keeper),
        )

    with spoilt(policy, "gradient", {2, 3, 4}), pytest.raises(UserError, match="ends at step 4"):
        train(None)
    latest = folder.latest()
    assert latest is not None and latest[1]["within"]["step"] == 4
    assert train((latest[0], latest[1]["within"]))["steps"] in (4, 5), "one more at most: a Trainer stops after a step"


def test_skips_that_are_not_in_a_row_end_nothing(policy, tmp_path: Path) -> None:
    with spoilt(policy, "gradient", {1, 2, 4, 5}):
        ran = Stage("grpo", policy, tmp_path, [MIXED + MIXED] * 6)
    assert [record["skipped"] is None for record in ran.records] == [False, False, True] * 2
    assert ran.result["skipped"] == 4


def test_a_guard_goes_on_counting_where_another_stopped() -> None:
    one, other = UpdateGuard("round1.grpo", "grpo.learning_rate"), UpdateGuard("round1.grpo", "grpo.learning_rate")
    model = torch.nn.Linear(2, 2)
    step = type("State", (), {"global_step": 0})()

    def update(guard: UpdateGuard, value: float) -> None:
        model.weight.grad = torch.full((2, 2), value)
        guard.on_pre_optimizer_step(None, step, None, model=model)

    for _ in range(2):
        update(one, math.nan)
        one.on_log(None, step, None, {"loss": 0.0})
    other.restore(one.state())
    update(other, math.nan)
    with pytest.raises(UserError, match="3 updates in a row"):
        other.on_log(None, step, None, {"loss": 0.0})
    update(one, 1.0)
    assert one.reason is None and one.state() == {"skipped": 2, "in_a_row": 0}
    assert torch.all(model.weight.grad == 1.0), "a sound gradient is left as it is"


# Steps of little use: each ends in finite figures and a policy that moves only where there is something to learn.


@pytest.mark.parametrize("rewards", [RIGHT + RIGHT, WRONG + WRONG, RIGHT + WRONG])
def test_rewards_without_spread_in_any_group_move_nothing_and_are_logged(policy, tmp_path: Path, rewards) -> None:
    ran = Stage("grpo", policy, tmp_path, [rewards] * 2)
    wrong = sum(not any(rewards[first : first + 4]) for first in (0, 4)) / 2
    for record in ran.records:
        assert (record["zero_std_fraction"], record["skipped_groups"], record["all_wrong_fraction"]) == (1.0, 2, wrong)
        assert (record["loss"], record["grad_norm"], record["skipped"]) == (0.0, 0.0, None), "no fault, nothing to do"
    assert all(all_equal(*pair) for pair in pairwise(ran.weights))


def test_a_group_that_is_all_wrong_leaves_the_update_to_the_others(policy, tmp_path: Path) -> None:
    (record,) = (ran := Stage("grpo", policy, tmp_path, [MIXED + WRONG])).records
    assert (record["skipped_groups"], record["all_wrong_fraction"], record["reward"]) == (1, 0.5, 0.25)
    assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and not all_equal(*ran.weights)


def mask_all(step: int, rollouts: list[Trajectory]) -> None:
    for rollout in rollouts if step == 2 else ():
        rollout.loss_mask = [0] * len(rollout.completion_ids)


def test_a_step_whose_every_token_is_masked_moves_nothing_not_even_by_momentum(policy, tmp_path: Path) -> None:
    ran = Stage("grpo", policy, tmp_path, change=mask_all)
    assert [all_equal(*pair) for pair in pairwise(ran.weights)] == [False, True, False]
    assert all_equal(*ran.optimizer[1])
    masked = ran.records[1]
    assert (masked["loss"], masked["grad_norm"], masked["tokens"], masked["skipped"]) == (0.0, 0.0, 0, None)
    assert all(math.isfinite(value) for record in ran.records for value in record.values() if isinstance(value, float))


def test_a_rollout_whose_every_token_is_masked_leaves_the_update_to_its_siblings(policy, tmp_path: Path) -> None:
    def mask_one(step: int, rollouts: list[Trajectory]) -> None:
        rollouts[0].loss_mask = [0] * len(rollouts[0].completion_ids)

    ran = Stage("grpo", policy, tmp_path, [MIXED + MIXED], change=mask_one)
    assert math.isfinite(ran.records[0]["loss"]) and not all_equal(*ran.weights)
    assert all(math.isfinite(value) for value in ran.records[0].values() if isinstance(value, float))


def test_a_batch_cut_off_without_an_answer_is_unanswered_and_moves_nothing(policy, tmp_path: Path) -> None:
    def cut_off(step: int, rollouts: list[Trajectory]) -> None:
        for rollout in rollouts:
            rollout.stopped, rollout.answer = "token_budget", None

    ran = Stage("grpo", policy, tmp_path, [WRONG + WRONG] * 2, change=cut_off)
    assert [record["unanswered_rate"] for record in ran.records] == [1.0, 1.0]
    assert all(all_equal(*pair) for pair in pairwise(ran.weights))


def test_answers_of_one_token_are_trained_on(policy, tmp_path: Path) -> None:
    def shorten(step: int, rollouts: list[Trajectory]) -> None:
        for rollout in rollouts:
            rollout.completion_ids, rollout.loss_mask, rollout.logprobs = rollout.completion_ids[1:2], [1], [-1.0]

    ran = Stage("grpo", policy, tmp_path, [MIXED + MIXED] * 2, change=shorten)
    for record in ran.records:
        assert record["tokens"] == 8 and record["repetition"] == 0.0
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
    assert not all_equal(ran.weights[0], ran.weights[1])


def test_a_run_without_a_right_answer_has_no_pairs_and_comes_to_its_end(tmp_path: Path, capsys) -> None:
    """Nor has it an update; the stages are there, with finite figures that say why."""
    questions = tmp_path / "hopeless.jsonl"
    rows = [{"id": q.id, "question": q.question, "golden_answers": ["nobody"]} for q in load_questions("demo", "dev")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    settings = [
        f"data.train={questions}", "data.evaluation_limit=4", "rounds=1", "grpo.steps=1", "grpo.questions_per_step=2",
        "ofsd.questions=4",
    ]  # fmt: skip
    config = load_config("demo", None, settings)
    summary = run_training(config, RunFolder(tmp_path / "run", config, resume=False), SILENT)
    grpo, ofsd = summary["stages"][1:]
    assert (grpo["steps"], grpo["skipped"], ofsd["steps"]) == (1, 0, 0)
    assert (ofsd["pairs"]["pairs"], ofsd["pairs"]["none_correct"], ofsd["kl"], ofsd["privilege"]) == (0, 4, {}, {})
    assert summary["stages"][0]["em"] == grpo["em"] == ofsd["em"], "the policy is as it was"
    assert "round1.ofsd: there are no pairs" in capsys.readouterr().err
    for name in ("metrics.jsonl", "summary.json"):
        assert not {"NaN", "Infinity"} & set((tmp_path / "run" / name).read_text().replace(",", " ").split())


def test_a_run_whose_every_episode_is_really_cut_off_is_told_of_and_comes_to_its_end(tmp_path: Path, capsys) -> None:
    """The budget is one token: nobody gets as far as a search or an answer."""
    settings = [
        "protocol.max_turn_tokens=1", "protocol.max_completion_tokens=1", "data.evaluation_limit=4", "rounds=1",
        "grpo.steps=2", "grpo.questions_per_step=2", "ofsd.questions=4", "collapse.window=2",
    ]  # fmt: skip
    config, folder = load_config("demo", None, settings), tmp_path / "run"
    summary = run_training(config, RunFolder(folder, config, resume=False), SILENT)
    base, grpo, ofsd = summary["stages"]
    assert (base["em"], grpo["em"], ofsd["em"]) == (0.0, 0.0, 0.0)
    assert (grpo["steps"], grpo["skipped"], ofsd["steps"]) == (2, 0, 0), "no fault, and nothing to do"
    assert (ofsd["pairs"]["pairs"], ofsd["pairs"]["none_correct"]) == (0, 4)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in (steps := [record for record in records if record.get("stage") == "grpo"]):
        assert (record["loss"], record["grad_norm"], record["unanswered_rate"], record["skipped_groups"]) == (
            0,
            0,
            1,
            2,
        )
        assert record["tokens"] == 2 * config.grpo.group_size
    assert len(steps) == 2
    rollouts = (folder / "trajectories" / "round1.ofsd.rollouts.jsonl").read_text().splitlines()
    assert {json.loads(line)["stopped"] for line in rollouts} == {"token_budget"}
    told = capsys.readouterr().err
    assert "round1.ofsd: there are no pairs" in told and "this may be a collapse: groups with no right answer" in told
    for name in ("metrics.jsonl", "summary.json"):
        assert not {"NaN", "Infinity"} & set((folder / name).read_text().replace(",", " ").split())


def test_episodes_that_were_all_really_cut_off_are_trained_on_where_they_earned_something(
    policy, tmp_path: Path
) -> None:
    """As with a reward of one's own, which may pay for other things than an answer."""
    shelf = ShelfRetriever([Passage("1", "Lima", "Lima is the capital of Peru")])
    config, records, before = configured(steps=2), [], adapter_weights(policy[0])
    protocol = Protocol(policy[1], tiny_protocol_config(max_turn_tokens=2, max_completion_tokens=2))

    def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
        found = rollout_module.rollout(
            rollout_module.Agent(*policy, shelf, protocol, engine=config.engine, k=1),
            asked,
            n,
            rollout_module.Sampling(seed_parts, logprobs=True),
        )
        assert {each.stopped for each in found} == {"token_budget"}
        for each in found:
            each.reward = float(each.sample % 2)
        return found

    result = train_grpo(
        *policy, answer, QUESTIONS, StageTraining(config, round_index=1, output_dir=tmp_path, on_step=records.append)
    )
    assert (result["steps"], result["skipped"]) == (2, 0) and not all_equal(adapter_weights(policy[0]), before)
    for record in records:
        assert record["unanswered_rate"] == 1.0 and record["grad_norm"] > 0
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
