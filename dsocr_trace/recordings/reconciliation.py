"""What Nsight Systems recorded of a generation beside what this tool itself saw of it: call by call, event by event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pandas as pd

from hooks.attribution import ranges_of_modules
from hooks.columns import plain
from hooks.errors import TraceError
from hooks.intervals import NEVER
from hooks.modules import is_within
from stage_runners.stage1 import VISION_SUBTREES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from hooks.recording import Recording

_CALL: Final = ["page", "stage", "step", "parent_path", "module_path"]
_MODULE: Final = ["stage", "module_path"]
_PLACE: Final = ["page", "stage", "step", "module_path"]
#: Shares of the events, and of the time, that both sides must have in the same place before one may speak for the
#: other. Counts repeat; times do not, as a profiler that watches more slows down more.
LEAST_EVENTS: Final = 0.99
LEAST_TIME: Final = 0.95
#: Stands for the caller of a root.
_OUTSIDE: Final = "<outside>"


def module_ranges(recording: Recording, modules: pd.DataFrame) -> pa.Table:
    """Keep the ranges of modules, named by path.

    Parameters
    ----------
    recording
        What was recorded.
    modules
        The run's table ``modules``.

    Raises
    ------
    TraceError
        If there is none, as with a version of the nvtx package that this profiler does not hear.
    """
    ranges, _ = ranges_of_modules(recording, module_names(modules))
    if not ranges.num_rows:
        raise TraceError(
            f"{recording.tool} {recording.version} recorded no range of any module: the installed nvtx package may be "
            "silent under it (0.2.12 and later are, under Nsight Systems before 2024); run: pip install nvtx==0.2.11"
        )
    return ranges


def module_names(modules: pd.DataFrame) -> dict[str, str]:
    """Text of each module's range, and the module's path."""
    return {path or row_class: path for path, row_class in zip(modules.module_path, modules.module_class, strict=True)}


def recorded_calls(ranges: pa.Table, forwards: Sequence[int]) -> pd.DataFrame:
    """Read the calls out of the ranges: who called whom by their nesting, stage and step by the order of the forwards.

    Parameters
    ----------
    ranges
        Ranges of modules, named by path.
    forwards
        How many forwards of the root each page took; the first of each is its prefill.

    Returns
    -------
    pandas.DataFrame
        One row for each range: ``range_id``, ``page``, ``stage``, ``step``, ``parent_path`` (missing for a root) and
        ``module_path``.

    Raises
    ------
    TraceError
        If ranges overlap without being nested, or there are other forwards than expected.
    """
    frame = plain(ranges).to_pandas()
    frame["end_ns"] = ranges["end_ns"].fill_null(NEVER).to_numpy()
    frame = frame.sort_values(["start_ns", "end_ns"], ascending=[True, False], kind="stable", ignore_index=True)
    parent, root = nesting(frame)
    paths = frame["name"].to_numpy()
    steps = [(page, step) for page, count in enumerate(forwards) for step in range(count)]
    roots = np.flatnonzero(parent < 0)
    if len(roots) != len(steps) or (paths[roots] != "").any():
        raise TraceError(
            f"the recording holds {len(roots)} outermost calls where the generation makes {len(steps)} forwards: "
            "it is cut off, or a module runs on a thread of its own"
        )
    page, step = np.array(steps)[np.searchsorted(roots, root)].T
    subtrees = {path: any(is_within(path, one) for one in VISION_SUBTREES) for path in set(paths)}
    is_vision = np.array([subtrees[path] for path in paths])
    return pd.DataFrame(
        {
            "range_id": frame["range_id"],
            "page": page,
            "stage": np.select([is_vision, step == 0], ["vision", "prefill"], "decode"),
            "step": step,
            "parent_path": np.where(parent < 0, None, paths[parent]),
            "module_path": paths,
        }
    )


def nesting(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Row of the range around each, -1 for none; and row of the outermost.

    Parameters
    ----------
    frame
        ``name``, ``process``, ``thread``, ``start_ns`` and ``end_ns``, by start; of those that start together the
        longest first.

    Raises
    ------
    TraceError
        If ranges overlap without being nested.
    """
    parent, root = np.full(len(frame), -1), np.arange(len(frame))
    stacks: dict[tuple[int, int], list[int]] = {}
    start, end = frame["start_ns"].to_numpy(), frame["end_ns"].to_numpy()
    for row, lane in enumerate(zip(frame["process"], frame["thread"], strict=True)):
        stack = stacks.setdefault(lane, [])
        while stack and end[stack[-1]] <= start[row]:
            stack.pop()
        if stack:
            parent[row], root[row] = stack[-1], stack[0]
            if end[row] > end[stack[-1]]:
                raise TraceError(f"the range {frame['name'][row]!r} ends after the one around it: the file is damaged")
        stack.append(row)
    return parent, root


