"""Which call, or which range of code, each event belongs to: the innermost one that was open when it was launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from attrs import frozen

from hooks.categories import kernel_families, operator_categories
from hooks.clock import TOLERANCE_NS
from hooks.columns import CODED, NONE, each_distinct, ints, is_text, take_rows
from hooks.errors import TraceError
from hooks.intervals import NEVER, innermost, match_rows, shared_codes
from hooks.nvtx_ranges import DOMAIN
from hooks.recording import ATTRIBUTED
from hooks.tables import KERNELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hooks.columns import Ints
    from hooks.recording import Recording

#: Path of the rows that belong to no module.
UNCLASSIFIED: Final = "unclassified"

#: Why an event belongs to no module. The first that holds is given.
REASONS: Final = {
    "invalid_duration": "the recording gives it no end, or one before its start; it counts with 0 ns",
    "graph_captured_before_trace": "a CUDA graph ran it, and that node's capture is not in the recording",
    "no_launch_record": "the profiler holds no launch call for it, so nothing says which code caused it",
    "clock_mismatch": "it began before the call that launched it, so the recording's times cannot be trusted there",
    "thread_not_traced": "launched from a thread on which no traced module ran",
    "outside_any_module": "launched by code outside every module: sampling, n-gram check, stopping test",
}

#: What must be known of an event although it belongs to a module.
NOTES: Final = {
    "graph_not_expanded": "a whole CUDA graph in one row, counted where it was launched; its nodes were not recorded",
}


def attribute(events: pa.Table, calls: pa.Table) -> pa.Table:
    """Give every event its call, or the reason why it has none.

    The innermost call is unique, so the assignment is exclusive by construction. An event outside every call
    belongs to the stage and step of the forward before it on its thread: what follows a forward is its sampling.

    Parameters
    ----------
    events
        Table of schema `hooks.tables.EVENTS`, all of the process that made the calls.
    calls
        Calls of one pass, schema `hooks.tables.CALLS`, in the order of their start; same clock as `events`.

    Returns
    -------
    pyarrow.Table
        Schema `hooks.tables.KERNELS`, rows in the order of `events`.
    """
    has_launch = events["launch_ns"].is_valid().to_numpy()
    launch = ints(events["launch_ns"])
    lane, at_lane = shared_codes([ints(calls["thread"])], [ints(events["launch_thread"])])
    start, end = ints(calls["start_ns"]), ints(calls["end_ns"])
    own_row = np.where(has_launch, innermost(lane, start, end, at_lane, launch), NONE)
    # Nothing follows a forward but the next one, so each is taken as open until then.
    roots = np.flatnonzero(calls["parent_call_id"].is_null().to_numpy())
    before = innermost(lane[roots], start[roots], np.full(len(roots), NEVER), at_lane, launch)
    previous_root = np.where(has_launch, np.append(roots, NONE)[before], NONE)
    reason = np.select(
        [~has_launch, ~np.isin(at_lane, lane)], ["no_launch_record", "thread_not_traced"], "outside_any_module"
    )
    own = _rows(own_row)
    # Row of the call that gives an event its stage: its own, else the forward before it.
    context = _rows(np.where(own_row != NONE, own_row, previous_root))
    columns = {name: events[name] for name in events.column_names}
    columns |= {
        "operator_category": operator_categories(events["name"]),
        "kernel_family": kernel_families(events["name"]),
        "pass": _constant(calls["pass"], events.num_rows),
        "page": pc.take(calls["page"], context),
        "stage": pc.take(calls["stage"], context).fill_null("other"),
        "step": pc.take(calls["step"], context),
        "call_id": pc.take(calls["call_id"], own),
        "module_path": pc.take(calls["module_path"], own).fill_null(UNCLASSIFIED),
        "unclassified_reason": pa.array(reason, pa.string(), mask=own_row != NONE),
    }
    return pa.table(columns, schema=KERNELS)


def attribute_to_ranges(recording: Recording, ranges: pa.Table | None = None) -> pa.Table:
    """Give every recorded event the innermost range around its launch, or the reason why it has none.

    A range counts for launches on the thread that began it, in the same process; one that was never closed counts to
    the end. Which of several is innermost is the rule of `hooks.intervals`. A node of a CUDA graph belongs to the range
    that was open when it was captured; a graph that was recorded as a whole to the range around its launch, with a
    note.

    Parameters
    ----------
    recording
        What to attribute.
    ranges
        Ranges that count (schema `hooks.recording.RANGES`), by default all of the recording's; see `ranges_of_modules`.

    Returns
    -------
    pyarrow.Table
        Schema `hooks.recording.ATTRIBUTED`, rows in the order of the events: none is lost, none is counted twice.

    Raises
    ------
    TraceError
        If there are events but no range, except where the events have counters: those are of use by themselves.
    """
    events = recording.events
    ranges = recording.ranges if ranges is None else ranges
    if events.num_rows and not ranges.num_rows and not recording.counters:
        raise TraceError(
            f"no range in this {recording.tool} recording can hold an event, so nothing can be attributed; record it "
            "with ranges around the modules (nsys profile --trace=cuda,nvtx), or leave the run out that names them"
        )
    cause = _causes(recording)
    lane, at_lane = shared_codes(
        [ints(ranges["process"]), ints(ranges["thread"])], [ints(events["process"]), cause.thread]
    )
    end = ranges["end_ns"].fill_null(NEVER).to_numpy()
    row = innermost(lane, ints(ranges["start_ns"]), end, at_lane, cause.time)
    checks = {
        "invalid_duration": np.isin(events["event_id"].to_numpy(), recording.untimed.to_numpy()),
        "graph_captured_before_trace": cause.is_node & ~cause.is_known,
        "no_launch_record": ~cause.is_known,
        "clock_mismatch": ~cause.is_node & (ints(events["start_ns"]) < cause.time - TOLERANCE_NS),
        "thread_not_traced": ~np.isin(at_lane, lane),
        "outside_any_module": row == NONE,
    }
    # The first that holds is given, so it is put last.
    first = np.full(len(row), NONE)
    for number, holds in reversed([*enumerate(checks.values())]):
        first[holds] = number
    own = np.where(first == NONE, row, NONE)
    columns = {name: events[name] for name in events.column_names}
    columns |= {
        "range_id": take_rows(ranges["range_id"], own),
        "range_name": take_rows(ranges["name"], own),
        "unclassified_reason": take_rows(pa.array([*checks], CODED), first),
        "attribution_note": each_distinct(_notes, events["kind"]),
    }
    return pa.table(columns, schema=ATTRIBUTED)


def ranges_of_modules(recording: Recording, modules: Mapping[str, str]) -> tuple[pa.Table, list[str]]:
    """Keep the ranges that are calls of modules, so that other ranges inside a module take nothing from it.

    Where the recording holds ranges of the tracer's own NVTX domain, only those can be modules: a library's range may
    have the same text by chance.

    Parameters
    ----------
    recording
        What was recorded.
    modules
        Text of a module's range to its path. The tracer's text is the path itself, and the class name for the root.

    Returns
    -------
    tuple of pyarrow.Table and list of str
        The ranges of modules (schema `hooks.recording.RANGES`), named by path; and the texts of all others, sorted.
    """
    ranges = recording.ranges
    paths = each_distinct(lambda names: [modules.get(name) for name in names], ranges["name"])
    matches = paths.is_valid()
    ours = is_text(ranges["domain"], DOMAIN).fill_null(fill_value=False)
    if pc.any(ours).as_py():
        matches = pc.and_(matches, ours)
    others = ranges["name"].filter(pc.invert(matches)).unique().to_pylist()
    place = ranges.schema.get_field_index("name")
    return ranges.set_column(place, ranges.schema.field(place), paths).filter(matches), sorted(others)


def _notes(kinds: Sequence[str]) -> list[str | None]:
    return ["graph_not_expanded" if kind == "graph" else None for kind in kinds]


@frozen(eq=False)
class _Causes:
    """Where and when the host caused each event: by its launch, or by the capture of its graph node."""

    is_node: NDArray[np.bool_]
    is_known: NDArray[np.bool_]
    thread: Ints
    time: Ints


def _causes(recording: Recording) -> _Causes:
    events, nodes = recording.events, recording.graph_nodes
    is_node = events["graph_node_id"].is_valid().to_numpy()
    is_known = events["launch_ns"].is_valid().to_numpy()
    thread, time = ints(events["launch_thread"]), ints(events["launch_ns"])
    if is_node.any():
        mine = np.flatnonzero(is_node)
        captured = _captured(nodes, ints(events["process"])[mine], ints(events["graph_node_id"])[mine])
        is_known, thread, time = is_known.copy(), thread.copy(), time.copy()
        is_known[mine] = captured != NONE
        thread[mine] = np.append(ints(nodes["thread"]), NONE)[captured]
        time[mine] = np.append(ints(nodes["start_ns"]), 0)[captured]
    return _Causes(is_node, is_known, thread, time)


def _captured(nodes: pa.Table, process: Ints, node: Ints) -> Ints:
    """Row of the node that each was cloned from, over any number of clones; -1 where that is not in the table."""
    processes, start = ints(nodes["process"]), ints(nodes["start_ns"])
    is_clone = nodes["original_node_id"].is_valid().to_numpy()
    # A clone may have a row for its creation too, which says nothing; a reused id means what it was used for last.
    priority = np.lexsort((-start, ~is_clone)).argsort()
    own, wanted = shared_codes(
        [processes, ints(nodes["graph_node_id"])],
        [np.concatenate([processes, process]), np.concatenate([ints(nodes["original_node_id"]), node])],
    )
    rows = match_rows(own, wanted, priority=priority)
    # One more row for "not there", which leads to itself, as an original does.
    leads_to = np.append(np.where(is_clone, rows[: len(own)], np.arange(len(own))), NONE)
    for _ in range(len(own).bit_length()):  # the way doubles each time; a circle never arrives
        leads_to = leads_to[leads_to]
    arrived = leads_to[rows[len(own) :]]
    return np.where(np.append(~is_clone, np.False_)[arrived], arrived, NONE)


def _rows(rows: Ints) -> pa.Array:
    """Row numbers to take, null for none."""
    return pa.array(rows, mask=rows == NONE)


def _constant(column: pa.ChunkedArray, length: int) -> pa.Array:
    values = column.unique().to_pylist()
    if len(values) != 1:
        raise ValueError(f"events are attributed to the calls of one pass, got {values}")
    return pa.repeat(pa.scalar(values[0], pa.string()), length)
