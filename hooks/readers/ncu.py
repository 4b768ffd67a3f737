"""Nsight Compute results: the CSV of its raw or details page, and reports that its own ``ncu`` turns into one."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
import os
import re
import shutil
import subprocess
from array import array
from decimal import Decimal
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooks.errors import TraceError
from hooks.recording import RANGES, Recording
from hooks.tables import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_REPORT_SUFFIX: Final = ".ncu-rep"
_NVTX_COLUMN: Final = "Push/Pop_Range"
_DEFAULT_DOMAIN: Final = "<default domain>"
#: Fields of an NVTX range after its name: payload type and value, colour type and value, message type and value.
_FIELDS_AFTER_NAME: Final = 6
#: Alike for one launch; the first that a file holds is taken.
_DURATIONS: Final = (
    *(f"gpu__time_duration.{statistic}" for statistic in ("sum", "avg", "max", "min")),
    "GPU Speed Of Light Throughput: Duration",
)
#: Floats hold every integer up to here: 104 days.
_LONGEST_NS: Final = 1 << 53
_ERROR: Final = "==ERROR=="
_REFUSED_BY_DRIVER: Final = "ERR_NVGPUCTRPERM"
#: Powers of ten. Nsight Compute's prefixes are decimal for bytes too.
_PREFIXES: Final = {"n": -9, "u": -6, "m": -3, "": 0, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_SCALED_UNIT: Final = re.compile(r"([numKMGTP]?)(byte|second|s|hz)")
_NUMBER: Final = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d{1,3})?", re.IGNORECASE)
_INTEGER: Final = re.compile(r"[0-9]{1,18}")
_IDENTITY: Final = {"ID", "Process ID", "Kernel Name"}

#: Process and launch id.
_Key = tuple[str, str]


def read_ncu(path: Path, *, ncu: Path | None = None) -> Recording:
    """Read what Nsight Compute measured.

    Nsight Compute runs each kernel alone and several times, so its file holds no times but durations. ``start_ns`` and
    ``launch_ns`` therefore only put the launches in their order, and lie inside the ranges that were open at each.
    Launches that follow each other under the same names count as one range.

    Parameters
    ----------
    path
        A CSV (``ncu --csv --page raw`` or ``--page details``), with or without ncu's own lines around it, or a
        ``.ncu-rep`` report, which ncu itself converts.
    ncu
        The program for reports, by default the one on PATH.

    Returns
    -------
    Recording
        One event for each profiled launch, a ``push_pop`` range for each NVTX range around launches, and the counters
        by metric name: in byte, byte/s, hz, ns and percent whatever prefix the file shows, others in the unit that
        Nsight Compute has for them. Metrics that the details page shows under a title are named
        ``section: title``. Names of processes and hosts are not kept.

    Raises
    ------
    TraceError
        The file cannot be read, holds no result or no duration; or ncu is missing, too old, or was refused counters.
    """
    text = _export(path, ncu) if path.suffix == _REPORT_SUFFIX else _read(path)
    if _REFUSED_BY_DRIVER in text:
        raise TraceError(
            f"{path}: the driver let only administrators read the counters ({_REFUSED_BY_DRIVER}); run ncu as root "
            "or load the module nvidia with NVreg_RestrictProfilingToAdminUsers=0, and profile again"
        )
    sheet = _Sheet.find(text, path)
    mark = _decimal_mark((value for _, metrics in sheet.rows() for _, _, value in metrics), path)
    results = _Results(path)
    for cells, metrics in sheet.rows():
        results.add(cells, [(name, _value(value, unit, mark)) for name, unit, value in metrics])
    return results.recording()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror})") from None


def _export(path: Path, ncu: Path | None) -> str:
    """Have ncu write the raw page, in base units: the automatic ones show three digits."""
    program = shutil.which(ncu or "ncu")
    advice = (
        f"where it was recorded, run: ncu --import {path.name} --csv --page raw > {path.stem}.csv, and give the CSV"
    )
    if program is None:
        raise TraceError(f"reading {path} needs the program {ncu or 'ncu'}, which is not there; {advice}")
    command = [program, "--import", str(path.resolve()), "--csv", "--page", "raw", "--print-units", "base"]
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)  # noqa: S603
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if line.startswith(_ERROR)), lines[-1]).removeprefix(_ERROR)
        raise TraceError(f"{program} cannot read {path} ({said.strip()}), it may be older than the report; {advice}")
    return done.stdout


@attrs.frozen
class _Sheet:
    """The CSV inside a file."""

    path: Path
    text: str
    header: list[str]
    is_details: bool

    @classmethod
    def find(cls, text: str, path: Path) -> _Sheet:
        """Skip what the profiled program and ncu itself printed before the header."""
        found = re.search(r'^"?ID"?,"?Process ID"?,', text, re.MULTILINE)
        header = next(_records(text[found.start() :], path), []) if found else []
        is_details = "Metric Name" in header
        is_raw = any("__" in name for name in header)
        if found is None or not _IDENTITY.issubset(header) or not (is_details or is_raw):
            raise TraceError(
                f"{path} holds no CSV of Nsight Compute; give one of 'ncu --csv --page raw', or a {_REPORT_SUFFIX} file"
            )
        return cls(path, text[found.start() :], header, is_details)

    def rows(self) -> Iterator[tuple[dict[str, str], list[tuple[str, str, str]]]]:
        """Yield each row's cells, and its metrics as (name, unit, value)."""
        records = _records(self.text, self.path)
        next(records)
        # The raw page has one column for each metric, and their units in a row of their own.
        units = {} if self.is_details else dict(zip(self.header, next(records, []), strict=False))
        for record in records:
            if record == self.header:
                raise TraceError(f"{self.path} holds several CSVs; give each as a file of its own")
            # Rows without a rule end early.
            cells = dict(zip(self.header, record, strict=False))
            # The profiled program may print between the rows.
            if not all(_INTEGER.fullmatch(cells.get(name, "")) for name in ("ID", "Process ID")):
                continue
            if self.is_details:
                yield cells, _details_metric(cells)
            else:
                yield cells, [(name, units.get(name, ""), value) for name, value in cells.items() if "__" in name]


