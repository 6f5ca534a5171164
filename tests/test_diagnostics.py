from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import dense_divergence, tiny_protocol_config
from distillation import TEMPERATURE, completion_logits, dense_loss, make_pairs
from peft import PeftModel

from searche1_lite.config import Config, EngineConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.train.diagnostics import token_kl, token_pieces, watch
from searche1_lite.train.pairs import Pair, teacher_prompts


@pytest.fixture
def protocol(tiny_policy) -> Protocol:
    return Protocol(tiny_policy[1], tiny_protocol_config())


@pytest.fixture
def pairs(protocol: Protocol) -> list[Pair]:
    return make_pairs(protocol)


def watched(
    model: PeftModel, protocol: Protocol, pairs: Sequence[Pair], **stage: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Of the pairs, whose groups are they themselves."""
    config = Config(
        protocol=tiny_protocol_config(),
        engine=EngineConfig(temperature=TEMPERATURE),
        ofsd=OFSDStageConfig(micro_batch_tokens=500, **stage),
    )
    rollouts: list[Trajectory] = [t for pair in pairs for t in (pair.student, pair.reference)]
    return watch(model, protocol, rollouts, pairs, config)


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
        torch.testing.assert_close(torch.tensor(values.kl).double(), expected, atol=1e-5, rtol=1e-4)
        assert values.teacher == torch.where(keep, other.argmax(dim=-1), -1).tolist()


def test_diagnostics_are_the_dense_means_and_nothing_for_the_plain_prompt(tiny_policy, protocol, pairs) -> None:
    model, _ = tiny_policy
    found = watched(model, protocol, pairs)[0]
    assert found.keys() == {"pairs", "plain", "foreign"}
    assert abs(found["plain"]) < 1e-6
    for key, kind in (("pairs", "privileged"), ("foreign", "foreign")):
        expected = dense_loss(model, model, pairs, teacher_prompts(protocol, pairs, kind, True))
        assert found[key] == pytest.approx(expected, rel=1e-4) and found[key] > 1e-3
    assert found["pairs"] != pytest.approx(found["foreign"], rel=1e-3)
    undocumented = watched(model, protocol, pairs, reference_documents=False)[0]
    assert undocumented["pairs"] != pytest.approx(found["pairs"], rel=1e-3)


def test_a_single_pair_has_no_foreign_reference(tiny_policy, protocol, pairs) -> None:
    found = watched(tiny_policy[0], protocol, pairs[:1])[0]
    assert found.keys() == {"pairs", "plain"} and found["pairs"] > 1e-3


def test_the_kl_of_every_rollout_stands_token_by_token_beside_its_turns(tiny_policy, protocol, pairs) -> None:
    means, records = watched(tiny_policy[0], protocol, pairs)
    assert [(r["question_id"], r["sample"], r["role"]) for r in records] == [
        (f"q{index}", sample, role) for index in range(4) for sample, role in ((0, "student"), (1, "reference"))
    ]
    total = 0.0
    rollouts = [t for pair in pairs for t in (pair.student, pair.reference)]
    for record, trajectory in zip(records, rollouts, strict=True):
        assert (record["reference_sample"], record["student_sample"]) == (1, 0)
        for shown, turn in zip(record["turns"], trajectory.turns, strict=True):
            assert "".join(shown["pieces"]) == turn.text
            assert len(shown["kl"]) == len(shown["pieces"]) == len(shown["teacher"]) == turn.end - turn.start
            total += sum(shown["kl"]) * (record["role"] == "student")
    tokens = sum(pair.student.n_model_tokens for pair in pairs)
    assert total / tokens == pytest.approx(means["pairs"], abs=1e-4), "what is shown adds up to what is reported"
    assert all(shown["pieces"] != shown["teacher"] for shown in records[0]["turns"]), "they are not the student's own"


def test_a_character_of_several_tokens_is_shown_once(tiny_policy) -> None:
    tokenizer = tiny_policy[1]
    text = "<search>Gdańsk 東京 é</search>"
    pieces = token_pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "東" in pieces and "" in pieces and pieces[0] == "<search>"


def test_without_pairs_there_is_nothing_to_watch(tiny_policy, protocol) -> None:
    assert watched(tiny_policy[0], protocol, []) == ({}, [])
