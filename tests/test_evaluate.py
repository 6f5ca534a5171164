"""Metrics of small sets of episodes that can be worked out by hand."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn
from searche1_lite.rollout.metrics import Outcome, bootstrap_ci95, evaluate, holds_gold, outcome, summarize


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


# Was a miss the search's fault?

PERU = Passage("1", "Lima", "The capital of Peru, since 1535")


@pytest.mark.parametrize(
    ("golds", "held"),
    [
        (["Lima"], True),
        (["the capital of PERU!"], True),
        (["Quito", "Peru"], True),
        (["Lim"], False),
        (["535"], False),
        (["Lima capital"], False),  # the title's end and the text's beginning are no phrase
        (["capital Peru"], False),
        (["capital of  Peru since"], True),
        (["yes"], None),
        (["No.", "the"], None),
        (["no", "Peru"], True),
    ],
)
def test_a_passage_holds_a_gold_answer_word_for_word(golds: list[str], held: bool | None) -> None:
    assert holds_gold([Passage("0", "Quito", "Elsewhere"), PERU], golds) is held


@pytest.mark.parametrize(
    ("text", "gold", "held"),
    [
        ("Nolan's brother", "Nolan", True),
        ("Christopher Nolan’s film", "Nolan", True),
        ("the song “Yesterday”.", "Yesterday", True),
        ("the war of 1939–1945", "1939", True),
        ("an Anglo-French force", "French", True),
        ("Paris/London", "Paris", True),
        ("about 1,200 people", "1200", True),
        ("about 1,200 people", "1,200", True),
        ("the U.S. army", "US", True),
        ("Ｐａｒｉｓ", "Paris", True),
        ("in Parish", "Paris", False),
        ("the", "The", None),
    ],
)
def test_punctuation_neither_hides_nor_makes_a_gold_answer(text: str, gold: str, held: bool | None) -> None:
    assert holds_gold([Passage("1", "", text)], [gold]) is held


def test_nothing_found_holds_no_gold_answer() -> None:
    assert holds_gold([], ["Lima"]) is False


def looked_up(question: str, reward: float, found: list[Search], given: list[Search] = (), gold: str = "Lima") -> Any:  # type: ignore[assignment]
    trajectory = episode(question, reward=reward)
    return replace(trajectory, searches=found, given=list(given), question=Question(question, "?", [gold]))


def test_recall_and_misses_are_those_worked_out_by_hand() -> None:
    hit, miss = Search("q", [PERU]), Search("q", [Passage("2", "Quito", "Elsewhere")])
    result = evaluate(
        [
            looked_up("right", 1.0, [miss, hit]),
            looked_up("right without the passage", 1.0, [miss]),
            looked_up("read wrongly", 0.0, [miss, hit]),
            looked_up("not found", 0.0, [miss, Search("q", [])]),
            looked_up("not searched", 0.0, []),
            looked_up("yes or no", 0.0, [hit], gold="yes"),
            looked_up("shown and read wrongly", 0.0, [], given=[hit]),
            looked_up("shown in vain", 0.0, [], given=[miss]),
        ],
        seed=0,
    )
    assert result["retriever_recall"] == pytest.approx(3 / 6)
    assert result["misses"] == {"search": 2, "reasoning": 2, "no_search": 1, "undecided": 1}
    assert result["searches_per_question"] == 8 / 8 and result["no_search_rate"] == 3 / 8


def test_recall_is_none_where_nothing_can_be_told() -> None:
    assert evaluate([episode("a", reward=1.0)], seed=0)["retriever_recall"] is None


# By data set


def in_set(name: str, rewards: list[float], **more: Any) -> list[Outcome]:
    one = outcome(episode("q", reward=0.0, searches=1))
    return [
        replace(one, id=f"{name}:{index}", data_set=name, em=reward, f1=(1 + reward) / 2, **more)
        for index, reward in enumerate(rewards)
    ]


def test_each_data_set_has_its_figures_and_the_average_is_over_sets() -> None:
    large, small = in_set("nq", [1.0] * 30 + [0.0] * 70), in_set("bamboogle", [1.0, 0.0, 1.0, 1.0] * 10, hops=2)
    result = summarize(large + small, seed=1)
    assert list(result["by_data_set"]) == ["nq", "bamboogle"]
    assert result["by_data_set"]["nq"] == {
        key: value for key, value in summarize(large, seed=1).items() if key != "by_data_set"
    }
    assert result["by_data_set"]["bamboogle"]["em_by_hops"] == {"2": 0.75}
    assert result["em"] == pytest.approx(60 / 140) and result["em_average"] == pytest.approx((0.3 + 0.75) / 2)
    assert result["f1_average"] == pytest.approx((0.65 + 0.875) / 2)
    low, high = result["em_average_ci95"]
    # Of independent means: a quarter of the sum of their variances.
    deviation = (0.3 * 0.7 / 100 + 0.75 * 0.25 / 40) ** 0.5 / 2
    assert (low + high) / 2 == pytest.approx(0.525, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)


def test_the_average_of_sets_of_one_size_narrows_as_that_of_independent_ones() -> None:
    """Resampled with one seed, sets whose answers happen to be the same would all move together."""
    alone = summarize(in_set("a", [1.0, 0.0] * 100), seed=1)["em_ci95"]
    many = summarize([item for name in "abcd" for item in in_set(name, [1.0, 0.0] * 100)], seed=1)["em_average_ci95"]
    assert many[1] - many[0] == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)


def test_one_data_set_has_no_average() -> None:
    result = summarize(in_set("nq", [1.0, 0.0]), seed=1)
    assert result["by_data_set"].keys() == {"nq"} and "em_average" not in result


def test_outcomes_read_back_from_json_give_the_same_figures() -> None:
    outcomes = [replace(item, seconds=0.1 * n) for n, item in enumerate(in_set("nq", [1.0, 0.0, 1 / 3]))]
    again = [Outcome(**json.loads(json.dumps(asdict(item)))) for item in outcomes]
    assert summarize(again, seed=2) == summarize(outcomes, seed=2)
    assert summarize(outcomes, seed=2)["seconds_per_question"] == pytest.approx(0.1)
    assert "seconds_per_question" not in summarize(in_set("nq", [1.0]), seed=2)


def test_f1_has_its_own_interval() -> None:
    items = in_set("nq", [1.0, 0.0] * 50)
    result = summarize(items, seed=2)
    assert result["f1_ci95"] == bootstrap_ci95(np.array([item.f1 for item in items]), seed=2) != result["em_ci95"]


@pytest.mark.parametrize(("em", "interval"), [(0.0, (0.0, 0.2180)), (1.0, (0.7820, 1.0))])
def test_a_few_questions_that_are_all_wrong_or_all_right_do_not_make_it_certain(
    em: float, interval: tuple[float, float]
) -> None:
    """Clopper and Pearson's exact interval for none of 15."""
    result = summarize(in_set("a", [em] * 15), seed=1)
    assert result["em_ci95"] == pytest.approx(interval, abs=1e-4)
    assert summarize(in_set("a", [em] * 15 + [1 - em]), seed=1)["em_ci95"] != pytest.approx(interval, abs=1e-2)
