"""Traces that torch.profiler exports (Kineto's JSON, plain or gzipped), as written from 2021 on."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import ijson
import numpy as np
import pyarrow as pa

from hooks.columns import CODED, take_rows
from hooks.errors import NothingRecordedError, TraceError
from hooks.intervals import match_rows, shared_codes
from hooks.readers.kineto_rows import ABSENT, KINDS, LAST_NS, STYLES, KinetoRows
from hooks.recording import RANGES, Recording
from hooks.tables import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hooks.columns import Ints
    from hooks.readers.kineto_rows import Columns

_GZIP_MAGIC: Final = b"\x1f\x8b"
#: Operators are turned into Python objects this many at a time.
_CHUNK_ROWS: Final = 1 << 16


def read_kineto(path: Path) -> Recording:
    """Read a trace that torch.profiler exported.

    The file is streamed, so memory follows the rows that are kept, not the file's size. Of the file's texts only the
    names of kernels, operators, modules and annotations are kept.

    Parameters
    ----------
    path
        JSON of ``export_chrome_trace`` or of the TensorBoard handler, plain or gzipped, of one rank or several.

    Returns
    -------
    Recording
        Kernels, copies and sets, each with the call of the same correlation id that launched it; where the file holds
        none, the CPU operators with their self times. Ranges: ``module`` for each ``nn.Module`` call, named as
        torch.profiler does (``Linear_3``), ``push_pop`` for user annotations. Times are ns of the profiler's clock,
        which is Unix time where the file tells its ``baseTimeNanoseconds`` (torch 2.4 and later).

    Raises
    ------
    TraceError
        The file cannot be read, is cut, or is no trace; `NothingRecordedError` if it holds neither device events nor
        operators.
    """
    rows = KinetoRows()
    with _readable(path) as stream:
        for event in ijson.items(stream, "traceEvents.item"):
            rows.add(event)
    base = _base_ns(path)
    names = pa.array(rows.names, CODED)
    notes = rows.notes()
    device_events, operators = rows.device_events.columns(), rows.operators.columns()
    if len(device_events["start"]):
        timed = _timed(device_events)
        events, launch_notes = _device_events(timed, rows.launches.columns(), names, base)
        notes += launch_notes
    elif len(operators["start"]):
        timed = _timed(operators)
        events = _operator_events(timed, names, base)
    else:
        raise NothingRecordedError(
            f"{path} holds no trace event of a GPU or of an operator; give a file that "
            "torch.profiler exported with ProfilerActivity.CUDA or ProfilerActivity.CPU"
        )
    return Recording(
        tool="torch.profiler",
        version=None,
        events=events,
        ranges=_ranges(rows.ranges.columns(), names, base),
        untimed=pa.array(np.flatnonzero(timed["untimed"])),
        notes=tuple(notes),
    )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Open a plain or gzipped file; whatever is wrong with it or its JSON becomes one line."""
    # The parser (ijson 3.6) takes the interpreter down where Python refuses an integer for its length.
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with path.open("rb") as plain:
            is_gzip = plain.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            with gzip.GzipFile(fileobj=plain) if is_gzip else plain as stream:
                yield stream
    except ijson.JSONError as error:
        # The lines after the first quote the file, which may hold the environment.
        reason = str(error).removeprefix("b'").replace("\\n", "\n").partition("\n")[0]
        raise TraceError(f"{path} is not a complete JSON file ({reason}); export the trace again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path} is a damaged gzip file ({error}); export the trace again") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror})") from None
    except (ArithmeticError, ValueError):
        raise TraceError(f"{path} holds a number that no trace holds; export the trace again") from None
    finally:
        sys.set_int_max_str_digits(digits)


def _base_ns(path: Path) -> int:
    """Moment that the file's times count from, 0 where it names none.

    A pass of its own, as the key stands before the events or after them; Kineto writes it before, where it is found at
    once.
    """
    with _readable(path) as stream:
        base = next(ijson.items(stream, "baseTimeNanoseconds"), 0)
    if not isinstance(base, int) or not 0 <= base < LAST_NS:
        raise TraceError(f"{path} holds no time in baseTimeNanoseconds; export the trace again")
    return base


def _timed(rows: Columns) -> Columns:
    """In the order of their start; what has no end is taken to end where it starts, and marked ``untimed``."""
    untimed = rows["end"] == ABSENT
    return _sorted(rows | {"end": np.where(untimed, rows["start"], rows["end"]), "untimed": untimed})


