"""Reads what Nsight Systems recorded: its SQLite exports of 2022.4 to 2026, and reports through ``nsys export``.

Device work finds its launch by process and correlation id, among runtime and driver calls alike. Nothing is read of the
recorded program's environment, command line, output or name.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hooks.columns import NONE, encode_texts, ints, take_ints, take_texts
from hooks.errors import TraceError
from hooks.intervals import match_rows, shared_codes
from hooks.readers.nsys_sqlite import NsysFile
from hooks.recording import GRAPH_NODES, RANGES, Recording
from hooks.tables import EVENTS

if TYPE_CHECKING:
    from hooks.columns import Ints

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

    def of(self, ids: pa.ChunkedArray) -> Ints:
        """Process of each id; a null one has none.

        Raises
        ------
        TraceError
            If one process id stands for processes of two machines.
        """
        for number in pc.unique(pc.shift_right(ids.drop_null(), 24)).to_pylist():
            process = number & 0xFFFFFF
            if self._known.setdefault(process, number) != number:
                raise TraceError(
                    f"{self._path}: process {process} is on two machines; export the report of each by itself"
                )
        return np.where(ids.is_valid().to_numpy(), ints(ids) >> 24 & 0xFFFFFF, NONE)


def _work(file: NsysFile) -> tuple[pa.Table, pa.Array]:
    """What the device did, with the number of its kind and the row of its name; and the names."""
    parts: list[pa.Table] = []
    labels: list[str] = []
    for number, (kind, (table, named_by)) in enumerate(_KINDS.items()):
        needed, optional = ["start", "end", "correlationId", "globalPid"], ["deviceId", "streamId", "graphNodeId"]
        rows = file.read(table, needed, [*optional, named_by])
        by = rows[named_by].fill_null(NONE).combine_chunks().dictionary_encode()
        name = pa.array(by.indices.to_numpy() + len(labels), pa.int64())
        labels += _labels(kind, by.dictionary.to_numpy(), file)
        part = rows.select([*needed, *optional]).append_column("name", name)
        parts.append(part.append_column("kind", pa.repeat(number, rows.num_rows)))
    return pa.concat_tables(parts), pa.array(labels, pa.string())


def _labels(kind: str, values: Ints, file: NsysFile) -> list[str]:
    match kind:
        case "kernel":
            texts = file.strings(values)
            return [texts.get(value, "unnamed kernel") for value in values.tolist()]
        case "memcpy":
            return [f"Memcpy {_DIRECTIONS.get(value, 'unknown')}" for value in values.tolist()]
        case "graph":
            return [f"CUDA graph {value}" for value in values.tolist()]
        case _:
            return ["Memset"] * len(values)


def _events(file: NsysFile, processes: _Processes) -> tuple[pa.Table, pa.Array]:
    """Events in the order of their start, and the ids of those without a valid duration."""
    work, labels = _work(file)
    order = np.argsort(ints(work["start"], 0), kind="stable")
    work = pa.table({name: work[name].combine_chunks().take(pa.array(order)) for name in work.column_names})
    start, end = ints(work["start"], 0), ints(work["end"])
    duration = end - start
    is_timed = pc.and_(work["start"].is_valid(), work["end"].is_valid()).to_numpy() & (end >= start) & (duration >= 0)
    process = processes.of(work["globalPid"])
    launch_ns, launch_thread = _launches(file, processes, process, work["correlationId"])
    columns = {
        "event_id": np.arange(len(order)),
        "kind": pa.array(list(_KINDS)).take(work["kind"].combine_chunks()),
        "name": take_texts(labels, ints(work["name"])),
        "start_ns": start,
        "duration_ns": np.where(is_timed, duration, 0),
        "device": _devices(work["deviceId"]),
        "stream": work["streamId"],
        "launch_ns": launch_ns,
        "launch_thread": launch_thread,
        "process": pa.array(process, mask=process == NONE),
        "correlation_id": work["correlationId"],
        "graph_node_id": _nonzero(work["graphNodeId"]),
    }
    return pa.table(columns, schema=EVENTS), pa.array(np.flatnonzero(~is_timed))


def _launches(
    file: NsysFile, processes: _Processes, process: Ints, correlation: pa.ChunkedArray
) -> tuple[pa.Array, pa.Array]:
    """Time and thread of the call that launched each piece of work: same process, same id, the earliest of several."""
    calls = file.read("CUPTI_ACTIVITY_KIND_RUNTIME", ["start", "globalTid", "correlationId"]).drop_null()
    start, thread = calls["start"].to_numpy(), calls["globalTid"].to_numpy() & 0xFFFFFF
    keys, wanted = shared_codes(
        [processes.of(calls["globalTid"]), calls["correlationId"].to_numpy()], [process, ints(correlation)]
    )
    row = match_rows(keys, wanted, priority=start)
    row = np.where((process != NONE) & correlation.is_valid().to_numpy(), row, NONE)
    return take_ints(start, row), take_ints(thread, row)


def _ranges(file: NsysFile, processes: _Processes) -> tuple[pa.Table, int]:
    """Ranges, and how many were left out because the file does not say where they began."""
    all_rows = file.read(
        "NVTX_EVENTS",
        ["start", "end", "eventType", "globalTid"],
        ["textId", "domainId"],
        text="text",
        where=f'"eventType" IN ({", ".join(map(str, _PUSH_POP + _START_END))})',
    )
    rows = all_rows.filter(pc.and_(all_rows["start"].is_valid(), all_rows["globalTid"].is_valid()))
    columns = {
        "range_id": np.arange(rows.num_rows),
        "name": _range_names(rows, file),
        "domain": _domains(rows, file),
        "style": take_texts(pa.array(["push_pop", "start_end"]), np.isin(ints(rows["eventType"]), _START_END) * 1),
        "process": processes.of(rows["globalTid"]),
        "thread": ints(rows["globalTid"]) & 0xFFFFFF,
        "start_ns": rows["start"],
        "end_ns": rows["end"],
    }
    return pa.table(columns, schema=RANGES), all_rows.num_rows - rows.num_rows


def _range_names(rows: pa.Table, file: NsysFile) -> pa.ChunkedArray:
    """The registered text of each range where it has one, else its own."""
    numbers = rows["textId"].combine_chunks().dictionary_encode()
    registered = file.strings(numbers.dictionary.to_numpy())
    place = {number: row for row, number in enumerate(registered)}
    row_of = np.array([place.get(number, NONE) for number in numbers.dictionary.to_pylist()] + [NONE])
    own, own_row = encode_texts(rows["text"])
    row = row_of[ints(numbers.indices.cast(pa.int64()))]
    texts = pa.concat_arrays([pa.array(registered.values(), pa.string()), own])
    return take_texts(texts, np.where(row == NONE, own_row + len(registered), row))


def _domains(rows: pa.Table, file: NsysFile) -> pa.ChunkedArray:
    """Name of each range's domain, null for none: domains are numbered within a process."""
    made = file.read(
        "NVTX_EVENTS", ["globalTid", "domainId"], ["textId"], text="text", where=f'"eventType" = {_DOMAIN_CREATED}'
    )
    made = made.filter(pc.and_(made["globalTid"].is_valid(), made["domainId"].is_valid()))
    texts = file.strings(made["textId"].drop_null().to_numpy())
    names = [texts.get(row["textId"], row["text"]) for row in made.to_pylist()]
    keys, wanted = shared_codes(
        # The machine's bits differ between the two kinds of rows.
        [ints(made["globalTid"]) >> 24 & 0xFFFFFF, ints(made["domainId"])],
        [ints(rows["globalTid"]) >> 24 & 0xFFFFFF, ints(rows["domainId"])],
    )
    return take_texts(pa.array(names, pa.string()), match_rows(keys, wanted, priority=np.arange(len(names))))


