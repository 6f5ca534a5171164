"""Offline self-distillation: which rollouts make a pair, what the loss is, and what it may move."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    adapter_weights,
    all_equal,
    fixed_weights,
    fresh_policy,
    gradient_flags,
    recorded_gradients,
    tiny_protocol_config,
)
from distillation import TEMPERATURE, completion_logits, dense_loss, make_pairs
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Passage, Turn
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.train.ofsd import train_ofsd, trained_tokens
from searche1_lite.train.pairs import Pair, teacher_prompts
from searche1_lite.train.stage_trainer import StageTraining

Policy = tuple[PeftModel, PreTrainedTokenizerBase]


@pytest.fixture
def policy(tiny_policy_folder: Path) -> Policy:
    return fresh_policy(tiny_policy_folder)


@pytest.fixture
def protocol(tiny_policy: Policy) -> Protocol:
    return Protocol(tiny_policy[1], tiny_protocol_config())


@pytest.fixture
def pairs(protocol: Protocol) -> list[Pair]:
    return make_pairs(protocol)


def configured(**stage: Any) -> Config:
    settings = {"batch_size": 4, "micro_batch_tokens": 500, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    return Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(temperature=TEMPERATURE),
        ofsd=OFSDStageConfig(**{**settings, **stage}),
    )


def distil(
    policy: Policy,
    pairs: Sequence[Pair],
    folder: Path,
    on_step: Callable[[dict[str, Any]], object] = lambda record: None,
    *,
    deadline: float | None = None,
    limit: int | None = None,
    **stage: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One OFSD stage: what it returned, and each step's record. `on_step` is called while the stage runs."""
    records: list[dict[str, Any]] = []
    model, tokenizer = policy
    config = configured(**stage)
    result = train_ofsd(
        model,
        tokenizer,
        Protocol(tokenizer, config.protocol),
        pairs,
        StageTraining(
            config,
            round_index=1,
            output_dir=folder,
            on_step=lambda record: (records.append(record), on_step(record)),
            deadline=deadline,
            limit=limit,
        ),
    )
    return result, records


def test_the_teacher_is_shown_its_own_another_or_no_reference(protocol, pairs) -> None:
    own, foreign, plain = (teacher_prompts(protocol, pairs, kind, True) for kind in ("privileged", "foreign", "plain"))
    for index, pair in enumerate(pairs):
        question = pair.student.question.question
        assert plain[index] == pair.student.prompt_ids
        assert own[index] == protocol.privileged_prompt_ids(question, pair.reference)
        assert foreign[index] == protocol.privileged_prompt_ids(question, pairs[(index + 1) % 4].reference)
    bare = teacher_prompts(protocol, pairs, "privileged", False)
    assert "a town" in protocol.tokenizer.decode(own[0]) and "a town" not in protocol.tokenizer.decode(bare[0])


@pytest.mark.parametrize(
    ("stage", "checkpointing"),
    [
        ({}, True),
        ({}, False),
        ({"divergence": "jsd"}, False),
        ({"objective": "sft"}, False),
        ({"teacher": "base"}, True),
    ],
)
def test_the_loss_gradient_is_zero_at_every_environment_token_and_only_there(
    policy, pairs, tmp_path: Path, stage: dict[str, str], checkpointing: bool
) -> None:
    model, tokenizer = policy
    config = configured(**stage)
    config.model.gradient_checkpointing = checkpointing
    with recorded_gradients(model) as gradient_of:
        train_ofsd(
            model,
            tokenizer,
            Protocol(tokenizer, config.protocol),
            pairs,
            StageTraining(config, round_index=1, output_dir=tmp_path, on_step=lambda record: None),
        )
    for pair in pairs:
        trajectory = pair.reference if "objective" in stage else pair.student
        size = gradient_of(trajectory).abs().amax(dim=1)
        by_model = torch.tensor(trajectory.loss_mask).bool()
        assert torch.all(size[~by_model] == 0.0) and torch.all(size[by_model] > 0.0)
        with pytest.raises(LookupError):
            gradient_of(pair.student if "objective" in stage else pair.reference)


def test_search_tokens_only_leaves_every_other_token_without_gradient(policy, pairs, tmp_path: Path) -> None:
    with recorded_gradients(policy[0]) as gradient_of:
        _, records = distil(policy, pairs, tmp_path, tokens="search", micro_batch_tokens=1)
    assert len(records) == 1 and records[0]["loss"] > 0
    for pair in pairs:
        expected = torch.zeros(len(pair.student.completion_ids), dtype=torch.bool)
        for turn in pair.student.turns:
            if turn.kind == "search":
                expected[turn.start : turn.end] = True
        assert trained_tokens(pair.student, "search") == expected.long().tolist()
        assert trained_tokens(pair.student, "all") == pair.student.loss_mask
        if expected.any():
            assert torch.equal(gradient_of(pair.student).abs().amax(dim=1) > 0, expected)
        else:
            with pytest.raises(LookupError):  # what has no token in the loss is not passed at all
                gradient_of(pair.student)


