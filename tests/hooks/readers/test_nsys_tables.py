"""Attribution of CUDA graphs, on rows in the very tables that the installed Nsight Systems writes.

A program without a GPU is recorded, and exported with every table, empty or not. So the definitions, the ranges and
their clock are those of the tool; only the device's work is made up.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from hooks.attribution import attribute_to_ranges
from hooks.nsight import find_tool, profile, silent_nvtx
from hooks.readers.nsys import read_nsys

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import time
import nvtx

with nvtx.annotate("model"):
    with nvtx.annotate("model.captured"):
        time.sleep(0.001)
    with nvtx.annotate("model.replayed"):
        time.sleep(0.001)
"""
KERNEL, MEMCPY, MEMSET, GRAPH, RUNTIME = (
    f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE", "RUNTIME")
)
NVTX = "NVTX_EVENTS"
#: What stands in a column that must not be null, by its type.
FILLING = {"INTEGER": 0, "REAL": 0.0, "TEXT": ""}
#: From a process to the next in nsys's global ids.
NEXT_PROCESS = 1 << 24
#: From a launch to its work, in ns; the work runs after all ranges.
LATER = 1_000_000_000


@attrs.frozen
class Export:
    """An export, to add rows to."""

    path: Path

    def query(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def columns(self, table: str) -> dict[str, tuple[str, bool]]:
        """Type of each column, and whether it must not be null; none if there is no such table."""
        return {name: (kind, bool(full)) for _, name, kind, full, *_ in self.query(f"PRAGMA table_info({table})")}

    def add(self, table: str, **values: Any) -> None:
        columns = self.columns(table)
        assert values.keys() <= columns.keys(), f"{table} has no such column"
        row = {name: FILLING[kind] for name, (kind, is_needed) in columns.items() if is_needed} | values
        marks = ", ".join("?" * len(row))
        self.query(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))  # noqa: S608

    @property
    def thread(self) -> int:
        """Global id of the thread that was recorded, whose ranges are all there is."""
        ((thread,),) = self.query("SELECT DISTINCT globalTid FROM NVTX_EVENTS WHERE eventType = 59")
        return int(thread)

    def moment(self, name: str) -> int:
        """Shortly after the beginning of a recorded range, before any range within it."""
        ranges = read_nsys(self.path).ranges
        return ranges["start_ns"].to_pylist()[ranges["name"].to_pylist().index(name)] + 1

    def add_process(self) -> int:
        """Add the recorded ranges once more, of another process, and give the global id of its thread."""
        thread = self.thread + NEXT_PROCESS
        for start, end, text, number in self.query(
            "SELECT start, end, text, textId FROM NVTX_EVENTS WHERE eventType = 59"
        ):
            name = text or self.query("SELECT value FROM StringIds WHERE id = ?", (number,))[0][0]
            self.add(NVTX, start=start, end=end, eventType=59, text=f"other {name}", globalTid=thread)
        return thread

    def add_launch(self, at: int, correlation: int, thread: int) -> None:
        self.add(RUNTIME, start=at, end=at + 1, correlationId=correlation, globalTid=thread)

    def add_work(self, table: str, at: int, correlation: int, thread: int, **more: Any) -> None:
        """Work of a device, 10 ns long."""
        process = thread >> 24 << 24
        self.add(table, start=at, end=at + 10, correlationId=correlation, globalPid=process, **more)

    def add_node(self, at: int, node: int, thread: int, original: int | None = None) -> None:
        """A node of a graph, in the table that holds nodes in this version."""
        table = "CUDA_GRAPH_NODE_EVENTS" if self.columns("CUDA_GRAPH_NODE_EVENTS") else "CUDA_GRAPH_EVENTS"
        self.add(table, start=at, end=at + 1, graphNodeId=node, originalGraphNodeId=original, globalTid=thread)

    def attributed(self) -> list[tuple[str | None, str | None, str | None]]:
        """Range, reason and note of each event, in the order of their start."""
        table = attribute_to_ranges(read_nsys(self.path))
        columns = ("range_name", "unclassified_reason", "attribution_note")
        return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    nsys = find_tool("nsys")
    if nsys is None:
        pytest.skip("no Nsight Systems here: make nsys")
    if silence := silent_nvtx(nsys):
        pytest.skip(silence)
    folder = tmp_path_factory.mktemp("nsys")
    report, exported = folder / "a.nsys-rep", folder / "a.sqlite"
    options = ["--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={report}"]
    done = profile([str(nsys.path), "profile", *options, sys.executable, "-c", PROGRAM], folder)
    assert report.exists(), done.stderr + done.stdout
    subprocess.run(  # noqa: S603
        [nsys.path, "export", "--type", "sqlite", "--lazy", "false", "--output", exported, report],
        check=True,
        capture_output=True,
    )
    return exported


