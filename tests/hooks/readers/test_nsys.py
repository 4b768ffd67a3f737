from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.attribution import attribute_to_ranges
from hooks.errors import TraceError
from hooks.readers.nsys import read_nsys, read_nsys_report
from hooks.recording import GRAPH_NODES, RANGES
from hooks.tables import EVENTS

TRACES = Path(__file__).resolve().parents[4] / "shared" / "data" / "traces"

#: Columns of the tables as each version of nsys exports them: from its own empty exports (2022.4, 2023.4, 2024.2), from
#: files that it wrote (2026.1, 2026.2), and from reports on others.
_KEYS = "start end deviceId contextId streamId correlationId globalPid"
_CALL = "start end eventClass globalTid nameId"
_COMMON = {
    "StringIds": "id value",
    "CUPTI_ACTIVITY_KIND_KERNEL": f"{_KEYS} demangledName shortName mangledName launchType cacheConfig"
    " registersPerThread gridX gridY gridZ blockX blockY blockZ staticSharedMemory dynamicSharedMemory"
    " localMemoryPerThread localMemoryTotal gridId sharedMemoryExecuted graphNodeId sharedMemoryLimitConfig",
    "CUPTI_ACTIVITY_KIND_MEMCPY": f"{_KEYS} bytes copyKind deprecatedSrcId srcKind dstKind srcDeviceId"
    " srcContextId dstDeviceId dstContextId migrationCause graphNodeId virtualAddress",
    "CUPTI_ACTIVITY_KIND_MEMSET": f"{_KEYS} value bytes graphNodeId memKind",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid correlationId nameId returnValue callchainId",
    "NVTX_EVENTS": "start end eventType rangeId category color text globalTid endGlobalTid textId domainId uint64Value"
    " int64Value doubleValue uint32Value int32Value floatValue jsonTextId jsonText",
}
_NODES = f"{_CALL} graphNodeId originalGraphNodeId"
_2022 = _COMMON | {"EXPORT_META_DATA": "name value", "CUDA_GRAPH_EVENTS": _NODES}
_2023 = {table: columns.replace("contextId", "contextId greenContextId") for table, columns in _COMMON.items()} | {
    "META_DATA_EXPORT": "name value",
    "CUDA_GRAPH_EVENTS": _NODES,
}
_2024 = _2023 | {
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{_KEYS} greenContextId graphId graphExecId",
    "CUDA_GRAPH_EVENTS": f"{_CALL} graphId originalGraphId graphExecId",
    "CUDA_GRAPH_NODE_EVENTS": _NODES,
}
_2025 = _2024 | {"CUPTI_ACTIVITY_KIND_MEMCPY": _2024["CUPTI_ACTIVITY_KIND_MEMCPY"] + " copyCount"}
_KERNEL_2026 = _2025["CUPTI_ACTIVITY_KIND_KERNEL"] + " graphId clusterX clusterY clusterZ clusterSchedulingPolicy"
_2026 = _2025 | {"CUPTI_ACTIVITY_KIND_KERNEL": _KERNEL_2026}
LAYOUTS: dict[str, dict[str, str]] = {
    "2022.4.2.1 3.0.0": _2022,
    "2023.2.1 3.1.7": _2022,
    "2023.4.4.54 3.7.2": _2023,
    "2024.2.3.38 3.11.1": _2024,
    "2025.3.1 3.17.2": _2025,
    "2026.1.1 3.24.14": _2026,
    "2026.2.1.210 3.25.0": _2026
    | {
        "CUPTI_ACTIVITY_KIND_KERNEL": _KERNEL_2026 + " tensorSizeMinusOneElements",
        "NVTX_EVENTS": _COMMON["NVTX_EVENTS"] + " binaryData",
    },
}
NEWEST = list(LAYOUTS)[-1]

KERNEL, MEMCPY, MEMSET, GRAPH, RUNTIME = (
    f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE", "RUNTIME")
)
NVTX = "NVTX_EVENTS"
Rows = dict[str, list[dict[str, Any]]]


def gid(process: int, thread: int = 0) -> int:
    return 1 << 48 | process << 24 | thread