def test_without_any_token_in_the_loss_nothing_moves(policy, pairs, tmp_path: Path) -> None:
    before = adapter_weights(policy[0])
    _, records = distil(policy, pairs[1:2] * 4, tmp_path, tokens="search")
    assert [record["loss"] for record in records] == [0.0]
    assert all_equal(adapter_weights(policy[0]), before)


def add_up(parameter: torch.nn.Parameter, total: torch.Tensor) -> None:
    """Adds to `total` every gradient that reaches `parameter`, before the trainer clips or clears it."""

    def add(gradient: torch.Tensor) -> None:
        total.add_(gradient)

    parameter.register_hook(add)


@pytest.mark.parametrize("stage", [{}, {"objective": "sft"}, {"tokens": "search"}])
def test_a_steps_gradient_does_not_depend_on_the_micro_batches(
    tiny_policy_folder: Path, pairs, tmp_path: Path, stage: dict[str, str]
) -> None:
    found = []
    for micro_batch_tokens in (1, 500, 2000):
        policy = fresh_policy(tiny_policy_folder)
        sums = {name: torch.zeros_like(p) for name, p in policy[0].named_parameters() if p.requires_grad}
        for name, total in sums.items():
            add_up(policy[0].get_parameter(name), total)
        _, records = distil(policy, pairs, tmp_path, micro_batch_tokens=micro_batch_tokens, **stage)
        gradient = torch.cat([total.flatten() for total in sums.values()])
        assert records[0]["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
        found.append((gradient, records[0]["loss"]))
    assert found[0][0].abs().max() > 1e-2
    for gradient, loss in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], atol=1e-5, rtol=1e-4)
        assert loss == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_first_steps_loss_is_the_dense_divergence_averaged_over_model_tokens(
    policy, tiny_policy: Policy, protocol, pairs, tmp_path: Path, divergence: str
) -> None:
    measured = dense_loss(policy[0], policy[0], pairs, teacher_prompts(protocol, pairs, "privileged", True))
    _, records = distil(policy, pairs, tmp_path, divergence=divergence)
    prompts = teacher_prompts(protocol, pairs, "privileged", True)
    expected = dense_loss(tiny_policy[0], tiny_policy[0], pairs, prompts, divergence)
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-4)
    if divergence == "forward_kl":
        assert records[0]["loss"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("tokens", ["all", "search"])
def test_a_student_of_one_token_and_turns_of_one_token_are_learnt_from(
    policy, tiny_policy: Policy, protocol, pairs, tmp_path: Path, tokens: str
) -> None:
    """The shortest that there is: one token in all, and turns of one token with a document after each but the last."""
    end, search = (protocol.tokenizer.encode(tag) for tag in ("</answer>", "</search>"))
    document = protocol.information_ids([Passage("1", "T", "a town")])
    for pair, kinds in zip(pairs, (["answer"], ["search"], ["search", "answer"], ["search", "search"]), strict=True):
        student = pair.student
        student.completion_ids, student.loss_mask, student.turns = [], [], []
        for place, kind in enumerate(kinds):
            start, after = len(student.completion_ids), document if place + 1 < len(kinds) else []
            student.turns.append(Turn(kind, start, start + 1, ""))
            student.completion_ids += [*(search if kind == "search" else end), *after]
            student.loss_mask += [1, *[0] * len(after)]
    learnt_from = [pair for pair in pairs if any(trained_tokens(pair.student, tokens))]
    assert [sum(trained_tokens(pair.student, tokens)) for pair in pairs] == (
        [1, 1, 2, 2] if tokens == "all" else [0, 1, 1, 2]
    )
    before = adapter_weights(policy[0])
    _, records = distil(policy, pairs, tmp_path, tokens=tokens, epochs=2)
    for pair in learnt_from:
        pair.student.loss_mask = trained_tokens(pair.student, tokens)
    prompts = dict(zip(map(id, pairs), teacher_prompts(protocol, pairs, "privileged", True), strict=True))
    expected = dense_loss(tiny_policy[0], tiny_policy[0], learnt_from, [prompts[id(pair)] for pair in learnt_from])
    assert expected > 1e-4 and records[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert all(math.isfinite(value) for record in records for value in record.values() if isinstance(value, float))
    assert [record["skipped"] for record in records] == [None, None] and not all_equal(
        adapter_weights(policy[0]), before
    )


def test_students_that_were_really_cut_off_by_the_token_budget_are_learnt_from(
    policy, tiny_policy: Policy, protocol, pairs, shelf, tmp_path: Path
) -> None:
    settings = tiny_protocol_config(max_turn_tokens=7, max_completion_tokens=7)
    students = rollout(
        Agent(*policy, shelf, Protocol(policy[1], settings), engine=EngineConfig(), k=1),
        [pair.reference.question for pair in pairs],
        1,
        Sampling(("test",)),
    )
    assert {student.stopped for student in students} == {"token_budget"} and not any(s.answer for s in students)
    assert {len(student.completion_ids) for student in students} == {7}
    cut_off = [Pair(pair.reference, student) for pair, student in zip(pairs, students, strict=True)]
    before = adapter_weights(policy[0])
    result, records = distil(policy, cut_off, tmp_path)
    prompts = teacher_prompts(protocol, cut_off, "privileged", True)
    assert records[0]["loss"] == pytest.approx(dense_loss(tiny_policy[0], tiny_policy[0], cut_off, prompts), rel=1e-4)
    assert all(math.isfinite(value) for value in records[0].values() if isinstance(value, float))
    assert result == {"steps": 1, "skipped": 0} and not all_equal(adapter_weights(policy[0]), before)


def with_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> PeftModel:
    model, _ = fresh_policy(folder)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name.replace(".weight", ".default.weight")).copy_(weight)
    return model


@pytest.mark.parametrize("teacher", ["snapshot", "base", "live"])
def test_the_second_steps_teacher_is_the_one_that_was_asked_for(
    policy, tiny_policy_folder: Path, protocol, pairs, tmp_path: Path, teacher: str
) -> None:
    model, _ = policy
    seen = [adapter_weights(model)]
    _, records = distil(
        policy,
        pairs,
        tmp_path,
        lambda record: seen.append(adapter_weights(model)),
        teacher=teacher,
        epochs=2,
        learning_rate=3e-2,
    )
    assert len(records) == 2
    student = with_adapter(tiny_policy_folder, seen[1])
    nothing = {name: torch.zeros_like(weight) for name, weight in seen[0].items()}
    weights = {"snapshot": seen[0], "base": nothing, "live": seen[1]}
    prompts = teacher_prompts(protocol, pairs, "privileged", True)
    losses = {
        kind: dense_loss(student, with_adapter(tiny_policy_folder, adapter), pairs, prompts)
        for kind, adapter in weights.items()
    }
    assert records[1]["loss"] == pytest.approx(losses[teacher], rel=1e-3)
    others = [loss for kind, loss in losses.items() if kind != teacher]
    assert all(loss != pytest.approx(losses[teacher], rel=1e-2) for loss in others), "the three can be told apart"


def test_only_the_adapter_moves_while_teacher_and_base_stay_bit_equal(policy, pairs, tmp_path: Path) -> None:
    model, _ = policy
    before, fixed, flags = adapter_weights(model), fixed_weights(model), gradient_flags(model)
    teachers: list[dict[str, torch.Tensor]] = []
    result, _ = distil(
        policy, pairs, tmp_path, lambda record: teachers.append(adapter_weights(model, "teacher")), epochs=3
    )
    assert result["steps"] == len(teachers) == 3
    assert all(all_equal(teacher, before) for teacher in teachers)
    after = adapter_weights(model)
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert all(not torch.equal(before[key], after[key]) for key in before), "every LoRA matrix is trained"
    assert any(key.endswith("absmax") for key in fixed), "the 4-bit scales are compared too"
    assert all_equal(fixed_weights(model), fixed)
    assert gradient_flags(model) == flags and list(model.peft_config) == ["default"]
    assert model.active_adapter == "default" and not model.training


def test_with_the_plain_prompt_as_teacher_prompt_there_is_nothing_to_learn(policy, pairs, tmp_path: Path) -> None:
    before = adapter_weights(policy[0])
    _, records = distil(policy, pairs, tmp_path, teacher_prompt="plain")
    assert abs(records[0]["loss"]) < 1e-6 and records[0]["grad_norm"] < 1e-5
    control = max(float((weight - before[key]).abs().max()) for key, weight in adapter_weights(policy[0]).items())
    _, records = distil(policy, pairs, tmp_path, teacher_prompt="privileged")
    moved = max(float((weight - before[key]).abs().max()) for key, weight in adapter_weights(policy[0]).items())
    assert records[0]["loss"] > 1e-3 and moved > 5e-3 > 10 * control


def test_distillation_brings_the_student_closer_to_its_teacher(policy, tiny_policy, protocol, pairs, tmp_path) -> None:
    prompts = teacher_prompts(protocol, pairs, "privileged", True)
    before = dense_loss(tiny_policy[0], tiny_policy[0], pairs, prompts)
    _, records = distil(policy, pairs, tmp_path, epochs=8)
    after = dense_loss(policy[0], tiny_policy[0], pairs, prompts)
    assert after < 0.7 * before and records[-1]["loss"] < 0.8 * records[0]["loss"]


def reference_likelihood(model: PeftModel, pairs: Sequence[Pair], temperature: float) -> float:
    """Mean log-likelihood of the references' model-written tokens under the plain prompt."""
    values = []
    for pair in pairs:
        ids = torch.tensor(pair.reference.completion_ids)
        scores = completion_logits(model, pair.reference.prompt_ids, ids.tolist()) / temperature
        keep = torch.tensor(pair.reference.loss_mask).bool()
        values.append(-F.cross_entropy(scores[keep], ids[keep], reduction="none"))
    return float(torch.cat(values).mean())


def test_fine_tuning_on_references_makes_them_more_likely(policy, pairs, tmp_path: Path) -> None:
    model, _ = policy
    likelihoods = [reference_likelihood(model, pairs, TEMPERATURE)]
    _, records = distil(
        policy, pairs, tmp_path, lambda record: likelihoods.append(reference_likelihood(model, pairs, TEMPERATURE)),
        objective="sft", epochs=3,
    )  # fmt: skip
    assert likelihoods == sorted(likelihoods) and likelihoods[-1] > likelihoods[0] + 0.1
    assert records[0]["loss"] == pytest.approx(-likelihoods[0], rel=1e-4)


def test_without_pairs_there_are_no_steps_and_nothing_changes(policy, tmp_path: Path) -> None:
    before = adapter_weights(policy[0])
    result, records = distil(policy, [], tmp_path)
    assert result == {"steps": 0} and not records
    assert all_equal(adapter_weights(policy[0]), before) and list(policy[0].peft_config) == ["default"]


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"), [(4, 1, 4, 1), (4, 1, 2, 2), (3, 2, 2, 3), (1, 1, 4, 1)]
)
def test_an_epoch_takes_every_pair_and_a_last_batch_is_filled_up(
    policy, pairs, tmp_path: Path, count: int, epochs: int, batch: int, steps: int
) -> None:
    with recorded_gradients(policy[0]) as gradient_of:
        result, records = distil(policy, pairs[:count], tmp_path, epochs=epochs, batch_size=batch, micro_batch_tokens=1)
    assert result["steps"] == len(records) == steps
    assert all(gradient_of(pair.student).abs().max() > 0 for pair in pairs[:count])


