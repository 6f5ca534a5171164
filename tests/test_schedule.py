import time

import pytest

from searche1_lite.config import Config, load_config
from searche1_lite.train.schedule import best_stage, next_stage


def configured(*settings: str) -> Config:
    return load_config(None, None, settings)


def finished(*stages: tuple[str, int, float]) -> list[dict]:
    base = {"name": "base", "seconds": 0.0}
    return [base, *({"name": name, "steps": steps, "seconds": seconds} for name, steps, seconds in stages)]


def test_rounds_of_both_stages_follow_one_another_and_end() -> None:
    config, done, seen = configured("rounds=2"), finished(), []
    while (stage := next_stage(config, done)) is not None:
        seen.append(stage.name)
        assert stage.updates is None and stage.seconds is None and stage.steps(7) == 7 and stage.deadline() is None
        done = [*done, {"name": stage.name, "steps": 9, "seconds": 99.0}]
    assert seen == ["round1.grpo", "round1.ofsd", "round2.grpo", "round2.ofsd"]


def test_without_distillation_there_are_grpo_stages_only() -> None:
    config = configured("rounds=2", "ofsd.enabled=false")
    assert next_stage(config, finished(("round1.grpo", 8, 1.0))).name == "round2.grpo"
    assert next_stage(config, finished(("round1.grpo", 8, 1.0), ("round2.grpo", 8, 1.0))) is None


@pytest.mark.parametrize(("spent", "left"), [(30, 10), (39, 1), (40, None), (41, None)])
def test_updates_of_both_stages_count_against_the_budget(spent: int, left: int | None) -> None:
    config = configured("rounds=9", "budget.updates=40")
    stage = next_stage(config, finished(("round1.grpo", 8, 1.0), ("round1.ofsd", spent - 8, 1.0)))
    if left is None:
        assert stage is None
    else:
        assert (stage.name, stage.updates, stage.steps(24), stage.steps(1)) == ("round2.grpo", left, left, 1)


def test_seconds_of_training_count_against_the_budget() -> None:
    config = configured("rounds=9", "budget.seconds=40.5")
    assert next_stage(config, finished(("round1.grpo", 8, 40.5))) is None
    stage = next_stage(config, finished(("round1.grpo", 8, 30.0)))
    assert (stage.name, stage.seconds) == ("round1.ofsd", pytest.approx(10.5))
    now = time.monotonic()
    assert now + 6.5 <= stage.deadline(spent=4.0) <= time.monotonic() + 6.5


def test_whichever_budget_is_used_up_first_ends_the_run() -> None:
    config = configured("rounds=9", "budget.updates=40", "budget.seconds=40")
    assert next_stage(config, finished(("round1.grpo", 8, 40.0))) is None
    assert next_stage(config, finished(("round1.grpo", 40, 4.0))) is None
    assert next_stage(config, finished(("round1.grpo", 39, 39.0))).updates == 1


def test_a_stage_that_a_collapse_stopped_is_the_last_and_one_that_went_back_is_not() -> None:
    config, (base, stage) = configured("rounds=2"), finished(("round1.grpo", 8, 1.0))
    assert next_stage(config, [base, stage | {"ended": "stop"}]) is None
    assert next_stage(config, [base, stage | {"ended": "rollback"}]).name == "round1.ofsd"


def test_the_best_stage_is_the_last_of_those_with_the_highest_exact_match() -> None:
    stages = [{"name": name, "em": em} for name, em in (("base", 0.2), ("a", 0.5), ("b", 0.5), ("c", 0.1))]
    assert best_stage(stages) == "b" and best_stage(stages[:1]) == "base"