def export(path: Path, rows: Rows, layout: str = NEWEST) -> Path:
    """Write an export that holds `rows`: only tables that have some, as nsys does, and the one about the export."""
    product, schema = layout.split()
    tables = LAYOUTS[layout]
    about = "META_DATA_EXPORT" if "META_DATA_EXPORT" in tables else "EXPORT_META_DATA"
    facts = {"EXPORT_PRODUCT_VERSION": product, "EXPORT_SCHEMA_VERSION": schema}
    rows = rows | {about: [{"name": name, "value": value} for name, value in facts.items()]}
    with sqlite3.connect(path) as connection:
        for table, some in rows.items():
            columns = tables.get(table, " ".join(some[0])).split()
            connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            for row in some:
                assert row.keys() <= set(columns)
                names, marks = ", ".join(row), ", ".join("?" * len(row))
                connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))  # noqa: S608
    connection.close()
    return path


def work(start: int, end: int | None, correlation: int | None, process: int = 7, **more: Any) -> dict[str, Any]:
    keys = {"start": start, "end": end, "correlationId": correlation, "globalPid": gid(process)}
    return {**keys, "deviceId": 0, "streamId": 13, **more}


def call(start: int, correlation: int, process: int = 7, thread: int = 7) -> dict[str, Any]:
    return {"start": start, "end": start + 5, "correlationId": correlation, "globalTid": gid(process, thread)}


def nvtx(
    start: int, end: int | None, text: str | None, process: int = 7, thread: int = 7, **more: Any
) -> dict[str, Any]:
    return {"start": start, "end": end, "text": text, "globalTid": gid(process, thread), "eventType": 59, **more}


def strings(*texts: str) -> list[dict[str, Any]]:
    return [{"id": number, "value": text} for number, text in enumerate(texts)]


