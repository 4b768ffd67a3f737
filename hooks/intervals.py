"""Which interval is innermost at a moment: the one engine behind every attribution.

Innermost is the interval that began last among those of the same lane that hold the moment; of those that began
together the shortest, of those alike the one that stands last. Properly nested intervals have no other candidate.
Overlapping ones (ranges that are started and ended by hand) get one by this rule, so an assignment is always exclusive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from hooks.columns import NONE

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
    rows = len(left[0])
    codes: Ints = np.zeros(rows + len(right[0]), np.int64)
    size = 1
    for pair in zip(left, right, strict=True):
        encoded = pa.array(np.concatenate(pair)).dictionary_encode()
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
        size *= len(encoded.dictionary)
        if size > len(codes):
            closed = pa.array(codes).dictionary_encode()
            codes, size = closed.indices.to_numpy().astype(np.int64), len(closed.dictionary)
    return codes[:rows], codes[rows:]


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
    keys = lane * (len(times) + 1) + np.searchsorted(times, start) + 1
    order = np.lexsort((~end, keys))
    keys = keys[order]
    lanes = np.arange(at_lane.max(initial=NONE) + 1)
    first = np.searchsorted(keys, lanes * (len(times) + 1))
    at_key = at_lane * (len(times) + 1) + np.searchsorted(times, at, side="right")
    found = _last_open(end[order], np.searchsorted(keys, at_key, side="right"), at)
    return np.append(order, NONE)[np.where(found >= first[at_lane], found, NONE)]


def _last_open(end: Ints, stop: Ints, at: Ints) -> Ints:
    """Greatest position below each ``stop`` whose ``end`` is after ``at``, -1 for none.

    ``maxima[k]`` holds the latest end in each block of 2**k positions. What lies below a stop is a row of full blocks,
    one for each bit that is set in it: they are looked at from the nearest, and the first that holds an open interval
    is halved down to it.
    """
    maxima = [end]
    while len(maxima[-1]) > 1:
        maxima.append(np.maximum(maxima[-1][:-1:2], maxima[-1][1::2]))
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