def compared_calls(calls: pd.DataFrame, recorded: pd.DataFrame) -> pd.DataFrame:
    """Put calls and ranges side by side.

    Parameters
    ----------
    calls
        The run's calls of the traced pass.
    recorded
        From `recorded_calls`.

    Returns
    -------
    pandas.DataFrame
        One row for each stage and module: ``calls``, ``ranges``, and ``agrees`` where every page and step has as many
        of both from every caller.
    """
    paths = calls.set_index("call_id")["module_path"]
    ours = calls.assign(parent_path=calls["parent_call_id"].map(paths))
    counts = [
        frame.fillna({"parent_path": _OUTSIDE}).groupby(_CALL).size().rename(name)
        for name, frame in (("calls", ours), ("ranges", recorded))
    ]
    both = pd.concat(counts, axis=1).fillna(0).astype("int64").reset_index()
    both["agrees"] = both["calls"] == both["ranges"]
    how = {"calls": "sum", "ranges": "sum", "agrees": "all"}
    return both.groupby(_MODULE, sort=False).agg(how).reset_index()


@attrs.frozen(eq=False)
class Reconciliation:
    """How far two accounts of the same forwards agree.

    Attributes
    ----------
    modules
        One row per (stage, module): ``our_events``, ``their_events`` and, where both are timed, ``our_ns``,
        ``their_ns``; ``agrees`` where the counts are equal in each page and step.
    event_share
        Share of the events of the larger account that stand in the same page, stage, step and module in both; None
        where there are none.
    time_share
        Share of the time that does, each account's whole being 1; None where one is not timed.
    withheld
        Why neither may speak for the other, with the figure; None if they agree.
    """

    modules: pd.DataFrame
    event_share: float | None
    time_share: float | None
    withheld: str | None


def reconcile(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    *,
    least_events: float = LEAST_EVENTS,
    least_time: float = LEAST_TIME,
    what: str = "events",
) -> Reconciliation:
    """Compare two accounts of the same forwards, place by place.

    Parameters
    ----------
    ours, theirs
        One row per event (or call): ``stage``, ``step``, ``module_path``; in both or in none ``page`` and
        ``duration_ns``. What belongs to no module counts as a module of the name ``unclassified``.
    least_events, least_time
        Shares below which the verdict is withheld.
    what
        What the rows are called.
    """
    place = [name for name in _PLACE if name in ours and name in theirs]
    timed = "duration_ns" in ours and "duration_ns" in theirs
    sums = []
    for frame in (ours, theirs):
        grouped = frame.assign(ns=frame["duration_ns"] if timed else 0).groupby(place, dropna=False, sort=False)["ns"]
        sums.append(grouped.agg(["size", "sum"]))
    both = pd.concat(sums, axis=1, keys=["our", "their"]).fillna(0).astype("int64")
    both.columns = ["our_events", "our_ns", "their_events", "their_ns"]
    both["agrees"] = both["our_events"] == both["their_events"]
    event_share = _in_both(both["our_events"], both["their_events"])
    time_share = _in_both(*(both[name] / (both[name].sum() or 1) for name in ("our_ns", "their_ns"))) if timed else None
    how = dict.fromkeys(["our_events", "their_events", *(["our_ns", "their_ns"] if timed else [])], "sum")
    return Reconciliation(
        modules=both.reset_index().groupby(_MODULE, sort=False).agg(how | {"agrees": "all"}).reset_index(),
        event_share=event_share,
        time_share=time_share,
        withheld=_withheld((event_share, least_events, what), (time_share, least_time, "time")),
    )


def _in_both(ours: pd.Series, theirs: pd.Series) -> float | None:
    whole = max(ours.sum(), theirs.sum())
    return float(np.minimum(ours, theirs).sum() / whole) if whole else None


def _withheld(events: tuple[float | None, float, str], time: tuple[float | None, float, str]) -> str | None:
    if events[0] is None:
        return "there is nothing to compare"
    low = [(share, least, what) for share, least, what in (events, time) if share is not None and share < least]
    if not low:
        return None
    return ", ".join(f"{share:.2%} of the {what} in the same place, {least:.0%} needed" for share, least, what in low)