def two_processes() -> Rows:
    """Both processes launch with the correlation ids 1 and 2, on threads of the same number."""
    return {
        "StringIds": strings("gemm<float>", "layer.norm", "SECRET=of the environment"),
        KERNEL: [work(200, 260, 1, 7, demangledName=0), work(210, 240, 1, 8, demangledName=0, deviceId=1)],
        MEMCPY: [work(300, 310, 2, 7, copyKind=1), work(305, 306, 2, 8, copyKind=99)],
        MEMSET: [work(400, 401, 3, 7)],
        RUNTIME: [call(110, 1, 7), call(150, 2, 7), call(120, 1, 8), call(160, 2, 8), call(190, 3, 7)],
        NVTX: [
            nvtx(100, 170, "layer", 7),
            nvtx(105, 115, None, 7, textId=1),
            nvtx(100, 170, "other", 8, domainId=5),
            nvtx(90, None, None, 7, eventType=75, domainId=5, textId=2),
            nvtx(90, None, "library", 8, eventType=75, domainId=5),
            nvtx(99, None, "a mark", 7, eventType=34),
        ],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_processes_are_kept_apart(tmp_path, layout):
    recording = read_nsys(export(tmp_path / "a.sqlite", two_processes(), layout))
    assert recording.events.schema.equals(EVENTS)
    assert recording.ranges.schema.equals(RANGES)
    assert recording.graph_nodes.schema.equals(GRAPH_NODES)
    assert (recording.tool, recording.version, recording.notes) == ("nsys", layout.split()[0], ())
    events = recording.events.to_pylist()
    assert [(e["kind"], e["name"], e["process"], e["launch_ns"]) for e in events] == [
        ("kernel", "gemm<float>", 7, 110),
        ("kernel", "gemm<float>", 8, 120),
        ("memcpy", "Memcpy HtoD", 7, 150),
        ("memcpy", "Memcpy unknown", 8, 160),
        ("memset", "Memset", 7, 190),
    ]
    assert [(e["start_ns"], e["duration_ns"], e["device"], e["stream"]) for e in events[:2]] == [
        (200, 60, "cuda:0", 13),
        (210, 30, "cuda:1", 13),
    ]
    assert [e["launch_thread"] for e in events] == [7] * 5
    ranges = recording.ranges.to_pylist()
    assert [(r["name"], r["domain"], r["style"], r["process"]) for r in ranges] == [
        ("layer", None, "push_pop", 7),
        ("layer.norm", None, "push_pop", 7),
        ("other", "library", "push_pop", 8),
    ]
    table = attribute_to_ranges(recording)
    assert table["range_name"].to_pylist() == ["layer.norm", "other", "layer", "other", None]
    assert table["unclassified_reason"].to_pylist() == [None] * 4 + ["outside_any_module"]


def test_a_text_that_repeats_is_held_once(tmp_path):
    kernel, path = "k" * 10_000, "layers." * 1_000
    rows: Rows = {
        "StringIds": strings(kernel, path),
        KERNEL: [work(at, at + 5, at, demangledName=0) for at in range(2_000)],
        RUNTIME: [call(at, at) for at in range(2_000)],
        NVTX: [nvtx(at, at + 1, None, textId=1) if at % 2 else nvtx(at, at + 1, path) for at in range(2_000)],
    }
    recording = read_nsys(export(tmp_path / "a.sqlite", rows))
    table = attribute_to_ranges(recording)
    assert (table["name"].unique().to_pylist(), table["range_name"].unique().to_pylist()) == ([kernel], [path])
    # Written out, the texts would take 34 MB.
    assert recording.ranges.nbytes + table.nbytes < 1_000_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nodes_of_graphs_are_found_in_every_layout(tmp_path, layout):
    nodes = [
        {"start": 120, "end": 121, "globalTid": gid(7, 7), "graphNodeId": 50, "originalGraphNodeId": None},
        {"start": 290, "end": 291, "globalTid": gid(7, 7), "graphNodeId": 60, "originalGraphNodeId": 50},
    ]
    rows: Rows = {
        "StringIds": strings("gemm"),
        KERNEL: [
            work(400, 410, 9, demangledName=0, graphNodeId=60),
            work(410, 420, 9, demangledName=0, graphNodeId=61),
            work(420, 430, 9, demangledName=0, graphNodeId=0),
        ],
        RUNTIME: [call(350, 9)],
        NVTX: [nvtx(100, 200, "captured"), nvtx(300, 390, "replayed")],
    }
    if "CUDA_GRAPH_NODE_EVENTS" in LAYOUTS[layout]:
        graph = {"start": 280, "end": 281, "globalTid": gid(7, 7), "graphId": 60, "originalGraphId": 50}
        rows |= {"CUDA_GRAPH_NODE_EVENTS": nodes, "CUDA_GRAPH_EVENTS": [graph]}
    else:
        rows |= {"CUDA_GRAPH_EVENTS": nodes}
    table = attribute_to_ranges(read_nsys(export(tmp_path / "a.sqlite", rows, layout)))
    assert table["range_name"].to_pylist() == ["captured", None, "replayed"]
    assert table["unclassified_reason"].to_pylist() == [None, "graph_captured_before_trace", None]


@pytest.mark.parametrize("layout", [layout for layout, tables in LAYOUTS.items() if GRAPH in tables])
def test_a_graph_recorded_as_a_whole_is_one_event_of_the_range_that_launched_it(tmp_path, layout):
    rows: Rows = {
        GRAPH: [work(400, 450, 9, graphId=3), work(500, 540, 11, graphId=3)],
        RUNTIME: [call(350, 9)],
        NVTX: [nvtx(300, 390, "replayed")],
    }
    recording = read_nsys(export(tmp_path / "a.sqlite", rows, layout))
    assert [(e["kind"], e["name"]) for e in recording.events.to_pylist()] == [("graph", "CUDA graph 3")] * 2
    assert any("--cuda-graph-trace=node" in note for note in recording.notes)
    table = attribute_to_ranges(recording)
    assert table["range_name"].to_pylist() == ["replayed", None]
    assert table["unclassified_reason"].to_pylist() == [None, "no_launch_record"]
    assert table["attribution_note"].to_pylist() == ["graph_not_expanded"] * 2


def test_ranges_that_are_started_and_ended_by_hand_count_on_the_thread_that_began_them(tmp_path):
    rows: Rows = {
        "StringIds": strings("gemm"),
        KERNEL: [work(500 + at, 501 + at, at, demangledName=0) for at in (1, 2, 3, 4, 5)],
        RUNTIME: [call(105, 1), call(125, 2), call(165, 3), call(185, 4), call(105, 5, thread=8)],
        NVTX: [
            nvtx(100, 150, "pushed"),
            nvtx(120, 180, "overlaps", eventType=60, rangeId=1),
            nvtx(110, 190, "ends elsewhere", eventType=60, rangeId=2, endGlobalTid=gid(7, 8)),
        ],
    }
    recording = read_nsys(export(tmp_path / "a.sqlite", rows))
    assert recording.ranges["style"].to_pylist() == ["push_pop", "start_end", "start_end"]
    table = attribute_to_ranges(recording)
    assert table["range_name"].to_pylist() == ["pushed", "overlaps", "overlaps", "ends elsewhere", None]
    assert table["unclassified_reason"].to_pylist() == [None] * 4 + ["thread_not_traced"]


def test_what_has_no_end_is_kept_and_said(tmp_path):
    rows: Rows = {
        "StringIds": strings("gemm"),
        KERNEL: [
            work(200, 260, 1, demangledName=0),
            work(210, None, 1, demangledName=0),
            work(220, 219, 1, demangledName=0),
            work(230, 240, None, demangledName=0),
            work(240, 250, 1, demangledName=77) | {"globalPid": None},
        ],
        RUNTIME: [call(110, 1)],
        NVTX: [nvtx(100, None, "open"), nvtx(108, 101, "backward"), nvtx(100, 200, "nowhere") | {"globalTid": None}],
    }
    recording = read_nsys(export(tmp_path / "a.sqlite", rows))
    assert recording.events["duration_ns"].to_pylist() == [60, 0, 0, 10, 10]
    assert recording.untimed.to_pylist() == [1, 2]
    assert recording.events["name"].to_pylist() == ["gemm"] * 4 + ["unnamed kernel"]
    table = attribute_to_ranges(recording)
    missing = "no_launch_record"
    assert table["unclassified_reason"].to_pylist() == [None, "invalid_duration", "invalid_duration", missing, missing]
    assert table["range_name"].to_pylist() == ["open", None, None, None, None]
    assert [note.split(":")[0] for note in recording.notes] == [
        "2 events have no end, or one before their start",
        "1 ranges were never closed",
        "1 ranges end before they start",
        "1 ranges have no start or no thread",
    ]


def test_of_two_calls_with_one_id_the_earlier_is_the_launch(tmp_path):
    rows = two_processes()
    rows[RUNTIME] = [call(112, 1), *rows[RUNTIME]]
    assert read_nsys(export(tmp_path / "a.sqlite", rows)).events["launch_ns"][0].as_py() == 110


def test_a_process_id_on_two_machines_is_refused(tmp_path):
    rows = two_processes()
    rows[RUNTIME].append(call(112, 1) | {"globalTid": 2 << 48 | 7 << 24 | 7})
    with pytest.raises(TraceError, match="process 7 is on two machines"):
        read_nsys(export(tmp_path / "a.sqlite", rows))


def test_missing_tables_are_normal_and_said(tmp_path):
    rows = two_processes()
    events_only = {table: rows[table] for table in ("StringIds", KERNEL)}
    recording = read_nsys(export(tmp_path / "a.sqlite", events_only))
    assert recording.events["launch_ns"].null_count == 2
    assert any("no NVTX range" in note for note in recording.notes)
    with pytest.raises(TraceError, match="no range"):
        attribute_to_ranges(recording)
    recording = read_nsys(export(tmp_path / "b.sqlite", {table: rows[table] for table in ("StringIds", NVTX)}))
    assert (recording.events.num_rows, recording.ranges.num_rows) == (0, 3)
    assert any("no CUDA work" in note for note in recording.notes)
    assert attribute_to_ranges(recording).num_rows == 0


def test_a_layout_of_the_future_is_read_where_it_can_be(tmp_path):
    future = "2031.1.1 4.0.0"
    tables = {table: f"newColumn {columns}" for table, columns in LAYOUTS[NEWEST].items()} | {"NEW_TABLE": "a b"}
    rows = two_processes() | {"NEW_TABLE": [{"a": 1, "b": 2}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, future, tables)
        recording = read_nsys(export(tmp_path / "a.sqlite", rows, future))
        assert recording.events.num_rows == 5
        assert [note for note in recording.notes if "layout 4.0.0" in note]
        patch.setitem(LAYOUTS, future, tables | {RUNTIME: "begin globalTid correlationId"})
        rows[RUNTIME] = [{"begin": 1, "globalTid": gid(7, 7), "correlationId": 1}]
        with pytest.raises(TraceError, match=r"RUNTIME has no column start;.* 2022\.4 to 2026"):
            read_nsys(export(tmp_path / "b.sqlite", rows, future))


def test_the_file_is_only_read(tmp_path):
    path = export(tmp_path / "a.sqlite", two_processes())
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode = wal").fetchone() == ("wal",)
    connection.close()
    before = hashlib.sha256(path.read_bytes()).digest()
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    read_nsys(path)
    tmp_path.chmod(0o755)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.sqlite"]


def test_nothing_private_is_read(tmp_path):
    secret = "SECRET=of the environment"
    private = {
        "TARGET_INFO_SYSTEM_ENV": [{"name": secret, "nameEnum": 1, "value": secret}],
        "META_DATA_CAPTURE": [{"name": secret, "value": secret}],
        "ProcessStreams": [{"globalPid": gid(7), "filenameId": 2, "contentId": 2}],
        "PROCESSES": [{"globalPid": gid(7), "pid": 7, "name": secret}],
    }
    recording = read_nsys(export(tmp_path / "a.sqlite", two_processes() | private))
    texts = [*recording.events["name"].to_pylist(), *recording.ranges["name"].to_pylist(), *recording.notes]
    texts += [text for text in recording.ranges["domain"].to_pylist() if text]
    assert not [text for text in texts if secret in text]


def test_texts_that_are_no_text_are_read(tmp_path):
    rows = two_processes()
    rows["StringIds"][0]["value"] = b"gemm \xff\xfe"
    rows[NVTX][0]["text"] = b"layer \xff"
    recording = read_nsys(export(tmp_path / "a.sqlite", rows))
    assert recording.events["name"][0].as_py() == "gemm \ufffd\ufffd"
    assert recording.ranges["name"][0].as_py() == "layer \ufffd"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not an SQLite file"), (b"PK\x03\x04" * 99, "is not an SQLite file"), (None, "cannot be opened")],
)
def test_what_is_no_export_is_refused(tmp_path, content, message):
    path = tmp_path / "a.sqlite"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_nsys(path)
    assert "\n" not in str(caught.value)


def test_other_files_of_sqlite_and_files_in_the_making_are_refused(tmp_path):
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE flowers (name)")
    connection.close()
    with pytest.raises(TraceError, match="no export of Nsight Systems"):
        read_nsys(path)
    (tmp_path / "a.sqlite-wal").write_bytes(b"pages")
    with pytest.raises(TraceError, match="still being written"):
        read_nsys(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_file_that_was_cut_off_is_refused_in_one_line(tmp_path, share):
    rows = two_processes()
    rows[KERNEL] *= 2_000
    content = export(tmp_path / "a.sqlite", rows).read_bytes()
    cut = tmp_path / "cut.sqlite"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TraceError, match="cannot be read, it may be cut off") as caught:
        read_nsys(cut)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    rows = two_processes()
    rows[KERNEL].append(work(500, 510, 3, demangledName=0, graphNodeId=60))
    rows[GRAPH] = [work(600, 650, 3, graphId=3)]
    node = {"start": 120, "end": 121, "globalTid": gid(7, 7), "graphNodeId": 50, "originalGraphNodeId": None}
    rows["CUDA_GRAPH_NODE_EVENTS"] = [node, node | {"graphNodeId": 60, "originalGraphNodeId": 50}]
    return export(tmp_path_factory.mktemp("sound") / "a.sqlite", rows).read_bytes()


@given(changes=st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=6)), min_size=1, max_size=8))
@settings(deadline=None, derandomize=True, max_examples=250)
def test_damage_is_an_error_or_does_no_harm(tmp_path_factory, sound, changes):
    content = bytearray(sound)
    for place, new in changes:
        content[(first := place % len(content)) : first + len(new)] = new
    damaged = tmp_path_factory.getbasetemp() / "damaged.sqlite"
    damaged.write_bytes(content)
    try:
        recording = read_nsys(damaged)
        table = attribute_to_ranges(recording)
    except TraceError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert table.num_rows == recording.events.num_rows
        assert all((row["range_id"] is None) != (row["unclassified_reason"] is None) for row in table.to_pylist())


