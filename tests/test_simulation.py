"""The simulation of rollouts does what rollouts do, step by step, and adds up the costs it is given."""

from dataclasses import dataclass

import pytest

from examples.planning.simulation import Script, Written, script_of, simulate
from searche1_lite.bench.rollout import Workload
from searche1_lite.config import load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.scheduler import HEAD_START, RolloutTimes


@dataclass(frozen=True)
class Prices:
    """A second for a step or a pass, and a hundred for a new query."""

    query: float = 100.0
    opening: float = 0.0

    def start(self) -> float:
        return self.opening

    def step(self, rows: int, columns: int) -> float:
        return 1.0

    def prefill(self, tokens: int, columns: int) -> float:
        return 1.0

    def copy(self, tokens: int) -> float:
        return 0.0

    def turn(self) -> float:
        return 0.0

    def search(self, queries: int) -> float:
        return self.query * queries


FREE = Prices(query=0.0)


def searching(group: int, query: str, written: int = 5) -> Script:
    """One search and an answer, of `written` tokens each."""
    return Script(group, 10, (Written(written, 7, query), Written(written, 0)))


@pytest.mark.parametrize(("rows", "greedy"), [(8, False), (8, True), (64, False)])
def test_a_simulation_makes_the_steps_and_passes_that_rollouts_make(rows: int, greedy: bool) -> None:
    config = load_config("demo", None, [f"engine.batch_size={rows}"])
    model, tokenizer = load_policy(config.model, seed=0)
    work = Workload("demo", config, model, tokenizer, load_questions("demo:dev", "dev", 12), 3, greedy)
    times = RolloutTimes()
    played = work.rollout(work.retriever(), work.questions, work.n, Episode, times)
    scripts = [script_of(one, number // work.n) for number, one in enumerate(played)]
    found = simulate(scripts, rows, FREE, in_step=True)
    assert (found.decode_steps, found.prefill_tokens) == (times.decode_steps, times.prefill_tokens)
    assert found.tokens == sum(one.n_model_tokens for one in played)
    assert found.searches == sum(one.n_searches for one in played) > 0


def test_seconds_are_those_of_the_steps_and_passes() -> None:
    found = simulate([searching(0, "a")], 1, FREE, in_step=True)
    assert (found.decode_steps, found.tokens, found.decode, found.prefill) == (10, 10, 10.0, 2.0)
    assert found.seconds == 12.0
    assert simulate([searching(0, "a")], 1, Prices(0.0, opening=3.0), in_step=True).seconds == 15.0


def test_what_waits_for_a_search_is_nothing_else_to_do() -> None:
    alone = simulate([searching(0, "a")], 1, Prices(), in_step=False)
    assert alone.search == alone.search_wait == 100.0 and alone.seconds == 112.0
    beside = simulate([searching(0, "a"), Script(1, 10, (Written(60, 0),))], 2, Prices(), in_step=False)
    assert beside.search_wait == pytest.approx(100.0 - (60 - 5)), "the other one goes on writing meanwhile"


def test_on_a_cpu_passages_are_waited_for_after_the_head_start() -> None:
    scripts = [searching(0, "a"), Script(1, 10, (Written(60, 0),))]
    found = simulate(scripts, 2, Prices(), in_step=True)
    assert found.search_wait == 100.0 - HEAD_START


def test_one_thread_searches_and_remembers_what_it_found() -> None:
    def waited(*queries: str) -> float:
        return simulate([searching(n, query) for n, query in enumerate(queries)], 3, Prices(), in_step=False).search

    assert waited("a", "b", "c") == 300.0 and waited("a", "a", "b") == 200.0
