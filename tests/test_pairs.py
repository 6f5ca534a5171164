from collections.abc import Sequence

import pytest

from searche1_lite.data.trajectory import Question, Search, Trajectory
from searche1_lite.train.pairs import Pairs, select_pairs


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
        found = select_pairs(order, students)
        pairs, counts = found.chosen, found.counts
        assert [(pair.reference.sample, pair.student.sample) for pair in pairs] == ([expected] if expected else [])
        wrong = sum(not pair.student.correct for pair in pairs)
        assert counts == {
            "questions": 1,
            "pairs": len(pairs),
            "none_correct": int(not any(row[0] for row in rows)),
            "none_less_efficient": int(any(row[0] for row in rows) and expected is None),
            "wrong_students": wrong,
            "correct_students": len(pairs) - wrong,
            "other_references": 0,
        }


def test_pairs_are_one_a_question_in_the_order_in_which_questions_come() -> None:
    trajectories = [rolled(sample, sample % 2, 1 + sample, 9, question=name) for sample in range(4) for name in "cab"]
    found = select_pairs([*trajectories, rolled(0, 0, 1, 9, question="d")])
    pairs, counts = found.chosen, found.counts
    assert [pair.student.question.id for pair in pairs] == ["c", "a", "b"]
    assert all(pair.reference.question == pair.student.question for pair in pairs)
    assert counts["questions"] == 4 and counts["pairs"] == 3 and counts["none_correct"] == 1
    assert select_pairs([]) == Pairs([], dict.fromkeys(counts, 0))


# The rollouts of one question: reward, searches, tokens. The efficient one is 1, the student 4 (wrong, most apart).
GROUP = [(1, 3, 9), (1, 1, 9), (0, 2, 9), (1, 2, 30), (0, 4, 9), (1, 2, 9)]


def test_an_ablation_changes_what_is_shown_and_leaves_the_student() -> None:
    shown: dict[str, set[int]] = {"random_correct": set(), "most_different": set(), "random": set()}
    for reference, samples in shown.items():
        for question in range(60):
            group = [rolled(sample, *row, question=f"q{question}") for sample, row in enumerate(GROUP)]
            for order in (group, group[::-1]):
                found = select_pairs(order, "any", reference, seed=3)
                pairs, counts = found.chosen, found.counts
                assert [pair.student.sample for pair in pairs] == [4]
                samples.add(pairs[0].reference.sample)
                assert counts["other_references"] == (pairs[0].reference.sample != 1)
            assert select_pairs(group, "any", reference, seed=3) == select_pairs(group[::-1], "any", reference, seed=3)
    assert shown == {"random_correct": {0, 1, 3, 5}, "most_different": {1}, "random": {0, 1, 2, 3, 5}}


def test_the_most_different_reference_is_measured_from_the_student() -> None:
    group = [rolled(0, 1, 2, 9), rolled(1, 1, 3, 9), rolled(2, 0, 1, 9), rolled(3, 1, 2, 40)]
    assert [(p.reference.sample, p.student.sample) for p in select_pairs(group).chosen] == [(0, 2)]
    assert [(p.reference.sample, p.student.sample) for p in select_pairs(group, "any", "most_different").chosen] == [
        (1, 2)
    ]


def test_random_references_follow_the_seed() -> None:
    groups = [rolled(s, *row, question=f"q{question}") for question in range(30) for s, row in enumerate(GROUP)]
    draws = [[p.reference.sample for p in select_pairs(groups, "any", "random", seed).chosen] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