def _graph_nodes(file: NsysFile, processes: _Processes) -> pa.Table:
    # Until 2023 the nodes stood in the table that later holds whole graphs: its columns tell.
    is_older = "graphNodeId" in file.tables.get("CUDA_GRAPH_EVENTS", ())
    rows = file.read(
        "CUDA_GRAPH_EVENTS" if is_older else "CUDA_GRAPH_NODE_EVENTS",
        ["start", "globalTid", "graphNodeId"],
        ["end", "originalGraphNodeId"],
    )
    is_placed = pc.and_(rows["start"].is_valid(), rows["globalTid"].is_valid())
    rows = rows.filter(pc.and_(is_placed, rows["graphNodeId"].is_valid()))
    columns = {
        "process": processes.of(rows["globalTid"]),
        "graph_node_id": rows["graphNodeId"],
        "original_node_id": _nonzero(rows["originalGraphNodeId"]),
        "thread": ints(rows["globalTid"]) & 0xFFFFFF,
        "start_ns": rows["start"],
        "end_ns": pc.coalesce(rows["end"], rows["start"]),
    }
    return pa.table(columns, schema=GRAPH_NODES)


def _devices(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    by = numbers.combine_chunks().dictionary_encode()
    names = pa.array([f"cuda:{number}" for number in by.dictionary.to_pylist()], pa.string())
    return pc.coalesce(take_texts(names, ints(by.indices.cast(pa.int64()))), "cuda")


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
    if graphs := pc.sum(pc.equal(events["kind"], "graph")).as_py():
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


def _nonzero(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Zero stands for "none" in some versions."""
    return pc.if_else(pc.equal(column, 0), None, column)
