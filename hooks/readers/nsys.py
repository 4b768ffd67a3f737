"""Reads what Nsight Systems recorded: its SQLite exports of 2022.4 to 2026, and reports through ``nsys export``.

Device work finds its launch by process and correlation id, among runtime and driver calls alike. Nothing is read of the
recorded program's environment, command line, output or name.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooks.columns import CODED, NONE, each_distinct, ints, is_text, take_rows
from hooks.errors import TraceError
from hooks.intervals import match_rows, shared_codes
from hooks.readers.nsys_sqlite import NsysFile
from hooks.recording import GRAPH_NODES, RANGES, Recording
from hooks.tables import EVENTS

#: First number of the layout's version; another one means that meanings may have changed.
_KNOWN_SCHEMA: Final = "3"

#: Table of each kind of event, and the column that its name is made from.
_KINDS: Final = {
    "kernel": ("CUPTI_ACTIVITY_KIND_KERNEL", "demangledName"),
    "memcpy": ("CUPTI_ACTIVITY_KIND_MEMCPY", "copyKind"),
    "memset": ("CUPTI_ACTIVITY_KIND_MEMSET", "memKind"),
    "graph": ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "graphId"),
}
#: CUPTI's numbers for the direction of a copy, between host, device and array; at last between devices, and managed.
_DIRECTIONS: Final = dict(
    enumerate(
        ("HtoD", "DtoH", "HtoA", "AtoH", "AtoA", "AtoD", "DtoA", "DtoD", "HtoH", "PtoP", "HtoD", "DtoH", "DtoD"),
        start=1,
    )
)

#: NVTX event types; the second of each pair comes from a text file.
_PUSH_POP: Final = (59, 70)
_START_END: Final = (60, 71)
_DOMAIN_CREATED: Final = 75


def read_nsys(path: Path) -> Recording:
    """Read an Nsight Systems SQLite export.

    Parameters
    ----------
    path
        A file that ``nsys export --type sqlite`` wrote. It is not changed, and nothing is left beside it.

    Returns
    -------
    hooks.recording.Recording
        Kernels, copies, sets and whole graphs; NVTX ranges; graph nodes. Times are those of the file, in ns.

    Raises
    ------
    TraceError
        If the file is no such export, is damaged, or lacks what attribution needs.
    """
    with NsysFile(path) as file, NsysFile(path) as again, ThreadPoolExecutor(max_workers=1) as beside:
        version = file.export_fact("EXPORT_PRODUCT_VERSION")
        if version is None and not {"NVTX_EVENTS", "StringIds"} & file.tables.keys():
            raise TraceError(f"{path} is an SQLite file, but no export of Nsight Systems")
        schema = file.export_fact("EXPORT_SCHEMA_VERSION")
        processes = _Processes(path)
        # SQLite and Arrow let go of the interpreter's lock, and these take about the same time.
        reading = beside.submit(_ranges, again, processes)
        events, untimed = _events(file, processes)
        ranges, placeless = reading.result()
        nodes = _graph_nodes(file, processes)
    return Recording(
        tool="nsys",
        version=version,
        events=events,
        ranges=ranges,
        graph_nodes=nodes,
        untimed=untimed,
        notes=(
            *_notes_on_schema(schema),
            *_notes_on_events(events, len(untimed)),
            *_notes_on_ranges(ranges, placeless),
        ),
    )


def read_nsys_report(path: Path, nsys: Path | None = None) -> Recording:
    """Read an Nsight Systems report (``.nsys-rep``), by exporting it to a temporary file.

    Parameters
    ----------
    path
        The report.
    nsys
        The ``nsys`` program, by default the one on the PATH. It must not be older than the one that recorded.

    Raises
    ------
    TraceError
        If there is no ``nsys``, it cannot read the report, or `read_nsys` cannot read what it made of it.
    """
    if not path.is_file():
        raise TraceError(f"{path} cannot be opened: there is no such file")
    program = shutil.which(nsys or "nsys")
    advice = f"where it was recorded, run: nsys export --type sqlite {path.name}, and give the .sqlite file"
    if program is None:
        raise TraceError(f"reading {path} needs the program {nsys or 'nsys'}, which is not there; {advice}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.sqlite"
        command = [program, "export", "--type", "sqlite", "--output", str(target), str(path.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        if done.returncode or not target.exists():
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise TraceError(
                f"{program} cannot read {path} ({said.strip()}), it may be older than the report; {advice}"
            )
        return read_nsys(target)


class _Processes:
    """Processes of nsys's global ids, which hold from above: machine, process (24 bits), thread (24 bits)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, int] = {}

    def of(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Process of each id; null for a null one.

        Raises
        ------
        TraceError
            If one process id stands for processes of two machines.
        """
        return each_distinct(lambda distinct: [self._of(number) for number in distinct], ids, pa.int64())

    def _of(self, number: int) -> int:
        process = number >> 24 & 0xFFFFFF
        if self._known.setdefault(process, number >> 24) != number >> 24:
            raise TraceError(f"{self._path}: process {process} is on two machines; export the report of each by itself")
        return process


def _thread(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.bit_wise_and(ids, 0xFFFFFF)


def _work(file: NsysFile) -> pa.Table:
    """What the device did, in the order of its start."""
    parts = []
    for kind, (table, named_by) in _KINDS.items():
        needed, optional = ["start", "end", "correlationId", "globalPid"], ["deviceId", "streamId", "graphNodeId"]
        rows = file.read(table, needed, [*optional, named_by])
        columns = {
            "kind": pa.repeat(pa.scalar(kind, CODED), rows.num_rows),
            "name": each_distinct(functools.partial(_labels, kind, file), rows[named_by].fill_null(NONE)),
            "device": each_distinct(_devices, rows["deviceId"].fill_null(NONE)),
        }
        parts.append(pa.table(columns | {name: rows[name] for name in (*needed, "streamId", "graphNodeId")}))
    work = pa.concat_tables(parts).unify_dictionaries()
    start = ints(work["start"], 0)
    in_order = (start[1:] >= start[:-1]).all()
    return work if in_order else work.take(pa.array(np.argsort(start, kind="stable")))


def _labels(kind: str, file: NsysFile, values: list[int]) -> list[str]:
    match kind:
        case "kernel":
            texts = file.strings(values)
            return [texts.get(value, "unnamed kernel") for value in values]
        case "memcpy":
            return [f"Memcpy {_DIRECTIONS.get(value, 'unknown')}" for value in values]
        case "graph":
            return [f"CUDA graph {value}" for value in values]
        case _:
            return ["Memset"] * len(values)


def _devices(numbers: list[int]) -> list[str]:
    return ["cuda" if number == NONE else f"cuda:{number}" for number in numbers]


def _events(file: NsysFile, processes: _Processes) -> tuple[pa.Table, pa.Array]:
    """Events in the order of their start, and the ids of those without a valid duration."""
    work = _work(file)
    start, end = ints(work["start"], 0), ints(work["end"])
    duration = end - start
    is_timed = pc.and_(work["start"].is_valid(), work["end"].is_valid()).to_numpy() & (end >= start) & (duration >= 0)
    process = processes.of(work["globalPid"])
    launch_ns, launch_thread = _launches(file, processes, process, work["correlationId"])
    columns = {
        "event_id": np.arange(work.num_rows),
        "kind": work["kind"],
        "name": work["name"],
        "start_ns": start,
        "duration_ns": np.where(is_timed, duration, 0),
        "device": work["device"],
        "stream": work["streamId"],
        "launch_ns": launch_ns,
        "launch_thread": launch_thread,
        "process": process,
        "correlation_id": work["correlationId"],
        "graph_node_id": _nonzero(work["graphNodeId"]),
    }
    return pa.table(columns, schema=EVENTS).combine_chunks(), pa.array(np.flatnonzero(~is_timed))


def _launches(
    file: NsysFile, processes: _Processes, process: pa.ChunkedArray, correlation: pa.ChunkedArray
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Time and thread of the call that launched each piece of work: same process, same id, the earliest of several."""
    calls = file.read("CUPTI_ACTIVITY_KIND_RUNTIME", ["start", "globalTid", "correlationId"]).drop_null()
    keys, wanted = shared_codes(
        [ints(processes.of(calls["globalTid"])), ints(calls["correlationId"])], [ints(process), ints(correlation)]
    )
    row = match_rows(keys, wanted, priority=ints(calls["start"]))
    row[~pc.and_(process.is_valid(), correlation.is_valid()).to_numpy()] = NONE
    return take_rows(calls["start"], row), _thread(take_rows(calls["globalTid"], row))


def _ranges(file: NsysFile, processes: _Processes) -> tuple[pa.Table, int]:
    """Ranges, and how many were left out because the file does not say where they began."""
    all_rows = file.read(
        "NVTX_EVENTS",
        ["start", "end", "eventType", "globalTid"],
        ["textId", "domainId"],
        text="text",
        where=f'"eventType" IN ({", ".join(map(str, _PUSH_POP + _START_END))})',
    )
    rows = _with(all_rows, "start", "globalTid")
    process = processes.of(rows["globalTid"])
    columns = {
        "range_id": np.arange(rows.num_rows),
        "name": pc.coalesce(_registered(rows["textId"], file), rows["text"].dictionary_encode()),
        "domain": _domains(process, rows["domainId"], file),
        "style": each_distinct(_styles, rows["eventType"]),
        "process": process,
        "thread": _thread(rows["globalTid"]),
        "start_ns": rows["start"],
        "end_ns": rows["end"],
    }
    return pa.table(columns, schema=RANGES).combine_chunks(), all_rows.num_rows - rows.num_rows


def _registered(numbers: pa.ChunkedArray, file: NsysFile) -> pa.ChunkedArray:
    """Texts by their number in ``StringIds``, null where there is none."""

    def texts(distinct: list[int]) -> list[str | None]:
        found = file.strings(distinct)
        return [found.get(number) for number in distinct]

    return each_distinct(texts, numbers)


def _styles(types: list[int]) -> list[str]:
    return ["start_end" if number in _START_END else "push_pop" for number in types]


def _domains(process: pa.ChunkedArray, domain: pa.ChunkedArray, file: NsysFile) -> pa.ChunkedArray:
    """Name of each range's domain, null for none: domains are numbered within a process."""
    made = file.read(
        "NVTX_EVENTS", ["globalTid", "domainId"], ["textId"], text="text", where=f'"eventType" = {_DOMAIN_CREATED}'
    )
    made = _with(made, "globalTid", "domainId")
    names = pc.coalesce(_registered(made["textId"], file), made["text"].dictionary_encode())
    keys, wanted = shared_codes(
        # The machine's bits differ between the two kinds of rows.
        [ints(made["globalTid"]) >> 24 & 0xFFFFFF, ints(made["domainId"])],
        [ints(process), ints(domain)],
    )
    return take_rows(names, match_rows(keys, wanted, priority=np.arange(len(names))))


def _graph_nodes(file: NsysFile, processes: _Processes) -> pa.Table:
    # Until 2023 the nodes stood in the table that later holds whole graphs: its columns tell.
    is_older = "graphNodeId" in file.tables.get("CUDA_GRAPH_EVENTS", ())
    rows = file.read(
        "CUDA_GRAPH_EVENTS" if is_older else "CUDA_GRAPH_NODE_EVENTS",
        ["start", "globalTid", "graphNodeId"],
        ["end", "originalGraphNodeId"],
    )
    rows = _with(rows, "start", "globalTid", "graphNodeId")
    columns = {
        "process": processes.of(rows["globalTid"]),
        "graph_node_id": rows["graphNodeId"],
        "original_node_id": _nonzero(rows["originalGraphNodeId"]),
        "thread": _thread(rows["globalTid"]),
        "start_ns": rows["start"],
        "end_ns": pc.coalesce(rows["end"], rows["start"]),
    }
    return pa.table(columns, schema=GRAPH_NODES)


def _notes_on_schema(schema: str | None) -> list[str]:
    if schema is None or schema.partition(".")[0] == _KNOWN_SCHEMA:
        return []
    return [
        f"the layout {schema} is not one that is known (3.x): columns of known names were read by their old meaning"
    ]


def _notes_on_events(events: pa.Table, untimed: int) -> list[str]:
    notes = []
    if not events.num_rows:
        notes.append("the file holds no CUDA work: record with --trace=cuda,nvtx where there is a GPU")
    if untimed:
        notes.append(f"{untimed} events have no end, or one before their start: they count with 0 ns")
    if graphs := pc.sum(is_text(events["kind"], "graph")).as_py():
        notes.append(
            f"{graphs} launches of CUDA graphs are one row each: record with --cuda-graph-trace=node to see inside"
        )
    return notes


def _notes_on_ranges(ranges: pa.Table, placeless: int) -> list[str]:
    notes = []
    if not ranges.num_rows:
        notes.append(
            "the file holds no NVTX range: record with --trace=cuda,nvtx, and with a version of the nvtx package "
            "that this nsys knows (0.2.11 is known to all)"
        )
    if ranges["end_ns"].null_count:
        notes.append(f"{ranges['end_ns'].null_count} ranges were never closed: they count as open to the end")
    if backward := pc.sum(pc.less(ranges["end_ns"], ranges["start_ns"])).as_py():
        notes.append(f"{backward} ranges end before they start: they hold nothing")
    if placeless:
        notes.append(f"{placeless} ranges have no start or no thread: they were left out")
    return notes


def _with(rows: pa.Table, *names: str) -> pa.Table:
    """Rows that have all of these; where all do, no row is copied."""
    for name in names:
        if rows[name].null_count:
            rows = rows.filter(rows[name].is_valid())
    return rows


def _nonzero(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Zero stands for "none" in some versions."""
    return pc.if_else(pc.equal(column, 0), None, column)
