"""Metrics of small sets of episodes that can be worked out by hand."""

import numpy as np
import pytest

from searche1_lite.evaluate import bootstrap_ci95, evaluate
from searche1_lite.trajectory import Question, Search, Trajectory, Turn


def episode(
    question: str, *, reward: float, searches: int = 0, tokens: int = 4, invalid: int = 0, hops: int | None = None
) -> Trajectory:
    metadata = {} if hops is None else {"hops": hops}
    return Trajectory(
        question=Question(question, "?", ["x"], metadata),
        sample=0,
        prompt_ids=[1],
        completion_ids=[1] * (tokens + 3),
        loss_mask=[1] * tokens + [0] * 3,
        turns=[Turn("invalid", 0, 1, "")] * invalid,
        searches=[Search("q", [])] * searches,
        stopped="answer",
        answer="x" if reward else None,
        reward=reward,
        f1=reward,
    )


def test_metrics_are_those_worked_out_by_hand() -> None:
    result = evaluate(
        [
            episode("a", reward=1.0, searches=2, tokens=10, hops=1),
            episode("b", reward=0.0, searches=0, tokens=20, hops=2, invalid=2),
            episode("c", reward=1.0, searches=1, tokens=30, hops=2),
            episode("d", reward=0.0, searches=3, tokens=40, hops=2),
        ],
        seed=0,
    )
    assert result["em"] == 0.5 and result["n"] == 4
    assert result["searches_per_question"] == 1.5
    assert result["searches_per_correct"] == 3.0
    assert result["no_search_rate"] == 0.25
    assert result["invalid_rate"] == 0.25
    assert result["unanswered_rate"] == 0.5
    assert result["tokens_per_answer"] == 25.0
    assert result["em_by_hops"] == {"1": 1.0, "2": pytest.approx(1 / 3)}


def test_several_rollouts_of_a_question_count_as_one_question() -> None:
    result = evaluate([episode("a", reward=1.0), episode("a", reward=0.0), episode("b", reward=1.0)], seed=0)
    assert result["n"] == 2
    assert result["em"] == 0.75


def test_searches_per_correct_is_none_when_nothing_is_correct() -> None:
    assert evaluate([episode("a", reward=0.0, searches=2)], seed=0)["searches_per_correct"] is None


def test_the_interval_is_seeded_and_as_wide_as_the_binomial_one() -> None:
    values = np.array([1.0] * 120 + [0.0] * 280)
    low, high = bootstrap_ci95(values, seed=3)
    assert [low, high] == bootstrap_ci95(values, seed=3)
    half_width = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half_width, abs=0.01)
    assert high == pytest.approx(0.3 + half_width, abs=0.01)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        evaluate([], seed=0)
