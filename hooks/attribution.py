"""Which call each event belongs to: the innermost one open on the launching thread when it was launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooks.categories import operator_categories
from hooks.tables import KERNELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Path of the rows that belong to no module.
UNCLASSIFIED: Final = "unclassified"

#: Why an event belongs to no module.
REASONS: Final = {
    "no_launch_record": "the profiler holds no launch call for it, so nothing says which code caused it",
    "outside_any_module": "launched by code outside every module: sampling, n-gram check, stopping test",
    "thread_not_traced": "launched from a thread on which no traced module ran",
}

_NONE: Final = -1


def attribute(events: pa.Table, calls: pa.Table) -> pa.Table:
    """Give every event its call, or the reason why it has none.

    The innermost call is unique, so the assignment is exclusive by construction. An event outside every call
    belongs to the stage and step of the forward before it on its thread: what follows a forward is its sampling.

    Parameters
    ----------
    events
        Table of schema `hooks.tables.EVENTS`.
    calls
        Calls of one pass, schema `hooks.tables.CALLS`, in the order of their start; same clock as `events`.

    Returns
    -------
    pyarrow.Table
        Schema `hooks.tables.KERNELS`, rows in the order of `events`.
    """
    has_launch = events["launch_ns"].is_valid().to_numpy()
    launch = events["launch_ns"].fill_null(0).to_numpy()
    thread = events["launch_thread"].fill_null(_NONE).to_numpy()
    innermost, previous_root = _owners(calls, launch, thread)
    innermost[~has_launch] = _NONE
    previous_root[~has_launch] = _NONE
    reason = np.select(
        [~has_launch, ~np.isin(thread, calls["thread"].to_numpy())],
        ["no_launch_record", "thread_not_traced"],
        "outside_any_module",
    )
    # Row of the call that gives an event its stage: its own, else the forward before it.
    row = np.where(innermost != _NONE, innermost, previous_root)
    own = pa.array(innermost, mask=innermost == _NONE)
    context = pa.array(row, mask=row == _NONE)
    columns = {name: events[name] for name in events.column_names}
    columns |= {
        "operator_category": operator_categories(events["name"]),
        "pass": _constant(calls["pass"], events.num_rows),
        "page": pc.take(calls["page"], context),
        "stage": pc.take(calls["stage"], context).fill_null("other"),
        "step": pc.take(calls["step"], context),
        "call_id": pc.take(calls["call_id"], own),
        "module_path": pc.take(calls["module_path"], own).fill_null(UNCLASSIFIED),
        "unclassified_reason": pa.array(reason, pa.string(), mask=innermost != _NONE),
    }
    return pa.table(columns, schema=KERNELS)


def _constant(column: pa.ChunkedArray, length: int) -> pa.Array:
    values = column.unique().to_pylist()
    if len(values) != 1:
        raise ValueError(f"events are attributed to the calls of one pass, got {values}")
    return pa.repeat(pa.scalar(values[0], pa.string()), length)


def _owners(
    calls: pa.Table, launch: NDArray[np.int64], thread: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row of the innermost call at each launch, and of the last outermost call begun before it; -1 for none."""
    innermost = np.full(len(launch), _NONE, np.int64)
    previous = np.full(len(launch), _NONE, np.int64)
    start, end = calls["start_ns"].to_numpy(), calls["end_ns"].to_numpy()
    call_thread = calls["thread"].to_numpy()
    parent = _parent_rows(calls)
    for one in np.unique(call_thread):
        rows = np.flatnonzero(call_thread == one)
        at = np.flatnonzero(thread == one)
        # A call without duration holds no launch, and its boundaries would have no order.
        timed = rows[end[rows] > start[rows]]
        boundary, owner = _timeline(timed, start, end, parent)
        slot = np.searchsorted(boundary, launch[at], side="right") - 1
        innermost[at] = np.where(slot >= 0, owner[slot], _NONE)
        roots = rows[parent[rows] == _NONE]
        slot = np.searchsorted(start[roots], launch[at], side="right") - 1
        previous[at] = np.where(slot >= 0, roots[slot], _NONE)
    return innermost, previous


def _parent_rows(calls: pa.Table) -> NDArray[np.int64]:
    """Row of each call's parent, -1 for none."""
    ids = calls["call_id"].to_numpy()
    parent_ids = calls["parent_call_id"].fill_null(_NONE).to_numpy()
    order = np.argsort(ids)
    rows = order[np.minimum(np.searchsorted(ids, parent_ids, sorter=order), len(ids) - 1)]
    return np.where((parent_ids != _NONE) & (ids[rows] == parent_ids), rows, _NONE)


def _timeline(
    rows: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64], parent: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times at which the innermost call changes, and the call that is innermost from each on."""
    times = np.concatenate([start[rows], end[rows]])
    owner = np.concatenate([rows, parent[rows]])
    # At one instant ends come before starts, inner ends before outer ones, outer starts before inner ones.
    is_start = np.repeat([1, 0], len(rows))
    nesting = np.concatenate([rows, -rows])
    order = np.lexsort((nesting, is_start, times))
    return times[order], owner[order]