def test_records_have_the_documented_keys_and_finite_figures(policy, pairs, tmp_path: Path) -> None:
    _, records = distil(policy, pairs, tmp_path, epochs=2)
    for step, record in enumerate(records, start=1):
        assert record.keys() == {
            "stage", "round", "step", "loss", "grad_norm", "learning_rate", "seconds", "skipped",
        }  # fmt: skip
        assert record["stage"] == "ofsd" and record["round"] == 1 and record["step"] == step
        assert record["skipped"] is None
        assert all(math.isfinite(value) for key, value in record.items() if key not in ("stage", "skipped"))


def test_two_stages_with_the_same_seed_end_bit_equal(tiny_policy_folder: Path, pairs, tmp_path: Path) -> None:
    ends = []
    for drawn_before in (1, 5):
        policy = fresh_policy(tiny_policy_folder)
        torch.rand(drawn_before)
        distil(policy, pairs, tmp_path, batch_size=2, epochs=2)
        ends.append(adapter_weights(policy[0]))
    assert all_equal(*ends)


def test_the_step_in_which_the_deadline_passes_is_the_last(policy, pairs, tmp_path: Path) -> None:
    result, records = distil(policy, pairs, tmp_path, epochs=50, deadline=time.monotonic())
    assert result["steps"] == len(records) == 1


def test_a_stage_that_is_cut_short_did_what_a_longer_one_did_until_then(pairs, tiny_policy_folder, tmp_path) -> None:
    """A budget changes when a run ends, not what it does: sweeps rely on it where runs share stages."""
    told = []
    for limit in (2, None):
        result, records = distil(
            fresh_policy(tiny_policy_folder), pairs, tmp_path, epochs=5, limit=limit, warmup_ratio=0.5
        )
        assert result["steps"] == len(records) == (limit or 5)
        told.append([(r["loss"], r["learning_rate"]) for r in records[:2]])
    assert told[0] == told[1]


@pytest.mark.parametrize("settings", [{"clip": 0.01}, {"top_k": 2}])
def test_a_truncated_divergence_trains_on_less_than_the_exact_one(policy, protocol, pairs, tmp_path, settings) -> None:
    exact = dense_loss(policy[0], policy[0], pairs, teacher_prompts(protocol, pairs, "privileged", True))
    _, records = distil(policy, pairs, tmp_path, **settings)
    assert records[0]["grad_norm"] > 0 and records[0]["loss"] < 0.99 * exact
