"""A pass of a run as a Chrome trace, which Perfetto and chrome://tracing open.

The categories are those of torch.profiler's traces, so that what reads those reads this too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from analytic.errors import InputError
from dsocr_trace.exports.tables import rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from dsocr_trace.runs.store import Run

    Row = dict[str, Any]
    Place = tuple[int, int]

#: What is shown where nothing else is asked for: the only pass that has kernels.
PROFILED: Final = "profiled"
_CPU_OPERATOR: Final = "cpu_op"
_CATEGORIES: Final = {"kernel": "kernel", "memcpy": "gpu_memcpy", "memset": "gpu_memset"}
_HOST: Final = 1
_FIRST_DEVICE: Final = 2
#: Tracks of events that overlap others of their stream; no stream has such a number.
_FIRST_EXTRA_TRACK: Final = 1 << 20
_NEVER: Final = np.iinfo(np.int64).max


def perfetto_trace(run: Run, pass_name: str = PROFILED) -> str:
    """Write a pass as JSON of the Trace Event Format.

    Every forward call is a slice on the track of its thread, named by its module path, inside a slice that names stage
    and step. Device events are slices on the track of their stream, with an arrow from their launch; CPU operators are
    slices inside their calls, as long as their self time.

    Parameters
    ----------
    run
        What to export.
    pass_name
        A pass of the run's calls: ``profiled`` has the events, ``traced`` the undisturbed times of all steps.

    Raises
    ------
    InputError
        If the run has no such pass.
    """
    all_calls, classes = rows(run, "calls"), {row["module_path"]: row["module_class"] for row in rows(run, "modules")}
    calls = sorted((row for row in all_calls if row["pass"] == pass_name), key=lambda row: row["start_ns"])
    if not calls:
        passes = ", ".join(dict.fromkeys(row["pass"] for row in all_calls)) or "none, as it has no calls"
        raise InputError(f"{run.path} has no pass {pass_name!r}; its passes are {passes}; choose one with --pass")
    events = sorted((row for row in rows(run, "kernels") if row["pass"] == pass_name), key=lambda row: row["start_ns"])
    operators = [row for row in events if row["kind"] == _CPU_OPERATOR]
    on_device = [row for row in events if row["kind"] != _CPU_OPERATOR]
    shown = [
        *_threads(run.path.resolve().name, calls, operators),
        *_call_slices(calls, classes),
        *_operator_slices(operators, calls),
        *_device_tracks(on_device),
    ]
    manifest = run.manifest
    about = {
        "run": run.path.resolve().name,
        "pass": pass_name,
        "workload": manifest["workload"]["id"],
        "device": manifest["device"]["name"],
    }
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in shown)
    return f'{{"displayTimeUnit":"ns","otherData":{json.dumps(about)},"traceEvents":[\n{lines}\n]}}\n'


def _threads(run_id: str, calls: Sequence[Row], operators: Sequence[Row]) -> Iterator[Row]:
    yield _named("process_name", f"{run_id}: host", (_HOST, 0))
    for thread in sorted({row["thread"] for row in calls} | {row["launch_thread"] for row in operators}):
        yield _named("thread_name", f"modules of thread {thread}", (_HOST, thread))


def _call_slices(calls: Sequence[Row], classes: dict[str, str]) -> Iterator[Row]:
    stage_of = {row["call_id"]: row["stage"] for row in calls}
    for row in calls:
        path, stage = row["module_path"], row["stage"]
        span = (_HOST, row["thread"]), row["start_ns"], row["end_ns"] - row["start_ns"]
        if stage_of.get(row["parent_call_id"]) != stage:
            title = f"{stage} step {row['step']}" if stage == "decode" else stage
            yield _slice("stage", title, *span, page=row["page"])
        known = {name: row[name] for name in ("call_id", "stage", "step")}
        yield _slice("user_annotation", path or classes[path], *span, module_class=classes[path], **known)


def _operator_slices(operators: Sequence[Row], calls: Sequence[Row]) -> Iterator[Row]:
    """Slices of CPU operators, thread by thread.

    Only self times are recorded, so an operator that calls others is not around them but before them.
    """
    bounds: dict[int, list[int]] = defaultdict(list)
    of_thread: dict[int, list[Row]] = defaultdict(list)
    for row in calls:
        bounds[row["thread"]] += [row["start_ns"], row["end_ns"]]
    for row in operators:
        of_thread[row["launch_thread"]].append(row)
    for thread, mine in of_thread.items():
        start, duration = (np.array([row[name] for row in mine], np.int64) for name in ("start_ns", "duration_ns"))
        limits = np.array([*sorted(bounds[thread]), _NEVER])
        begun = _one_after_the_other(start, duration, limits[np.searchsorted(limits, start, side="right")])
        for row, start_ns in zip(mine, begun.tolist(), strict=True):
            yield _event_slice(_CPU_OPERATOR, row, (_HOST, thread), start_ns)


def _one_after_the_other(
    start: NDArray[np.int64], duration: NDArray[np.int64], limit: NDArray[np.int64]
) -> NDArray[np.int64]:
    """When each of the operators of a thread begins so that none overlaps another.

    As early as it began and the one before has ended. That way all are done whenever the thread really was, but for
    the error of the clocks; what would pass the call's end by it begins that much earlier.

    Parameters
    ----------
    start, duration
        When each began, ascending, and its self time (n,) ns.
    limit
        When the call around it, or the stretch between two calls, ended (n,) ns.
    """
    done = np.cumsum(duration)
    end = done + np.maximum.accumulate(start - (done - duration))
    end = done + np.minimum.accumulate((np.minimum(end, limit) - done)[::-1])[::-1]
    begun: NDArray[np.int64] = end - duration
    return begun


def _device_tracks(events: Sequence[Row]) -> Iterator[Row]:
    """Slices of device events with the names of their tracks, the launches on the host, and how many are under way."""
    by_device: dict[str, list[Row]] = defaultdict(list)
    for row in events:
        by_device[row["device"]].append(row)
    flows: dict[tuple[int, int, int | None], int] = {}
    for number, (device, mine) in enumerate(sorted(by_device.items())):
        process = _FIRST_DEVICE + number
        yield _named("process_name", device, (process, 0))
        tracks = _stream_tracks(mine)
        for track, title in dict.fromkeys(tracks):
            yield _named("thread_name", title, (process, track))
        for row, (track, _) in zip(mine, tracks, strict=True):
            where = {
                "device": int(device.rpartition(":")[2]),
                "stream": row["stream"],
                "correlation": row["correlation_id"],
            }
            shown = _event_slice(_CATEGORIES[row["kind"]], row, (process, track), row["start_ns"], **where)
            if row["launch_ns"] is not None:
                launch = row["launch_thread"], row["launch_ns"], row["correlation_id"]
                shown |= {"bind_id": flows.setdefault(launch, len(flows) + 1), "flow_in": True}
            yield shown
        yield from _under_way(mine, process)
    for (thread, launch_ns, correlation), flow in flows.items():
        launched = _slice("cuda_runtime", "launch", (_HOST, thread), launch_ns, 0, correlation=correlation)
        yield launched | {"bind_id": flow, "flow_out": True}


def _stream_tracks(events: Iterable[Row]) -> list[tuple[int, str]]:
    """Number and title of the track of each event, which are in the order of their start.

    A track holds events that do not overlap: viewers drop what overlaps without being nested, and kernels of one stream
    can overlap where the next is launched early.
    """
    ends: dict[int | None, list[int]] = defaultdict(list)
    extra: dict[tuple[int | None, int], int] = {}
    tracks = []
    for row in events:
        stream, lanes = row["stream"], ends[row["stream"]]
        lane = next((lane for lane, end in enumerate(lanes) if end <= row["start_ns"]), len(lanes))
        lanes[lane : lane + 1] = [row["start_ns"] + row["duration_ns"]]
        title = "no stream" if stream is None else f"stream {stream}"
        if stream is None or lane:
            number = extra.setdefault((stream, lane), _FIRST_EXTRA_TRACK + len(extra))
            tracks.append((number, f"{title}, at the same time {lane}" if lane else title))
        else:
            tracks.append((stream, title))
    return tracks


def _under_way(events: Iterable[Row], process: int) -> Iterator[Row]:
    """How many events of a device are launched and not finished: near one where the device waits for the host."""
    known = [row for row in events if row["launch_ns"] is not None]
    steps = sorted(
        [(row["launch_ns"], 1) for row in known] + [(row["start_ns"] + row["duration_ns"], -1) for row in known]
    )
    counts = accumulate(step for _, step in steps)
    for (at_ns, _), count in zip(steps, counts, strict=True):
        yield {
            "ph": "C",
            "name": "launched, not finished",
            "pid": process,
            "ts": at_ns / 1000,
            "args": {"events": count},
        }


def _event_slice(category: str, row: Row, place: Place, start_ns: int, **args: Any) -> Row:
    names = ("event_id", "stage", "step", "module_path", "call_id", "operator_category", "unclassified_reason")
    return _slice(
        category, row["name"], place, start_ns, row["duration_ns"], **{name: row[name] for name in names}, **args
    )


def _slice(category: str, name: str, place: Place, start_ns: int, duration_ns: int, **args: Any) -> Row:
    """A slice; the format counts in microseconds, of which three decimals are exact."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": place[0],
        "tid": place[1],
        "ts": start_ns / 1000,
        "dur": duration_ns / 1000,
        "args": {name: value for name, value in args.items() if value is not None},
    }


def _named(what: str, name: str, place: Place) -> Row:
    return {"ph": "M", "name": what, "pid": place[0], "tid": place[1], "args": {"name": name}}