@pytest.fixture
def export(recorded, tmp_path) -> Export:
    return Export(shutil.copy(recorded, tmp_path / "a.sqlite"))


def test_an_export_with_empty_tables_holds_ranges_only(export):
    recording = read_nsys(export.path)
    assert recording.ranges["name"].to_pylist() == ["model", "model.captured", "model.replayed"]
    assert recording.events.num_rows == recording.graph_nodes.num_rows == 0
    assert [note for note in recording.notes if "no CUDA work" in note]


def test_work_belongs_to_the_range_around_its_launch(export):
    at = export.moment("model.replayed")
    for number, table in enumerate((KERNEL, MEMCPY, MEMSET)):
        export.add_launch(at + number, number, export.thread)
        export.add_work(table, at + LATER + 20 * number, number, export.thread)
    export.add_launch(export.moment("model"), 3, export.thread)
    export.add_work(KERNEL, at + 2 * LATER, 3, export.thread)
    assert export.attributed() == [("model.replayed", None, None)] * 3 + [("model", None, None)]


def test_a_graphs_kernels_belong_to_the_range_of_their_capture_over_any_number_of_clones(export):
    thread, captured, replayed = export.thread, export.moment("model.captured"), export.moment("model.replayed")
    export.add_node(captured, 50, thread)
    export.add_node(captured, 51, thread)
    export.add_node(replayed, 60, thread, original=50)
    export.add_node(replayed, 70, thread, original=60)
    export.add_launch(replayed, 9, thread)
    for place, node in enumerate((51, 60, 70, None)):
        export.add_work(KERNEL, replayed + LATER + 20 * place, 9, thread, graphNodeId=node)
    assert export.attributed() == [("model.captured", None, None)] * 3 + [("model.replayed", None, None)]


def test_a_node_whose_capture_is_not_recorded_is_unclassified(export):
    thread, replayed = export.thread, export.moment("model.replayed")
    export.add_node(replayed, 60, thread, original=50)
    export.add_launch(replayed, 9, thread)
    for place, (table, node) in enumerate(((KERNEL, 60), (KERNEL, 61), (MEMCPY, 62), (MEMSET, 60))):
        export.add_work(table, replayed + LATER + 20 * place, 9, thread, graphNodeId=node)
    assert export.attributed() == [(None, "graph_captured_before_trace", None)] * 4


def test_the_same_ids_in_two_processes_do_not_mix(export):
    thread, other = export.thread, export.add_process()
    captured, replayed = export.moment("model.captured"), export.moment("model.replayed")
    # What one process captures, the other launches at that moment, and the other way round.
    for one, capture, launch in ((thread, captured, replayed), (other, replayed, captured)):
        export.add_node(capture, 50, one)
        export.add_node(launch, 60, one, original=50)
        export.add_launch(launch, 9, one)
    export.add_node(captured, 61, thread)
    places = ((thread, 60), (other, 60), (thread, None), (other, None), (thread, 61), (other, 61))
    for place, (one, node) in enumerate(places):
        export.add_work(KERNEL, replayed + LATER + 20 * place, 9, one, graphNodeId=node)
    assert export.attributed() == [
        ("model.captured", None, None),
        ("other model.replayed", None, None),
        ("model.replayed", None, None),
        ("other model.captured", None, None),
        ("model.captured", None, None),
        (None, "graph_captured_before_trace", None),
    ]


def test_a_graph_that_was_recorded_as_a_whole_belongs_to_its_launch_and_is_marked(export):
    if not export.columns(GRAPH):
        pytest.skip("this Nsight Systems records no whole graphs; 2024.2 does")
    thread, replayed = export.thread, export.moment("model.replayed")
    export.add_launch(replayed, 9, thread)
    export.add_work(GRAPH, replayed + LATER, 9, thread)
    export.add_work(GRAPH, replayed + 2 * LATER, 10, thread)
    assert export.attributed() == [
        ("model.replayed", None, "graph_not_expanded"),
        (None, "no_launch_record", "graph_not_expanded"),
    ]
