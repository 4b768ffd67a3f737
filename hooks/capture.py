"""What the device ran, through torch.profiler: ATen operators on a CPU, kernels and copies on CUDA."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final, Self

import attrs
import numpy as np
import pyarrow as pa
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from hooks.clock import ClockAlignment, Marker, align
from hooks.errors import TraceError
from hooks.tables import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

#: What both clocks see, by device type: the cheapest event that a model hardly ever causes itself.
_MARKERS: Final = {"cpu": "aten::special_i1e", "cuda": "cudaDeviceSynchronize"}
_MARKERS_PER_GROUP: Final = 24
#: How far two reads of the operating system's clocks may be off; to tell markers from events of the same name.
_ROUGH_NS: Final = 1_000_000


class EventCapture:
    """Records what runs inside its windows.

    ``with EventCapture(device) as capture:`` starts the profiler; ``with capture.window():`` inside it marks the
    code whose events are kept. After the outer block, `events` holds them on the host's clock.

    Parameters
    ----------
    device
        A CPU yields ``cpu_op`` rows with self times, CUDA yields ``kernel``, ``memcpy`` and ``memset`` rows.

    Attributes
    ----------
    events
        Table of schema `hooks.tables.EVENTS`, set when the block ends.
    clock
        How the profiler's clock was aligned, set when the block ends.
    outside_windows
        Events that the profiler saw outside every window; they are not in `events`.
    """

    events: pa.Table
    clock: ClockAlignment
    outside_windows: int

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # With CPU activity on, CUDA runs would pay for every ATen operator too: decode is host-bound, it would slow.
        activity = ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU
        self._profile = profile(
            activities=[activity], experimental_config=_ExperimentalConfig(profile_all_threads=not self._cuda)
        )
        self._marker = _MARKERS[device.type]
        self._touch = functools.partial(torch.cuda.synchronize, device) if self._cuda else _touch_cpu
        self._readings: list[list[tuple[int, int]]] = []
        self._windows: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        with _without_profiler_chatter():
            self._profile.start()
        self._mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._mark()
        with _without_profiler_chatter():
            self._profile.stop()
        if error is None:
            self._read()

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Keep the events that the code inside launches."""
        self._mark()
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            if self._cuda:
                # By its stream: synchronising the device is what a marker does.
                torch.cuda.current_stream().synchronize()
            self._windows.append((start, time.perf_counter_ns()))

    def _mark(self) -> None:
        readings = []
        for _ in range(_MARKERS_PER_GROUP):
            before = time.perf_counter_ns()
            self._touch()
            readings.append((before, time.perf_counter_ns()))
        self._readings.append(readings)

    def _read(self) -> None:
        results = self._profile.profiler
        if results is None or results.kineto_results is None:
            raise TraceError("the profiler returned no result; run it again")
        raw = results.kineto_results.events()
        self.clock = align(self._clock_markers(raw))
        events = _cuda_events(raw) if self._cuda else _cpu_events(raw)
        self.events = _table(events, self.clock, self._windows)
        if not self.events.num_rows:
            what = "CUDA activity (is another profiler attached?)" if self._cuda else "operator"
            raise TraceError(f"the profiler recorded no {what}, so nothing can be attributed")
        markers = 0 if self._cuda else sum(len(group) for group in self._readings)
        self.outside_windows = len(events) - markers - self.events.num_rows

    def _clock_markers(self, raw: list[Any]) -> list[list[Marker]]:
        """Pair the markers that the profiler saw with the readings around them, in time order."""
        offset = time.time_ns() - time.perf_counter_ns()
        spans = [(group[0][0] + offset, group[-1][1] + offset) for group in self._readings]
        # The profiled code may do what a marker does: keep what lies where markers were taken.
        seen = sorted(
            (event.start_ns(), event.end_ns())
            for event in raw
            if event.name() == self._marker
            and any(first - _ROUGH_NS < event.start_ns() < last + _ROUGH_NS for first, last in spans)
        )
        taken = sum(len(group) for group in self._readings)
        if len(seen) != taken:
            raise TraceError(f"the profiler recorded {len(seen)} of {taken} clock markers; run it again")
        events = iter(seen)
        return [[Marker(*reading, *next(events)) for reading in group] for group in self._readings]


@attrs.frozen
class _Event:
    """One row to be, its times on the profiler's clock."""

    kind: str
    name: str
    start_ns: int
    duration_ns: int
    device: str
    stream: int | None
    launch_ns: int | None
    launch_thread: int | None
    correlation_id: int | None


