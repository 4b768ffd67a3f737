"""From the logs of the wrappers to the table of calls, with no loop over calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from attrs import frozen

from hooks.errors import TraceError
from hooks.tables import CALLS
from hooks.wrappers import NO_CONTEXT, Context, ThreadLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@frozen
class Label:
    """What the calls of a stretch of the run belong to: a pass over the workload, and the page that it reads."""

    pass_name: str = "traced"  # noqa: S105 - a pass over a workload
    page: int = 0


@frozen(eq=False)
class _Calls:
    """Calls in the order in which they were entered; -1 where there is no end, no parent or no context."""

    module: Ints
    start: Ints
    end: Ints
    parent: Ints
    context: Ints
    thread: Ints


def calls_table(
    logs: Sequence[ThreadLog],
    paths: Sequence[str],
    own_stages: Sequence[str | None],
    labels: Sequence[tuple[int, Label]],
) -> tuple[pa.Table, int]:
    """Rebuild the calls from the logs.

    A call takes stage, step and label from the nearest root call around it, or itself; outside any root call its stage
    is "other", its step null and its label the one in force when the outermost call around it began. A module with a
    stage of its own keeps that stage everywhere.

    Parameters
    ----------
    logs
        One for each thread.
    paths, own_stages
        By module index: path, and stage that the module always has (or None).
    labels
        Each label with the time from which it was in force, in order; the first from before any call.

    Returns
    -------
    tuple of pyarrow.Table and int
        The calls with the schema `hooks.tables.CALLS`, sorted by start; and how many were left out because they had not
        ended.

    Raises
    ------
    TraceError
        If a log does not add up, as after an interrupt in the middle of an entry.
    """
    contexts: list[Context] = [NO_CONTEXT]
    read = []
    calls_before = 0
    for log in logs:
        calls = _read(log, len(paths), calls_before, len(contexts))
        contexts += log.contexts
        calls_before += len(calls.start)
        read.append(calls)
    module, start, end, parent, context, thread = (
        np.concatenate([getattr(calls, name) for calls in read] or [np.empty(0, np.int64)])
        for name in ("module", "start", "end", "parent", "context", "thread")
    )
    anchor = _anchors(parent, context)
    rows = np.flatnonzero(end >= 0)
    rows = rows[np.argsort(start[rows], kind="stable")]
    call_id = np.full(len(start) + 1, -1)  # its last element, -1, is what "no parent" finds
    call_id[rows] = np.arange(len(rows))
    parent_id = call_id[parent[rows]]
    label_times = np.array([since for since, _ in labels])
    label = np.searchsorted(label_times, start[anchor[rows]], side="right") - 1
    around = np.maximum(context[anchor[rows]], 0)
    own = pa.array(own_stages, pa.string()).take(module[rows])
    columns: dict[str, Any] = {
        "call_id": np.arange(len(rows)),
        "parent_call_id": pa.array(parent_id, mask=parent_id < 0),
        "pass": pa.array([name.pass_name for _, name in labels]).take(label),
        "page": np.array([name.page for _, name in labels])[label],
        "stage": pc.coalesce(own, pa.array([stage for stage, _ in contexts]).take(around)),
        "step": pa.array([step for _, step in contexts], pa.int64()).take(around),
        "module_path": pa.array(paths, pa.string()).take(module[rows]),
        "thread": thread[rows],
        "start_ns": start[rows],
        "end_ns": end[rows],
    }
    return pa.table(columns, schema=CALLS), len(start) - len(rows)


def _read(log: ThreadLog, module_count: int, calls_before: int, contexts_before: int) -> _Calls:
    """Rebuild one thread's calls; their numbers and contexts follow those of the threads before."""
    entries = log.entries[:]  # one step for the interpreter: the thread may still be writing
    pairs = np.array(entries[: len(entries) // 2 * 2], np.int64).reshape(-1, 2)
    mark, time = pairs[:, 0], pairs[:, 1]
    if np.any((mark < -module_count) | (mark >= module_count + len(log.contexts))):
        raise _inconsistent(log)
    enters = mark >= 0
    depth = np.cumsum(np.where(enters, 1, -1))
    depth -= np.minimum(np.minimum.accumulate(depth), 0)  # below zero end the calls that were open at a clear()
    level = np.where(enters, depth - 1, depth)

    # Within a level, calls do not overlap: each is followed by its own end, if it has one.
    order = np.argsort(level, kind="stable")
    ends = enters[order][:-1] & ~enters[order][1:]
    entered, left = order[:-1][ends], order[1:][ends]
    module = np.where(mark < module_count, mark, 0)
    if np.any(mark[left] != ~module[entered]):
        raise _inconsistent(log)
    end = np.full(len(mark), -1)
    end[entered] = time[left]

    number = np.cumsum(enters) - 1 + calls_before
    calls = order[enters[order]]
    keys = level[calls] * len(mark) + calls  # ascending; the parent is the last call before, one level up
    parent = np.full(len(mark), -1)
    above = np.searchsorted(keys, keys - len(mark)) - 1
    nested = level[calls] > 0
    parent[calls[nested]] = number[calls[above[nested]]]
    return _Calls(
        module=module[enters],
        start=time[enters],
        end=end[enters],
        parent=parent[enters],
        context=np.where(mark < module_count, -1, mark - module_count + contexts_before)[enters],
        thread=np.full(int(enters.sum()), log.thread),
    )


def _anchors(parent: Ints, context: Ints) -> Ints:
    """Find, for each call, the nearest root call around it or itself, or else the outermost call."""
    itself = np.arange(len(parent))
    anchor = np.where((context >= 0) | (parent < 0), itself, parent)
    while np.any(anchor != (further := anchor[anchor])):  # the way doubles each time
        anchor = further
    return anchor


def _inconsistent(log: ThreadLog) -> TraceError:
    return TraceError(
        f"The log of thread {log.thread} does not add up: an interrupt fell into an entry, or the log was cleared "
        "during a call. Call clear() and trace again."
    )