def _records(text: str, path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text))
    except csv.Error as error:
        raise TraceError(f"{path} is a damaged CSV ({error}); export it again") from None


def _details_metric(cells: dict[str, str]) -> list[tuple[str, str, str]]:
    name, section = cells.get("Metric Name", ""), cells.get("Section Name", "")
    if not name:
        return []
    # Identifiers are unique, titles only within their section.
    name = name if "__" in name else f"{section}: {name}"
    return [(name, cells.get("Metric Unit", ""), cells.get("Metric Value", ""))]


def _proof(mark: str, group: str) -> str:
    """Pattern of what is a number with this decimal mark only: 1,234 could be either."""
    m, g = re.escape(mark), re.escape(group)
    alone = rf"\d+{m}(?:\d{{1,2}}|\d{{4,}})|(?:0|\d{{4,}}){m}\d{{3}}"
    return rf"[-+]?(?:\d{{1,3}}(?:{g}\d{{3}})+{m}\d+|\d{{1,3}}(?:{g}\d{{3}}){{2,}}|{alone})"


_PROOFS: Final = re.compile(f"(?P<point>{_proof('.', ',')})|(?P<comma>{_proof(',', '.')})")
_SPACES: Final = dict.fromkeys(map(ord, " \t\u00a0\u2009\u202f'"))
#: By decimal mark: drops what groups digits, and writes the mark as Python does.
_TO_PYTHON: Final = {"point": _SPACES | {ord(","): None}, "comma": _SPACES | {ord("."): None, ord(","): "."}}


