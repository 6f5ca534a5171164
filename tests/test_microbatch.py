"""How sequences are shared out among passes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searche1_lite.policy.microbatch import fullest, micro_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def padded(lengths: list[int], batch: list[int]) -> int:
    return len(batch) * max(lengths[index] for index in batch)


@given(LENGTHS, st.integers(1, 200))
def test_every_sequence_comes_once_within_the_budget_or_alone(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(padded(lengths, batch) <= budget or len(batch) == 1 for batch in batches)
    assert micro_batches(lengths, budget) == batches


@given(LENGTHS, st.integers(1, 200))
def test_no_later_sequence_is_longer_and_none_would_have_fitted_before(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(order, reverse=True)
    for batch, after in pairwise(batches):
        assert padded(lengths, [*batch, after[0]]) > budget


def test_sequences_of_like_length_go_together_and_a_long_one_alone() -> None:
    assert micro_batches([10, 99, 30, 12, 30], 60) == [[1], [2, 4], [3, 0]]
    assert micro_batches([], 60) == []


@pytest.mark.parametrize(
    ("longest", "budget", "sequences", "rows_and_columns"),
    [
        (100, 100, 9, (1, 100)), (100, 300, 9, (3, 100)), (100, 300, 2, (2, 100)), (100, 40, 9, (1, 100)),
        (100, 250, 9, (3, 83)), (100, 101, 9, (2, 50)), (100, 101, 1, (1, 100)),
    ],
)  # fmt: skip
def test_the_fullest_micro_batch_uses_the_budget_up(
    longest: int, budget: int, sequences: int, rows_and_columns: tuple[int, int]
) -> None:
    assert fullest(longest, budget, sequences) == rows_and_columns


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_no_micro_batch_is_fuller_than_the_fullest(lengths: list[int], budget: int) -> None:
    rows, columns = fullest(60, budget, len(lengths))
    # A row's share of the budget is rounded down.
    assert all(padded(lengths, batch) <= rows * columns + rows for batch in micro_batches(lengths, budget))
