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
    dense_divergence,
    fixed_weights,
    fresh_policy,
    gradient_flags,
    recorded_gradients,
    tiny_protocol_config,
)
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from searche1_lite.config import Config, EngineConfig, OFSDStageConfig
from searche1_lite.ofsd import (
    Pair,
    kl_diagnostics,
    select_pairs,
    teacher_prompts,
    token_kl,
    train_ofsd,
    trained_tokens,
)
from searche1_lite.protocol import Protocol, parse_turn
from searche1_lite.search.base import Passage
from searche1_lite.trajectory import Question, Search, Trajectory, Turn

Policy = tuple[PeftModel, PreTrainedTokenizerBase]
TEMPERATURE = 0.8


def rolled(
    sample: int, reward: float, searches: int, tokens: int, queries: Sequence[str] = (), question: str = "q"
) -> Trajectory:
    """A rollout reduced to what pairs are chosen by; environment tokens (2 a search) must not count."""
    found = [Search(query, []) for query in (queries or [f"query {index}" for index in range(searches)])]
    return Trajectory(
        question=Question(question, "?", ["x"]),
        sample=sample,
        prompt_ids=[1],
        completion_ids=[1] * (tokens + 2 * searches),
        loss_mask=[0] * (2 * searches) + [1] * tokens,
        turns=[],
        searches=found,
        stopped="answer",
        reward=reward,
    )


# Of each rollout: reward, searches, model-written tokens, and the queries where they matter.
PAIRS = {
    "none right": ([(0, 1, 9), (0, 2, 9)], "any", None),
    "one rollout, right": ([(1, 1, 9)], "any", None),
    "one rollout, wrong": ([(0, 1, 9)], "any", None),
    "all right and equally efficient": ([(1, 1, 9), (1, 1, 9), (1, 1, 9)], "any", None),
    "the reference has the fewest searches, tokens or not": ([(1, 2, 5), (1, 1, 50), (1, 3, 9)], "any", (1, 2)),
    "ties go to the fewest tokens": ([(1, 1, 12), (1, 1, 9), (0, 1, 9)], "any", (1, 2)),
    "then to the lowest sample": ([(0, 3, 9), (1, 1, 9), (1, 1, 9)], "any", (1, 0)),
    "a right sibling with more tokens is less efficient": ([(1, 1, 9), (1, 1, 10)], "any", (0, 1)),
    "a wrong sibling comes before a less efficient right one": ([(1, 1, 9), (1, 4, 90), (0, 1, 9)], "any", (0, 2)),
    "a wrong one counts though it is shorter": ([(1, 2, 9), (0, 0, 3)], "any", (0, 1)),
    "the wrong one most apart in searches": ([(1, 1, 9), (0, 2, 90), (0, 4, 9), (0, 0, 9)], "any", (0, 2)),
    "then in queries": ([(1, 1, 9, ["a"]), (0, 1, 99, [" A "]), (0, 1, 9, ["b"])], "any", (0, 2)),
    "then in tokens": ([(1, 1, 9, ["a"]), (0, 1, 11, ["b"]), (0, 1, 15, ["c"]), (0, 1, 5, ["d"])], "any", (0, 2)),
    "then the lowest sample": ([(0, 2, 9), (1, 1, 9), (0, 2, 9)], "any", (1, 0)),
    "only wrong students": ([(1, 1, 9), (1, 4, 90)], "wrong", None),
    "only wrong students, one there": ([(1, 1, 9), (1, 4, 90), (0, 1, 9)], "wrong", (0, 2)),
    "only right students": ([(1, 1, 9), (1, 2, 9), (0, 4, 90)], "correct", (0, 1)),
    "only right students, none there": ([(1, 1, 9), (0, 4, 90)], "correct", None),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_reference_and_student_are_chosen_as_the_method_says(case: str) -> None:
    rows, students, expected = PAIRS[case]
    trajectories = [rolled(sample, *row) for sample, row in enumerate(rows)]
    for order in (trajectories, trajectories[::-1]):
        pairs, counts = select_pairs(order, students)
        assert [(pair.reference.sample, pair.student.sample) for pair in pairs] == ([expected] if expected else [])
        wrong = sum(not pair.student.correct for pair in pairs)
        assert counts == {
            "questions": 1,
            "pairs": len(pairs),
            "none_correct": int(not any(row[0] for row in rows)),
            "none_less_efficient": int(any(row[0] for row in rows) and expected is None),
            "wrong_students": wrong,
            "correct_students": len(pairs) - wrong,
        }


def test_pairs_are_one_a_question_in_the_order_in_which_questions_come() -> None:
    trajectories = [rolled(sample, sample % 2, 1 + sample, 9, question=name) for sample in range(4) for name in "cab"]
    pairs, counts = select_pairs([*trajectories, rolled(0, 0, 1, 9, question="d")])
    assert [pair.student.question.id for pair in pairs] == ["c", "a", "b"]
    assert all(pair.reference.question == pair.student.question for pair in pairs)
    assert counts["questions"] == 4 and counts["pairs"] == 3 and counts["none_correct"] == 1
    assert select_pairs([]) == ([], dict.fromkeys(counts, 0))


def written(protocol: Protocol, question: Question, turns: Sequence[str], sample: int = 0) -> Trajectory:
    """A rollout that wrote `turns`, each search followed by a document."""
    record = Trajectory(question, sample, protocol.prompt_ids(question.question), [], [], [], [], "answer")
    for text in turns:
        action = parse_turn(text)
        ids = protocol.tokenizer.encode(text)
        start = len(record.completion_ids)
        record.turns.append(Turn(action.kind, start, start + len(ids), text))
        record.completion_ids += ids
        record.loss_mask += [1] * len(ids)
        if action.kind == "search":
            record.searches.append(Search(action.content, [Passage("1", "T", f"{action.content}: a town")]))
            found = protocol.information_ids(record.searches[-1].passages)
            record.completion_ids += found
            record.loss_mask += [0] * len(found)
        else:
            record.answer = action.content
    record.reward = float(record.answer in question.golden_answers)
    return record


def make_pairs(protocol: Protocol) -> list[Pair]:
    """Four pairs of unequal lengths; the second student never searched."""
    students = [
        ["<search>where</search>", "<search>who</search>", "<answer>no</answer>"],
        ["<answer>b</answer>"],
        ["<think>hm</think><search>a</search>", "<answer>C, of course</answer>"],
        ["<search>x</search>", "<search>y</search>", "<search>the sea</search>", "<answer>n</answer>"],
    ]
    pairs = []
    for index, turns in enumerate(students):
        question = Question(f"q{index}", "Who lives there?"[index * 2 :], ["yes"])
        reference = written(protocol, question, [f"<search>town {index}</search>", "<answer>yes</answer>"], sample=1)
        pairs.append(Pair(reference, written(protocol, question, turns)))
    return pairs


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
        config,
        run_seed=0,
        round_index=1,
        output_dir=folder,
        on_step=lambda record: (records.append(record), on_step(record)),
        deadline=deadline,
    )
    return result, records


