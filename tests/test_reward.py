"""What an answer earns, and where an answer may come from."""

import json
from pathlib import Path

import pytest

from searche1_lite.rollout.reward import exact_match, extract_answer, f1_score, normalize_answer


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Beatles", "beatles"),
        ("  An   apple, a day! ", "apple day"),
        ("U.S.A.", "usa"),
        ("Theatre", "theatre"),
        ("the", ""),
        ("1,234", "1234"),
        ("São Paulo", "são paulo"),
        ("Jean-Luc", "jeanluc"),
    ],
)
def test_answers_are_normalised_as_squad_does(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "f1"),
    [
        ("Lima", ["Quito", "the Lima."], 1.0, 1.0),
        ("Lima Peru", ["Lima"], 0.0, 2 / 3),
        ("Quito", ["Lima"], 0.0, 0.0),
        ("yes indeed", ["yes"], 0.0, 0.0),
        ("a b b", ["b b c"], 0.0, 0.8),
        ("", ["Lima"], 0.0, 0.0),
        (None, ["Lima"], 0.0, 0.0),
        (None, [""], 0.0, 0.0),
        (" ", ["The"], 0.0, 0.0),
        ("Lima", [], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_take_the_best_gold(prediction: str | None, golds: list[str], em: float, f1: float) -> None:
    assert exact_match(prediction, golds) == em
    assert f1_score(prediction, golds) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        ([], None),
        (["no tags"], None),
        (["<answer> Lima </answer>"], "Lima"),
        (["<answer>Lima</answer>", "then <answer>Quito</answer>"], "Quito"),
        (["<answer>Lima</answer>", "<search> more </search>"], "Lima"),
        (["<answer>Lima", "</answer>"], None),
        (["<answer>one", "two</answer> <answer>"], None),
        (["<answer>one <answer>two</answer>"], "two"),
        (["<answer></answer>"], ""),
    ],
)
def test_the_answer_is_the_last_complete_block_of_a_single_turn(turns: list[str], answer: str | None) -> None:
    assert extract_answer(turns) == answer


SEARCH_R1 = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "search_r1_normalisation.jsonl").read_text("utf-8").splitlines()
]
"""Our cases, with what Search-R1's published `normalize_answer` and `em_check` made of them (Python 3.11)."""


def test_normalised_answers_are_search_r1s_on_every_case() -> None:
    assert len(SEARCH_R1) >= 200 and {case["em"] for case in SEARCH_R1} == {0, 1}
    for case in SEARCH_R1:
        assert normalize_answer(case["prediction"]) == case["normalized"], case
        assert [normalize_answer(gold) for gold in case["golden_answers"]] == case["normalized_golds"], case


def test_exact_match_is_search_r1s_on_every_case_but_that_a_blank_answer_never_earns() -> None:
    """There, a blank one matches a gold answer of which nothing is left, such as `The`."""
    blank = [case for case in SEARCH_R1 if not case["prediction"].strip()]
    assert any(case["em"] for case in blank)
    for case in SEARCH_R1:
        expected = 0.0 if case in blank else float(case["em"])
        assert exact_match(case["prediction"], case["golden_answers"]) == expected, case
