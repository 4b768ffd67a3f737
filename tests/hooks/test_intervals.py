from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.intervals import NEVER, innermost, match_rows, shared_codes

INTERVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(-20, 20), st.integers(-20, 40)), max_size=40)
MOMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(-25, 45)), min_size=1, max_size=40)


def found(intervals: list[tuple[int, int, int]], moments: list[tuple[int, int]]) -> list[int]:
    lane, start, end = np.array(intervals, np.int64).reshape(-1, 3).T
    at_lane, at = np.array(moments, np.int64).reshape(-1, 2).T
    return innermost(lane, start, end, at_lane, at).tolist()


def by_search(intervals: list[tuple[int, int, int]], lane: int, at: int) -> int:
    """The rule, word for word: began last, of those the shortest, of those the last."""
    around = [
        (start, -(end - start), row)
        for row, (one, start, end) in enumerate(intervals)
        if one == lane and start <= at < end
    ]
    return max(around)[2] if around else -1


@given(INTERVALS, MOMENTS)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_it_agrees_with_a_search_of_all_intervals(intervals, moments):
    assert found(intervals, moments) == [by_search(intervals, *moment) for moment in moments]


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_on_many_overlapping_intervals(seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 3_000, 700)
    columns = rng.integers(0, 2, 700), start, start + rng.integers(0, 900, 700)
    intervals = [tuple(row) for row in np.column_stack(columns).tolist()]
    moments = [tuple(row) for row in np.column_stack([rng.integers(0, 3, 700), rng.integers(-10, 4_000, 700)]).tolist()]
    assert found(intervals, moments) == [by_search(intervals, *moment) for moment in moments]


@pytest.mark.parametrize(
    ("intervals", "at", "row"),
    [
        pytest.param([(0, 0, 10)], 10, -1, id="the end is outside"),
        pytest.param([(0, 0, 10)], 0, 0, id="the start is inside"),
        pytest.param([(0, 0, 10), (0, 5, 20)], 7, 1, id="badly nested: the later start"),
        pytest.param([(0, 0, 20), (0, 5, 10)], 12, 0, id="the inner one has ended"),
        pytest.param([(0, 0, 9), (0, 0, 5)], 3, 1, id="same start: the shorter"),
        pytest.param([(0, 0, 5), (0, 0, 9)], 3, 0, id="same start: the shorter, in any order"),
        pytest.param([(0, 0, 5), (0, 0, 5)], 3, 1, id="alike: the later row"),
        pytest.param([(0, 5, 5), (0, 8, 2)], 5, -1, id="without duration, or backward: holds nothing"),
        pytest.param([(0, 5, NEVER)], NEVER - 1, 0, id="never closed"),
        pytest.param([(1, 0, 9)], 3, -1, id="another lane"),
        pytest.param([], 3, -1, id="none"),
    ],
)
def test_borders(intervals, at, row):
    assert found(intervals, [(0, at)]) == [row]


def test_the_extremes_of_the_clock_do_not_overflow():
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert found([(0, least, most), (1, most - 1, most)], [(0, least), (0, 0), (1, most - 1), (1, least)]) == [
        0,
        0,
        1,
        -1,
    ]


def test_rows_share_a_number_exactly_when_they_are_equal():
    left, right = [(1, 5), (2, 5), (1, 6), (-1, 5)], [(2, 5), (1, 5), (9, 9), (1, 5)]
    codes = np.concatenate(shared_codes(list(np.array(left).T), list(np.array(right).T)))
    rows = left + right
    assert [[a == b for b in codes] for a in codes] == [[a == b for b in rows] for a in rows]
    assert codes.min() == 0
    assert codes.max() < len(rows)


#: Close together, as ids that a profiler counts up; or anything.
NUMBERS = st.integers(-3, 3) | st.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max)
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12)


@given(ROWS, ROWS)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_whatever_the_numbers_are_rows_share_a_code_exactly_when_they_are_equal(left, right):
    columns = [list(np.array(side, np.int64).reshape(-1, 2).T) for side in (left, right)]
    codes = np.concatenate(shared_codes(*columns)).tolist()
    assert len(set(zip(left + right, codes, strict=True))) == len(set(left + right)) == len(set(codes))
    assert all(0 <= code < len(codes) for code in codes)


def test_of_rows_with_one_key_the_least_priority_wins():
    keys, wanted = np.array([3, 1, 3, 3]), np.array([3, 0, 1, 5])
    assert match_rows(keys, wanted, priority=np.array([9, 0, 4, 7])).tolist() == [2, -1, 1, -1]
    nothing = np.array([], np.int64)
    assert match_rows(nothing, np.array([2]), priority=nothing).tolist() == [-1]
