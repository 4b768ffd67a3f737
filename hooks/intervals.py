"""Which interval is innermost at a moment: the one engine behind every attribution.

Innermost is the interval that began last among those of the same lane that hold the moment; of those that began
together the shortest, of those alike the one that stands last. Properly nested intervals have no other candidate.
Overlapping ones (ranges that are started and ended by hand) get one by this rule, so an assignment is always exclusive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from hooks.columns import NONE, in_pieces, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hooks.columns import Ints

#: End of an interval that nobody ended.
NEVER: Final = np.iinfo(np.int64).max


def shared_codes(left: Sequence[Ints], right: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Number the distinct rows of two tables, so that equal rows have equal numbers.

    Parameters
    ----------
    left, right
        The columns of each table, in the same order.

    Returns
    -------
    tuple of ndarray
        A number for each row of `left` and of `right`, from 0 to less than the rows of both together.
    """
    most = len(left[0]) + len(right[0])
    codes, size = _numbered((left[0], right[0]))
    for pair in zip(left[1:], right[1:], strict=True):
        numbers, count = _numbered(pair)
        codes = codes[0] * count + numbers[0], codes[1] * count + numbers[1]
        size *= count
        if size > most:
            codes, size = _numbered(codes)
    return codes


def _numbered(columns: tuple[Ints, Ints]) -> tuple[tuple[Ints, Ints], int]:
    """Number the distinct values of both columns, and count them."""
    one, other = columns
    least = min(int(values.min(initial=NEVER)) for values in columns)
    span = max(int(values.max(initial=least)) for values in columns) - least + 1
    if span > len(one) + len(other):
        encoded = pa.array(np.concatenate(columns)).dictionary_encode()
        numbers = encoded.indices.to_numpy().astype(np.int64)
        return (numbers[: len(one)], numbers[len(one) :]), len(encoded.dictionary)
    # Ids that a profiler counts up lie close together: to mark those that are there takes less room than to hash them.
    is_there = np.zeros(span, bool)
    for values in columns:
        for (piece,) in pieces(values):
            is_there[piece - least] = True
    number = np.cumsum(is_there) - 1
    one, other = (in_pieces(lambda piece: number[piece - least], values) for values in columns)
    return (one, other), int(number[-1]) + 1


def match_rows(keys: Ints, wanted: Ints, *, priority: Ints) -> Ints:
    """Find, for each wanted key, the row that has it: of several the one with the least priority number.

    Parameters
    ----------
    keys, wanted
        Numbers of `shared_codes`.
    priority
        A number for each key.

    Returns
    -------
    ndarray
        Row numbers in `keys`, -1 where no row has the key.
    """
    rows = np.full(max(keys.max(initial=NONE), wanted.max(initial=NONE)) + 1, NONE)
    # The last assignment stays.
    order = np.argsort(priority, kind="stable")[::-1]
    rows[keys[order]] = order
    return rows[wanted]


def innermost(lane: Ints, start: Ints, end: Ints, at_lane: Ints, at: Ints) -> Ints:
    """Find the innermost interval at each moment.

    Intervals hold their start and not their end, so one whose end is not after its start holds nothing. The cost grows
    as n log n with intervals and moments, however they overlap.

    Parameters
    ----------
    lane, start, end
        Of each interval; lanes (such as threads) are numbered from 0 and never share intervals.
    at_lane, at
        Lane and time of each moment.

    Returns
    -------
    ndarray
        For each moment the row of its interval, -1 where none holds it.
    """
    times = np.sort(start)
    keys = in_pieces(lambda one, time: one * (len(times) + 1) + np.searchsorted(times, time) + 1, lane, start)
    order = np.lexsort((~end, keys))
    keys, latest, row = keys[order], _maxima(end[order]), np.append(order, NONE)
    first = np.searchsorted(keys, np.arange(at_lane.max(initial=NONE) + 1) * (len(times) + 1))

    def find(one: Ints, time: Ints) -> Ints:
        key = one * (len(times) + 1) + np.searchsorted(times, time, side="right")
        found = _last_open(latest, np.searchsorted(keys, key, side="right"), time)
        return row[np.where(found >= first[one], found, NONE)]

    return in_pieces(find, at_lane, at)


def _maxima(end: Ints) -> list[Ints]:
    """``maxima[k]`` holds the latest end in each block of 2**k positions."""
    maxima = [end]
    while len(maxima[-1]) > 1:
        maxima.append(np.maximum(maxima[-1][:-1:2], maxima[-1][1::2]))
    return maxima


def _last_open(maxima: Sequence[Ints], stop: Ints, at: Ints) -> Ints:
    """Greatest position below each ``stop`` whose end is after ``at``, -1 for none.

    What lies below a stop is a row of full blocks, one for each bit that is set in it: they are looked at from the
    nearest, and the first that holds an open interval is halved down to it.
    """
    found = np.full(len(stop), NONE)
    pending = np.flatnonzero(stop > 0)
    for level, latest in enumerate(maxima):
        blocks = stop[pending] >> level
        pending, blocks = pending[blocks > 0], blocks[blocks > 0]
        odd = blocks % 2 == 1
        here = np.zeros(len(pending), bool)
        here[odd] = latest[blocks[odd] - 1] > at[pending[odd]]
        found[pending[here]] = _descend(maxima[:level], blocks[here] - 1, at[pending[here]])
        pending = pending[~here]
    return found


def _descend(maxima: Sequence[Ints], block: Ints, at: Ints) -> Ints:
    for latest in reversed(maxima):
        block = 2 * block + 1
        block -= latest[block] <= at
    return block