def _device_events(
    rows: Columns, launches: Columns, names: pa.DictionaryArray, base: int
) -> tuple[pa.Table, list[str]]:
    """Kernels, copies and sets in the order of their start, and what is to be known of their launches."""
    processes = np.unique(launches["process"])
    if len(processes) == 1:
        process = np.full(len(rows["start"]), processes[0])
    else:
        process = np.where(np.isin(rows["process"], processes), rows["process"], ABSENT)
    own, wanted = shared_codes([launches["process"], launches["correlation"]], [process, rows["correlation"]])
    # Of calls that share an id the first, which holds the others.
    launch = match_rows(own, wanted, priority=launches["start"])
    events = _table(
        EVENTS,
        event_id=np.arange(len(launch)),
        kind=take_rows(pa.array(KINDS, CODED), rows["kind"]),
        name=take_rows(names, rows["name"]),
        start_ns=rows["start"] + base,
        duration_ns=rows["end"] - rows["start"],
        device=_devices(rows["device"]),
        process=process,
        stream=rows["stream"],
        launch_ns=take_rows(pa.array(launches["start"] + base), launch),
        launch_thread=take_rows(pa.array(launches["thread"]), launch),
        correlation_id=rows["correlation"],
    )
    notes = []
    unknown = np.count_nonzero(process == ABSENT)
    if unknown:
        notes.append(f"{unknown} device events do not tell which process launched them; {len(processes)} did launch.")
    in_graphs = np.count_nonzero(rows["graph_node"])
    if in_graphs:
        # Where a node was captured is not in the file, so `graph_node_id` would lead nowhere.
        notes.append(f"{in_graphs} device events ran in CUDA graphs: they count where their graph was launched.")
    return events, notes


def _operator_events(rows: Columns, names: pa.DictionaryArray, base: int) -> pa.Table:
    """Operators with self times, in the order of their start."""
    start = rows["start"] + base
    return _table(
        EVENTS,
        event_id=np.arange(len(start)),
        kind=pa.repeat(pa.scalar("cpu_op", CODED), len(start)),
        name=take_rows(names, rows["name"]),
        start_ns=start,
        duration_ns=_self_times(rows),
        device=pa.repeat(pa.scalar("cpu", CODED), len(start)),
        process=rows["process"],
        launch_ns=start,
        launch_thread=rows["thread"],
    )


def _self_times(rows: Columns) -> Ints:
    """What each operator took without its children, process by process and thread by thread."""
    from hooks.capture import self_times  # noqa: PLC0415 - it loads torch, which files with device events do not need

    own = np.empty(len(rows["start"]), np.int64)
    for process, thread in np.unique(np.stack([rows["process"], rows["thread"]]), axis=1).T:
        at = np.flatnonzero((rows["process"] == process) & (rows["thread"] == thread))
        for part in np.split(at, _cuts(rows["start"][at], rows["end"][at])):
            own[part] = self_times([(0, *span) for span in zip(rows["start"][part], rows["end"][part], strict=True)])
    return own


def _cuts(start: Ints, end: Ints) -> Ints:
    """Where a thread's operators can be cut into chunks, no operator being apart from its children."""
    outermost = np.flatnonzero(start[1:] >= np.maximum.accumulate(end)[:-1]) + 1
    _, first_of_chunk = np.unique(outermost // _CHUNK_ROWS, return_index=True)
    return outermost[first_of_chunk]


def _ranges(rows: Columns, names: pa.DictionaryArray, base: int) -> pa.Table:
    rows = _sorted(rows)
    end = rows["end"]
    return _table(
        RANGES,
        range_id=np.arange(len(end)),
        name=take_rows(names, rows["name"]),
        style=take_rows(pa.array(STYLES, CODED), rows["style"]),
        process=rows["process"],
        thread=rows["thread"],
        start_ns=rows["start"] + base,
        end_ns=np.where(end == ABSENT, ABSENT, end + base),
    )


def _sorted(rows: Columns) -> Columns:
    """By start; of those that start together, the one that holds the others first."""
    order = np.lexsort((-rows["end"], rows["start"]))
    return {field: column[order] for field, column in rows.items()}


def _devices(index: Ints) -> pa.DictionaryArray:
    present, code = np.unique(index, return_inverse=True)
    return take_rows(pa.array([f"cuda:{one}" for one in present], CODED), code)


def _table(schema: pa.Schema, **columns: Any) -> pa.Table:
    """Table of a schema: absent integers, and columns that are not given, are null."""
    length = len(columns["name"])
    made = {}
    for field in schema:
        column = columns.get(field.name, pa.nulls(length, field.type))
        is_array = isinstance(column, np.ndarray)
        made[field.name] = pa.array(column, field.type, mask=column == ABSENT) if is_array else column
    return pa.table(made, schema=schema)