def _decimal_mark(values: Iterable[str], path: Path) -> str:
    """Tell from all numbers which of point and comma the file has for decimals; where none tells, the point."""
    marks = {match.lastgroup for value in values if (match := _PROOFS.fullmatch(value.translate(_SPACES)))}
    if len(marks) > 1:
        raise TraceError(f"{path} has numbers with decimal point and with decimal comma; export it with LC_ALL=C")
    return next((mark for mark in marks if mark), "point")


def _value(text: str, unit: str, mark: str) -> float:
    """Convert to base units, NaN where there is no number."""
    # A metric with instances is shown as "total (instance: value; ...)".
    text = text.partition(" (")[0].translate(_TO_PYTHON[mark])
    return float(Decimal(text).scaleb(_exponent(unit))) if _NUMBER.fullmatch(text) else math.nan


@functools.cache
def _exponent(unit: str) -> int:
    """Power of ten from a unit to its base: byte, hz, ns; and seconds where something is told per time."""
    above, _, below = unit.partition("/")
    exponent = 0
    for part, sign in ((above, 1), (below, -1)):
        if match := _SCALED_UNIT.fullmatch(part):
            is_time = match[2] in {"s", "second"}
            exponent += sign * _PREFIXES[match[1]] + (9 if is_time and sign > 0 else 0)
    return exponent


