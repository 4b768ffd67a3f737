"""What is kept of a torch.profiler trace while its events stream by: rows of integers, and the names once each."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from hooks.columns import Ints

    Columns = dict[str, Ints]

_MODULE_PREFIX: Final = "nn.Module: "
#: In 2021 the steps of the profiler's schedule were written as operators.
_STEP_PREFIX: Final = "ProfilerStep#"
#: Stands for null among the integers; no time or id comes near it.
ABSENT: Final = int(np.iinfo(np.int64).min)
#: Times from it on (146 years) are damage; the sum of two below it fits 64 bits.
LAST_NS: Final = 1 << 62
#: Codes of the columns ``kind`` and ``style``.
KINDS: Final = ("kernel", "memcpy", "memset")
STYLES: Final = ("module", "push_pop")


@attrs.frozen
class _Table:
    """Rows of integers, eight bytes a cell: a file of 1 GB holds millions of rows."""

    fields: tuple[str, ...]
    cells: array[int] = attrs.field(factory=lambda: array("q"))

    def add(self, *row: int) -> None:
        # All or nothing, where `extend` would leave half a row behind.
        self.cells.fromlist(list(row))

    def columns(self) -> Columns:
        table = np.frombuffer(self.cells, np.int64).reshape(-1, len(self.fields))
        return dict(zip(self.fields, table.T, strict=True))


class KinetoRows:
    """What is kept of the events, filled one at a time."""

    def __init__(self) -> None:
        self.device_events = _Table(
            ("kind", "name", "start", "end", "device", "stream", "process", "correlation", "graph_node")
        )
        self.launches = _Table(("process", "thread", "start", "correlation"))
        self.operators = _Table(("name", "process", "thread", "start", "end"))
        self.ranges = _Table(("style", "name", "process", "thread", "start", "end"))
        self._names: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._refused = 0
        # The capitalised categories were written in 2021 and early 2022.
        self._readers: dict[str, Callable[[dict[str, Any]], None]] = {
            "kernel": self._add_device_event,
            "Kernel": self._add_device_event,
            "gpu_memcpy": self._add_device_event,
            "Memcpy": self._add_device_event,
            "gpu_memset": self._add_device_event,
            "Memset": self._add_device_event,
            "cuda_runtime": self._add_launch,
            "cuda_driver": self._add_launch,
            "Runtime": self._add_launch,
            "cpu_op": self._add_operator,
            "Operator": self._add_operator,
            "python_function": self._add_python_function,
            "user_annotation": self._add_annotation,
        }

    @property
    def names(self) -> list[str]:
        """Names in the order of their codes."""
        return list(self._names)

    def add(self, event: Any) -> None:
        """Keep what is of use of one element of ``traceEvents``."""
        try:
            reader = self._readers.get(event.get("cat")) if event.get("ph") == "X" else None
            if reader is not None:
                reader(event)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            self._refused += 1

    def notes(self) -> list[str]:
        """Say what was refused, and what is not there."""
        notes = []
        if self._refused:
            notes.append(
                f"{self._refused} trace events were left out: a time, duration, name or id is missing or wrong."
            )
        columns = self.ranges.columns()
        still_open = np.count_nonzero(columns["end"] == ABSENT)
        if still_open:
            notes.append(f"{still_open} ranges have no duration: they are taken as open until the recording ended.")
        if not np.any(columns["style"] == STYLES.index("module")):
            notes.append("The file holds no nn.Module calls; profile with with_stack=True to record them.")
        return notes

    def _add_device_event(self, event: dict[str, Any]) -> None:
        args = event.get("args", {})
        device = args.get("device", event.get("pid"))
        kind = event["cat"].lower().removeprefix("gpu_")
        self.device_events.add(
            KINDS.index(kind),
            self._name(event["name"]),
            *_span(event),
            device,
            args.get("stream", ABSENT),
            # Kineto puts the device where other rows have the process; a file merged from several may not.
            ABSENT if event.get("pid") == device else self._identity(event["pid"]),
            args.get("correlation", ABSENT),
            args.get("graph node id", 0),
        )

    def _add_launch(self, event: dict[str, Any]) -> None:
        correlation = event.get("args", {}).get("correlation")
        if correlation is not None:
            self.launches.add(*self._place(event), _ns(event["ts"]), correlation)

    def _add_operator(self, event: dict[str, Any]) -> None:
        if event["name"].startswith(_STEP_PREFIX):
            self._add_annotation(event)
        else:
            self.operators.add(self._name(event["name"]), *self._place(event), *_span(event))

    def _add_python_function(self, event: dict[str, Any]) -> None:
        name = event["name"]
        if name.startswith(_MODULE_PREFIX):
            self._add_range("module", name.removeprefix(_MODULE_PREFIX), event)

    def _add_annotation(self, event: dict[str, Any]) -> None:
        self._add_range("push_pop", event["name"], event)

    def _add_range(self, style: str, name: str, event: dict[str, Any]) -> None:
        start, end = _span(event)
        if "dur" in event and end == ABSENT:
            raise ValueError(event["dur"])
        self.ranges.add(STYLES.index(style), self._name(name), *self._place(event), start, end)

    def _name(self, name: str) -> int:
        if not isinstance(name, str):
            raise TypeError(name)
        return self._names.setdefault(name, len(self._names))

    def _place(self, event: dict[str, Any]) -> tuple[int, int]:
        """Process and thread."""
        return self._identity(event["pid"]), self._identity(event["tid"])

    def _identity(self, value: int | str) -> int:
        """Read an id; a label, as files of several ranks hold, becomes a number of its own below -1."""
        if not isinstance(value, str):
            return value
        return int(value) if value.isdecimal() else -2 - self._labels.setdefault(value, len(self._labels))


def _span(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end in ns, the end absent where the duration is missing or negative."""
    start = _ns(event["ts"])
    duration = _ns(event.get("dur", -1))
    if start + duration >= LAST_NS:
        raise ValueError(duration)
    return start, ABSENT if duration < 0 else start + duration


def _ns(microseconds: Any) -> int:
    """Convert without loss: the parser gives integers or decimals, never floats."""
    if isinstance(microseconds, str | bool) or not abs(microseconds) < LAST_NS // 1000:
        raise ValueError(microseconds)
    nanoseconds: int = round(microseconds * 1000)
    return nanoseconds
