import pytest
from scipy import stats

from searche1_lite.evaluate.sweep.compare import Outcome, compare, holm, paired_p, t_interval


def done(variant: str, seed: int, em: float, correct: dict[str, float] | None = None, **figures: float) -> Outcome:
    return Outcome(variant, seed, "done", em=em, correct=correct or {}, **({"searches": 2.0} | figures))


def test_the_interval_is_students_over_seeds() -> None:
    # Tables give t = 4.3027 for two degrees of freedom; the standard error of 1, 2, 3 is 1 / sqrt(3).
    assert t_interval([0.1, 0.2, 0.3]) == [0.0, pytest.approx(0.2 + 4.30265 * 0.1 / 3**0.5)]
    assert t_interval([0.50, 0.51, 0.52]) == pytest.approx([0.51 - 0.02484, 0.51 + 0.02484], abs=1e-5)
    assert t_interval([0.9, 0.99])[1] == 1.0
    assert t_interval([0.5]) is None and t_interval([]) is None


def test_over_seeds_the_difference_is_tested_in_pairs() -> None:
    ours, theirs = [0.8, 0.7, 0.9, 0.6], [0.7, 0.62, 0.79, 0.53]
    pairs = [(done("a", s, one), done("b", s, other)) for s, (one, other) in enumerate(zip(ours, theirs, strict=True))]
    p, test = paired_p(pairs)
    assert test == "paired t-test over seeds"
    # Differences .10 .08 .11 .07: mean .09, standard error .0091287, t = 9.859 with 3 degrees of freedom.
    assert p == pytest.approx(2 * stats.t.sf(9.8590, 3), rel=1e-3) and p < 0.01
    unpaired = stats.ttest_ind(ours, theirs).pvalue
    assert unpaired > 0.2, "what seeds have in common would hide it"


def test_one_seed_is_tested_over_its_questions() -> None:
    ours = {f"q{number}": float(number < 14) for number in range(20)}
    theirs = {f"q{number}": float(number < 4 or number == 19) for number in range(20)}
    p, test = paired_p([(done("a", 1, 0.7, ours), done("b", 1, 0.25, theirs))])
    # Ten questions against one: 2 * (1 + 11) / 2^11.
    assert (test, p) == ("sign test over questions", pytest.approx(24 / 2048))


def test_seeds_that_all_differ_alike_are_tested_over_questions() -> None:
    right = {"x": 1.0, "y": 1.0, "z": 1.0}
    pairs = [(done("a", seed, 1.0, right), done("b", seed, 0.0, dict.fromkeys(right, 0.0))) for seed in (1, 2)]
    assert paired_p(pairs) == (pytest.approx(0.25), "sign test over questions")
    same = [(done("a", seed, 1.0, right), done("b", seed, 1.0, right)) for seed in (1, 2)]
    assert paired_p(same) == (1.0, "sign test over questions")
    assert paired_p([]) == (None, None)


def test_searches_are_compared_in_pairs_too() -> None:
    outcomes = [
        done(variant, seed, 0.5, searches=searches)
        for variant, of_seeds in {"a": [2.1, 2.2, 2.15], "b": [2.0, 2.08, 2.0]}.items()
        for seed, searches in enumerate(of_seeds)
    ]
    a, b = compare(outcomes, ["a", "b"], "a", {"a": "a", "b": "b"})
    # Differences -.10 -.12 -.15: mean -.12333, standard error .014530, t = -8.488 with 2 degrees of freedom.
    assert b["searches_diff"] == pytest.approx(-0.37 / 3)
    assert b["searches_p"] == pytest.approx(2 * stats.t.sf(8.4885, 2), rel=1e-3)
    assert (a["searches_diff"], a["searches_p"]) == (0.0, None)


def test_holm_adjusts_the_smallest_most_and_never_turns_the_order_round() -> None:
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_rows_have_the_figures_of_the_runs_that_are_done_and_tell_of_the_others() -> None:
    outcomes = [
        done("grpo", 1, 0.5, seconds=10.0, updates=4),
        done("grpo", 2, 0.6, seconds=20.0, updates=6),
        done("ofsd", 1, 0.8, seconds=30.0, updates=8),
        Outcome("ofsd", 2, "failed", error="out of memory"),
        done("ofsd", 3, 0.9, seconds=32.0, updates=8),
        Outcome("sft", 1, "waiting"),
    ]
    titles = {"grpo": "GRPO only", "ofsd": "with", "sft": "sft"}
    grpo, ofsd, sft = compare(outcomes, list(titles), "grpo", titles)
    assert (grpo["name"], grpo["title"], grpo["seeds"]) == ("grpo", "GRPO only", [1, 2])
    assert (grpo["em_mean"], grpo["seconds"], grpo["updates"]) == (pytest.approx(0.55), 15.0, 5)
    assert (grpo["em_diff"], grpo["p_value"], grpo["p_holm"]) == (0.0, None, None)
    assert ofsd["seeds"] == [1, 3] and ofsd["em_mean"] == pytest.approx(0.85) and ofsd["searches_mean"] == 2.0
    assert ofsd["em_diff"] == pytest.approx(0.3), "of the one seed that both have"
    assert [(run["seed"], run["state"], run["error"]) for run in ofsd["runs"]] == [
        (1, "done", None),
        (2, "failed", "out of memory"),
        (3, "done", None),
    ]
    for key in ("em_mean", "em_ci95", "searches_mean", "em_diff", "p_value", "seconds"):
        assert sft[key] is None
    assert sft["seeds"] == [] and sft["runs"][0]["state"] == "waiting"