class _Results:
    """Launches and their counters, filled row by row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._launches: dict[_Key, dict[str, str]] = {}
        self._counters: dict[str, array[float]] = {}

    def add(self, cells: dict[str, str], metrics: list[tuple[str, float]]) -> None:
        """Take one row: of the details page a launch has many, one after the other."""
        key = cells["Process ID"], cells["ID"]
        if key in self._launches and key != next(reversed(self._launches)):
            raise TraceError(
                f"{self._path} holds launch {key[1]} more than once; give each result as a file of its own"
            )
        if key not in self._launches:
            self._launches[key] = {name: text for name, text in cells.items() if "__" not in name}
        for name, value in metrics:
            column = self._counters.setdefault(name, array("d"))
            column.extend([math.nan] * (len(self._launches) - len(column)))
            column[-1] = value

    def recording(self) -> Recording:
        """Make the tables."""
        count = len(self._launches)
        counters = {name: self._padded(column, count) for name, column in self._counters.items()}
        counters = {name: column for name, column in counters.items() if column.null_count < count}
        known = [counters[name] for name in _DURATIONS if name in counters]
        if not known:
            raise TraceError(
                f"{self._path} holds no duration of any kernel; profile with "
                "'ncu --metrics gpu__time_duration.sum' or a set that contains it"
            )
        duration = pc.coalesce(*known)
        timed = pc.and_(pc.greater_equal(duration, 0), pc.less(duration, _LONGEST_NS)).fill_null(fill_value=False)
        launches = [_Launch.read(cells) for cells in self._launches.values()]
        order = _Order(max(len(launch.stack) for launch in launches))
        notes = ["Nsight Compute records no times: start_ns and launch_ns only give the order of the launches."]
        if not any(launch.has_nvtx for launch in launches):
            notes.append("The file holds no NVTX ranges; profile with --nvtx to record them.")
        return Recording(
            tool="ncu",
            version=None,
            events=_events(launches, order, pc.if_else(timed, duration, 0.0)),
            ranges=_ranges(launches, order),
            untimed=pa.array(np.flatnonzero(~timed.to_numpy(zero_copy_only=False))),
            counters=counters,
            notes=tuple(notes),
        )

    @staticmethod
    def _padded(column: array[float], count: int) -> pa.Array:
        values = np.full(count, np.nan)
        values[: len(column)] = column
        return pa.array(values, mask=np.isnan(values))


@attrs.frozen
class _Launch:
    """One profiled launch, with the (domain, name) of the NVTX ranges around it, the outermost first."""

    name: str
    process: int
    thread: int
    device: str
    stream: int | None
    has_nvtx: bool
    stack: list[tuple[str | None, str]]

    @classmethod
    def read(cls, cells: dict[str, str]) -> _Launch:
        """Read the cells that say what was launched, and where."""
        column = next((name for name in cells if _NVTX_COLUMN in name), None)
        # Such as: 4711  "<default domain>:outer:none:none:none:none:none:none"  "library:inner:none:..."
        thread, _, ranges = cells.get(column or "", "").strip().partition(" ")
        return cls(
            name=cells["Kernel Name"],
            process=int(cells["Process ID"]),
            thread=_integer(thread) or 0,
            device="cuda" if (device := _integer(cells.get("Device", ""))) is None else f"cuda:{device}",
            stream=_integer(cells.get("Stream", "")),
            has_nvtx=column is not None,
            stack=[_range_label(text) for text in re.findall(r'"([^"]*)"', ranges)],
        )


def _integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def _range_label(text: str) -> tuple[str | None, str]:
    domain, *fields = text.split(":")
    # The name may hold colons itself.
    name = ":".join(fields[:-_FIELDS_AFTER_NAME] or fields[:1])
    return (None if domain == _DEFAULT_DOMAIN else domain), name


@attrs.frozen
class _Order:
    """A time line without times: launches one after the other, and around each its ranges, truly nested."""

    depth: int

    def launch(self, index: int) -> int:
        """Moment of a launch."""
        return self._first(index) + self.depth

    def opening(self, index: int, level: int) -> int:
        """Moment before a launch at which a range of this level opens, the outermost being 0."""
        return self._first(index) + level

    def closing(self, index: int, level: int) -> int:
        """Moment after a launch at which a range of this level closes."""
        return self._first(index) + 2 * self.depth + 1 - level

    def _first(self, index: int) -> int:
        return index * (2 * self.depth + 2)


def _events(launches: list[_Launch], order: _Order, duration: pa.Array) -> pa.Table:
    count = len(launches)
    place = [order.launch(index) for index in range(count)]
    columns = {
        "event_id": np.arange(count),
        "kind": ["kernel"] * count,
        "name": [launch.name for launch in launches],
        "start_ns": place,
        "duration_ns": np.rint(duration.to_numpy(zero_copy_only=False)).astype(np.int64),
        "device": [launch.device for launch in launches],
        "stream": [launch.stream for launch in launches],
        "launch_ns": [at if launch.has_nvtx else None for at, launch in zip(place, launches, strict=True)],
        "launch_thread": [launch.thread if launch.has_nvtx else None for launch in launches],
        "process": [launch.process for launch in launches],
    }
    return pa.table({name: columns.get(name, [None] * count) for name in EVENTS.names}, schema=EVENTS)


@attrs.define
class _Range:
    """Launches in a row under the same name, and the same names around it."""

    label: tuple[str | None, str]
    launch: _Launch
    level: int
    first: int
    last: int


def _ranges(launches: list[_Launch], order: _Order) -> pa.Table:
    ranges: list[_Range] = []
    open_by_thread: dict[tuple[int, int], list[_Range]] = {}
    for index, launch in enumerate(launches):
        stack = open_by_thread.get((launch.process, launch.thread), [])
        pairs = zip(stack, launch.stack, strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0].label == pair[1], pairs)))
        added = [
            _Range(label, launch, level, index, index) for level, label in enumerate(launch.stack) if level >= shared
        ]
        stack = stack[:shared] + added
        for one in stack:
            one.last = index
        open_by_thread[launch.process, launch.thread] = stack
        ranges += added
    columns = {
        "range_id": np.arange(len(ranges)),
        "name": [one.label[1] for one in ranges],
        "domain": [one.label[0] for one in ranges],
        "style": ["push_pop"] * len(ranges),
        "process": [one.launch.process for one in ranges],
        "thread": [one.launch.thread for one in ranges],
        "start_ns": [order.opening(one.first, one.level) for one in ranges],
        "end_ns": [order.closing(one.last, one.level) for one in ranges],
    }
    return pa.table({name: columns[name] for name in RANGES.names}, schema=RANGES)