def fake_nsys(folder: Path, script: str) -> Path:
    program = folder / "nsys"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def test_a_report_is_exported_and_read(tmp_path, monkeypatch):
    exported = export(tmp_path / "exported.sqlite", two_processes())
    report = tmp_path / "my report.nsys-rep"
    report.write_bytes(b"report")
    # Its last two arguments are the target and the report.
    program = fake_nsys(tmp_path, f'[ "$1" = export ] && cat "$6" >/dev/null && cp "{exported}" "$5"')
    assert read_nsys_report(report, program).events.num_rows == 5
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert read_nsys_report(report).events.num_rows == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported.sqlite", "my report.nsys-rep", "nsys"]


def test_a_report_needs_an_nsys_that_can_read_it(tmp_path):
    report = tmp_path / "a.nsys-rep"
    report.write_bytes(b"report")
    with pytest.raises(TraceError, match="there is no such file"):
        read_nsys_report(tmp_path / "b.nsys-rep")
    with pytest.raises(TraceError, match=r"needs the program .*nsys export --type sqlite a\.nsys-rep"):
        read_nsys_report(report, tmp_path / "nsys")
    program = fake_nsys(tmp_path, "echo first line >&2; echo Please update your Nsight Systems >&2; exit 1")
    with pytest.raises(TraceError, match=r"\(Please update your Nsight Systems\), it may be older .*nsys export"):
        read_nsys_report(report, program)
    with pytest.raises(TraceError, match="cannot read"):
        read_nsys_report(report, fake_nsys(tmp_path, "exit 0"))