def _cpu_events(raw: list[Any]) -> list[_Event]:
    """Operators with self time: what a row's children took is theirs."""
    operators = [event for event in raw if not event.is_user_annotation() and not event.is_python_function()]
    operators.sort(key=lambda event: (event.device_resource_id(), event.start_ns(), -event.end_ns()))
    spans = [(event.device_resource_id(), event.start_ns(), event.end_ns()) for event in operators]
    return [
        _Event(
            kind="cpu_op",
            name=event.name(),
            start_ns=start,
            duration_ns=own,
            device="cpu",
            stream=None,
            launch_ns=start,
            launch_thread=thread,
            correlation_id=event.correlation_id(),
        )
        for event, (thread, start, _), own in zip(operators, spans, self_times(spans), strict=True)
    ]


def self_times(spans: list[tuple[int, int, int]]) -> list[int]:
    """Duration of each span without its children.

    Parameters
    ----------
    spans
        (thread, start, end), sorted by thread, then start, then end descending.

    Returns
    -------
    list of int
        Self times in the unit of `spans`; on each thread they add up to the time covered by its outermost spans.
    """
    own = [end - start for _, start, end in spans]
    stack: list[int] = []
    for index, (thread, start, end) in enumerate(spans):
        while stack and (spans[stack[-1]][0] != thread or spans[stack[-1]][2] <= start):
            stack.pop()
        if stack:
            own[stack[-1]] -= min(end, spans[stack[-1]][2]) - start
        stack.append(index)
    return own


def _cuda_events(raw: list[Any]) -> list[_Event]:
    """Kernels, copies and sets, each with the runtime call of the same correlation id that launched it."""
    on_device = [e for e in raw if e.device_type().name == "CUDA" and not e.is_user_annotation()]
    launches = {
        event.correlation_id(): (event.start_ns(), event.device_resource_id())
        for event in raw
        if event.device_type().name == "CPU" and event.name().startswith("cu")
    }
    events = []
    for event in on_device:
        launch = launches.get(event.correlation_id())
        events.append(
            _Event(
                kind=_cuda_kind(event.name()),
                name=event.name(),
                start_ns=event.start_ns(),
                duration_ns=event.duration_ns(),
                device=f"cuda:{event.device_index()}",
                stream=event.device_resource_id(),
                launch_ns=None if launch is None else launch[0],
                launch_thread=None if launch is None else launch[1],
                correlation_id=event.correlation_id(),
            )
        )
    return events


def _cuda_kind(name: str) -> str:
    if name.startswith("Memcpy"):
        return "memcpy"
    return "memset" if name.startswith("Memset") else "kernel"


def _table(events: list[_Event], clock: ClockAlignment, windows: list[tuple[int, int]]) -> pa.Table:
    """Events launched inside a window, on the host's clock and in its order."""
    start = clock.to_host(np.asarray([event.start_ns for event in events], np.int64))
    has_launch = np.asarray([event.launch_ns is not None for event in events])
    launch = clock.to_host(
        np.asarray([event.start_ns if event.launch_ns is None else event.launch_ns for event in events], np.int64)
    )
    opened = np.asarray([window[0] for window in windows], np.int64)
    closed = np.asarray([window[1] for window in windows], np.int64)
    window = np.searchsorted(opened, launch, side="right") - 1
    kept = (window >= 0) & (launch <= closed[window]) if len(windows) else np.zeros(len(events), bool)
    order = np.flatnonzero(kept)
    order = order[np.argsort(start[order], kind="stable")]
    chosen = [events[index] for index in order]
    return pa.table(
        {
            "event_id": np.arange(len(chosen)),
            "kind": [event.kind for event in chosen],
            "name": [event.name for event in chosen],
            "start_ns": start[order],
            "duration_ns": [event.duration_ns for event in chosen],
            "device": [event.device for event in chosen],
            "stream": [event.stream for event in chosen],
            "launch_ns": pa.array(launch[order], mask=~has_launch[order]),
            "launch_thread": [event.launch_thread for event in chosen],
            "process": np.full(len(chosen), os.getpid()),
            "correlation_id": [event.correlation_id for event in chosen],
            "graph_node_id": pa.nulls(len(chosen), pa.int64()),
        },
        schema=EVENTS,
    )


_PROBE: Final = torch.ones(1)


def _touch_cpu() -> None:
    torch.special.i1e(_PROBE)


@contextlib.contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Drop the tracepoint lines that some torch builds print on standard error when profiling starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            kept = b"".join(line for line in caught if not line.startswith(b"USDT:"))
            os.write(2, kept)
