"""Pairs written out by hand, and what a dense computation says of them."""

from collections.abc import Sequence

import torch
from conftest import dense_divergence
from peft import PeftModel

from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn
from searche1_lite.rollout.protocol import Protocol, parse_turn
from searche1_lite.train.pairs import Pair

TEMPERATURE = 0.8


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