def completion_logits(model: PeftModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(T, V) in float64: what predicts each completion token, from a pass over this one row without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()


def dense_loss(
    student: PeftModel, teacher: PeftModel, pairs: Sequence[Pair], prompts: list[list[int]], kind: str = "forward_kl"
) -> float:
    """Mean divergence per model-written token of the pairs' students."""
    values = []
    for pair, prompt in zip(pairs, prompts, strict=True):
        ids = pair.student.completion_ids
        one = completion_logits(student, pair.student.prompt_ids, ids)
        other = completion_logits(teacher, prompt, ids)
        values.append(dense_divergence(kind, one, other, TEMPERATURE)[torch.tensor(pair.student.loss_mask).bool()])
    return float(torch.cat(values).mean())


def test_per_token_kl_is_dense_kl_at_model_tokens_and_zero_at_environment_tokens(tiny_policy, protocol, pairs) -> None:
    model, tokenizer = tiny_policy
    prompts = teacher_prompts(protocol, pairs, "privileged", True)
    found = token_kl(
        model, pairs, prompts, pad_id=tokenizer.pad_token_id, temperature=TEMPERATURE, micro_batch_tokens=500
    )
    for pair, prompt, values in zip(pairs, prompts, found, strict=True):
        ids, keep = pair.student.completion_ids, torch.tensor(pair.student.loss_mask).bool()
        own, other = (completion_logits(model, p, ids) for p in (pair.student.prompt_ids, prompt))
        expected = dense_divergence("forward_kl", own, other, TEMPERATURE) * keep
        torch.testing.assert_close(torch.tensor(values).double(), expected, atol=1e-5, rtol=1e-4)


def test_diagnostics_are_the_dense_means_and_nothing_for_the_plain_prompt(tiny_policy, protocol, pairs) -> None:
    model, _ = tiny_policy
    found = kl_diagnostics(model, protocol, pairs, configured())
    assert found.keys() == {"pairs", "plain", "foreign"}
    assert abs(found["plain"]) < 1e-6
    for key, kind in (("pairs", "privileged"), ("foreign", "foreign")):
        expected = dense_loss(model, model, pairs, teacher_prompts(protocol, pairs, kind, True))
        assert found[key] == pytest.approx(expected, rel=1e-4) and found[key] > 1e-3
    assert found["pairs"] != pytest.approx(found["foreign"], rel=1e-3)
    undocumented = kl_diagnostics(model, protocol, pairs, configured(reference_documents=False))
    assert undocumented["pairs"] != pytest.approx(found["pairs"], rel=1e-3)


def test_a_single_pair_has_no_foreign_reference(tiny_policy, protocol, pairs) -> None:
    found = kl_diagnostics(tiny_policy[0], protocol, pairs[:1], configured())
    assert found.keys() == {"pairs", "plain"} and found["pairs"] > 1e-3


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
            model, tokenizer, Protocol(tokenizer, config.protocol), pairs, config, run_seed=0, round_index=1,
            output_dir=tmp_path, on_step=lambda record: None,
        )  # fmt: skip
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
    measured = kl_diagnostics(policy[0], protocol, pairs, configured())["pairs"]
    _, records = distil(policy, pairs, tmp_path, divergence=divergence)
    prompts = teacher_prompts(protocol, pairs, "privileged", True)
    expected = dense_loss(tiny_policy[0], tiny_policy[0], pairs, prompts, divergence)
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-4)
    if divergence == "forward_kl":
        assert records[0]["loss"] == pytest.approx(measured, rel=1e-4)


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
        assert record.keys() == {"stage", "round", "step", "loss", "grad_norm", "learning_rate", "seconds"}
        assert record["stage"] == "ofsd" and record["round"] == 1 and record["step"] == step
        assert all(math.isfinite(value) for key, value in record.items() if key != "stage")


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


@pytest.mark.parametrize("settings", [{"clip": 0.01}, {"top_k": 2}])
def test_a_truncated_divergence_trains_on_less_than_the_exact_one(policy, protocol, pairs, tmp_path, settings) -> None:
    exact = kl_diagnostics(policy[0], protocol, pairs, configured())["pairs"]
    _, records = distil(policy, pairs, tmp_path, **settings)
    assert records[0]["grad_norm"] > 0 and records[0]["loss"] < 0.99 * exact