def real(name: str) -> Path:
    if not (TRACES / name).exists():
        pytest.skip(f"{TRACES / name} is not there: real traces are not part of this repository")
    return TRACES / name


def test_a_real_trace_of_two_gpus_gives_what_an_independent_reader_gives():
    """The figures are those of another implementation, which NVIDIA's own report scripts confirm."""
    table = attribute_to_ranges(read_nsys(real("nsys_2gpu_h100.sqlite")))
    rows = table.to_pylist()
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for row in rows:
        text = row["range_name"] or row["unclassified_reason"]
        name = re.sub(r", (op_id|seq) = \d+", "", text)
        counts[name] += 1
        times[name] += row["duration_ns"]
    assert (len(rows), sum(times.values())) == (5_299, 541_106_145)
    assert [(name, counts[name], time) for name, time in times.most_common(7)] == [
        ("flash_attn::_flash_attn_forward", 66, 256_586_234),
        ("aten::copy_", 2_831, 69_869_064),
        ("aten::addmm", 602, 57_807_320),
        ("aten::mul", 501, 42_979_045),
        ("ncclGroupEnd", 64, 25_179_513),
        ("aten::add", 505, 23_916_556),
        ("no_launch_record", 31, 18_700_516),
    ]
    kernels = [row["duration_ns"] for row in rows if row["kind"] == "kernel"]
    assert (len(kernels), sum(kernels)) == (4_010, 535_200_650)
    assert {row["unclassified_reason"] for row in rows} == {None, "no_launch_record"}
    assert {row["process"] for row in rows} == {144, 145}


def test_a_real_trace_without_a_gpu_holds_ranges_and_says_that_there_is_no_work():
    recording = read_nsys(real("nsys_cpu_modules.sqlite"))
    assert (recording.version, recording.events.num_rows, recording.ranges.num_rows) == ("2024.2.3.38", 0, 87)
    assert "0.self_attn:MultiheadAttention" in recording.ranges["name"].to_pylist()
    assert [note for note in recording.notes if "no CUDA work" in note]
    assert attribute_to_ranges(recording).num_rows == 0
