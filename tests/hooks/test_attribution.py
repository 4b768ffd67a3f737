from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hooks.attribution import NOTES, REASONS, UNCLASSIFIED, attribute, attribute_to_ranges, ranges_of_modules
from hooks.clock import TOLERANCE_NS
from hooks.errors import TraceError
from hooks.nvtx_ranges import DOMAIN
from hooks.recording import ATTRIBUTED, GRAPH_NODES, RANGES, Recording
from hooks.tables import CALLS, EVENTS, KERNELS


def calls_of(*rows: tuple[int, int | None, str, str, int, int, int]) -> pa.Table:
    """Rows of (id, parent, path, stage, thread, start, end)."""
    columns = list(zip(*rows, strict=True))
    return pa.table(
        {
            "call_id": columns[0],
            "parent_call_id": columns[1],
            "pass": ["profiled"] * len(rows),
            "page": [0] * len(rows),
            "stage": columns[3],
            "step": [3] * len(rows),
            "module_path": columns[2],
            "thread": columns[4],
            "start_ns": columns[5],
            "end_ns": columns[6],
        },
        schema=CALLS,
    )


def events_of(*launches: tuple[int | None, int | None]) -> pa.Table:
    """One event of 5 ns for each (launch time, thread)."""
    count = len(launches)
    return pa.table(
        {
            "event_id": range(count),
            "kind": ["kernel"] * count,
            "name": ["aten::mm"] * count,
            "start_ns": [9_000 + index for index in range(count)],
            "duration_ns": [5] * count,
            "device": ["cuda:0"] * count,
            "stream": [7] * count,
            "launch_ns": [launch for launch, _ in launches],
            "launch_thread": [thread for _, thread in launches],
            "process": [1] * count,
            "correlation_id": range(count),
            "graph_node_id": [None] * count,
        },
        schema=EVENTS,
    )


#: root [100, 200) holds a [110, 150), which holds b [120, 130) and c [130, 140); then a decode root [300, 400).
CALLS_OF_ONE_THREAD = calls_of(
    (0, None, "", "prefill", 1, 100, 200),
    (1, 0, "a", "vision", 1, 110, 150),
    (2, 1, "a.b", "vision", 1, 120, 130),
    (3, 1, "a.c", "vision", 1, 130, 140),
    (4, None, "", "decode", 1, 300, 400),
)


@pytest.mark.parametrize(
    ("launch", "call", "path", "stage"),
    [
        (99, None, UNCLASSIFIED, "other"),
        (100, 0, "", "prefill"),
        (109, 0, "", "prefill"),
        (110, 1, "a", "vision"),
        (125, 2, "a.b", "vision"),
        (130, 3, "a.c", "vision"),
        (145, 1, "a", "vision"),
        (150, 0, "", "prefill"),
        (200, None, UNCLASSIFIED, "prefill"),
        (250, None, UNCLASSIFIED, "prefill"),
        (300, 4, "", "decode"),
        (400, None, UNCLASSIFIED, "decode"),
    ],
)
def test_an_event_belongs_to_the_innermost_call_at_its_launch(launch, call, path, stage):
    row = attribute(events_of((launch, 1)), CALLS_OF_ONE_THREAD).to_pylist()[0]
    assert (row["call_id"], row["module_path"], row["stage"]) == (call, path, stage)
    assert row["unclassified_reason"] == (None if call is not None else "outside_any_module")


def test_the_kernels_own_time_does_not_matter():
    table = attribute(events_of((125, 1)), CALLS_OF_ONE_THREAD)
    assert table["start_ns"][0].as_py() == 9_000
    assert table["module_path"][0].as_py() == "a.b"


def test_threads_are_kept_apart():
    calls = calls_of(
        (0, None, "", "prefill", 1, 100, 200), (1, None, "x", "other", 2, 100, 200), (2, 1, "x.y", "other", 2, 120, 140)
    )
    table = attribute(events_of((130, 1), (130, 2), (130, 3)), calls)
    assert table["module_path"].to_pylist() == ["", "x.y", UNCLASSIFIED]
    assert table["unclassified_reason"].to_pylist() == [None, None, "thread_not_traced"]


def test_an_event_without_launch_says_so():
    row = attribute(events_of((None, None)), CALLS_OF_ONE_THREAD).to_pylist()[0]
    assert (row["unclassified_reason"], row["stage"], row["call_id"]) == ("no_launch_record", "other", None)


def test_pass_page_and_step_come_from_the_calls():
    row = attribute(events_of((125, 1)), CALLS_OF_ONE_THREAD).to_pylist()[0]
    assert (row["pass"], row["page"], row["step"]) == ("profiled", 0, 3)


def test_calls_of_two_passes_are_refused():
    mixed = CALLS_OF_ONE_THREAD.set_column(2, CALLS.field("pass"), pa.array(["a", "b", "b", "b", "b"]))
    with pytest.raises(ValueError, match="one pass"):
        attribute(events_of((125, 1)), mixed)


def test_every_event_has_one_place_and_the_schema_holds():
    rng = np.random.default_rng(5)
    launches = [
        (int(time), int(thread))
        for time, thread in zip(rng.integers(0, 500, 400), rng.integers(1, 4, 400), strict=True)
    ]
    table = attribute(events_of(*launches), CALLS_OF_ONE_THREAD)
    assert table.schema.equals(KERNELS)
    for row in table.to_pylist():
        assert (row["call_id"] is None) == (row["unclassified_reason"] is not None)
        assert row["unclassified_reason"] in {None, *REASONS}


def test_a_random_tree_agrees_with_a_search_for_the_smallest_enclosing_call():
    rng = np.random.default_rng(11)
    rows: list[tuple[int, int | None, str, str, int, int, int]] = []

    def grow(parent: int | None, start: int, end: int, depth: int) -> None:
        at = start
        while end - at > 20:
            first = at + int(rng.integers(0, 5))
            last = min(end, first + int(rng.integers(8, 120)))
            index = len(rows)
            rows.append((index, parent, f"m{index}", "other", 1, first, last))
            if depth:
                grow(index, first + int(rng.integers(0, 3)), last - int(rng.integers(0, 3)), depth - 1)
            at = last + int(rng.integers(0, 4))

    grow(None, 0, 4_000, 3)
    launches = rng.integers(0, 4_100, 2_000)
    table = attribute(events_of(*((int(time), 1) for time in launches)), calls_of(*rows))
    for time, found in zip(launches, table["call_id"].to_pylist(), strict=True):
        around = [row for row in rows if row[5] <= time < row[6]]
        assert found == (max(around, key=lambda row: row[0])[0] if around else None)


def recording_of(
    events: pa.Table,
    ranges: list[tuple[str, int, int, int, int | None]],
    nodes: list[tuple[int, int, int | None, int, int]] = (),
    untimed: list[int] = (),
    domains: list[str | None] | None = None,
) -> Recording:
    """Ranges are (name, process, thread, start, end), nodes (process, id, original, thread, start)."""
    return Recording(
        tool="test",
        version=None,
        events=events,
        ranges=pa.table(
            {
                "range_id": [100 + row for row in range(len(ranges))],
                "name": [one[0] for one in ranges],
                "domain": domains or [None] * len(ranges),
                "style": ["push_pop"] * len(ranges),
                "process": [one[1] for one in ranges],
                "thread": [one[2] for one in ranges],
                "start_ns": [one[3] for one in ranges],
                "end_ns": [one[4] for one in ranges],
            },
            schema=RANGES,
        ),
        graph_nodes=pa.table(
            {
                "process": [one[0] for one in nodes],
                "graph_node_id": [one[1] for one in nodes],
                "original_node_id": [one[2] for one in nodes],
                "thread": [one[3] for one in nodes],
                "start_ns": [one[4] for one in nodes],
                "end_ns": [one[4] + 1 for one in nodes],
            },
            schema=GRAPH_NODES,
        ),
        untimed=pa.array(list(untimed), pa.int64()),
    )


def with_column(events: pa.Table, name: str, values: list[Any]) -> pa.Table:
    return events.set_column(
        EVENTS.get_field_index(name), EVENTS.field(name), pa.array(values, EVENTS.field(name).type)
    )


def places(recording: Recording, ranges: pa.Table | None = None) -> list[str]:
    """Name of each event's range, or its reason in brackets."""
    table = attribute_to_ranges(recording, ranges)
    assert table.schema.equals(ATTRIBUTED)
    rows = table.to_pylist()
    assert all((row["range_id"] is None) == (row["unclassified_reason"] is not None) for row in rows)
    assert {row["unclassified_reason"] for row in rows} <= {None, *REASONS}
    assert table.select(EVENTS.names).equals(recording.events)
    return [row["range_name"] or f"({row['unclassified_reason']})" for row in rows]


#: On thread 1 "a" [100, 200) holds "b" [120, 180), which overlaps "c" [150, 190); "open" [300, ...) is never closed.
RANGES_OF_ONE_THREAD = [("a", 1, 1, 100, 200), ("b", 1, 1, 120, 180), ("c", 1, 1, 150, 190), ("open", 1, 1, 300, None)]


@pytest.mark.parametrize(
    ("launch", "place"),
    [
        (99, "(outside_any_module)"),
        (100, "a"),
        (120, "b"),
        (150, "c"),
        (185, "c"),
        (190, "a"),
        (200, "(outside_any_module)"),
        (299, "(outside_any_module)"),
        (10**15, "open"),
    ],
)
def test_an_event_belongs_to_the_range_that_began_last(launch, place):
    events = with_column(events_of((launch, 1)), "start_ns", [launch])
    assert places(recording_of(events, RANGES_OF_ONE_THREAD)) == [place]


def test_the_same_thread_id_in_two_processes_is_two_threads():
    events = with_column(events_of((130, 1), (130, 1), (130, 1)), "process", [1, 2, 3])
    recording = recording_of(events, [("one", 1, 1, 100, 200), ("two", 2, 1, 100, 200)])
    assert places(recording) == ["one", "two", "(thread_not_traced)"]


def test_an_event_without_launch_or_duration_says_so():
    recording = recording_of(events_of((None, None), (130, 1), (None, None)), RANGES_OF_ONE_THREAD, untimed=[1, 2])
    assert places(recording) == ["(no_launch_record)", "(invalid_duration)", "(invalid_duration)"]


def test_an_event_that_began_before_its_launch_is_not_trusted():
    events = with_column(events_of((130, 1), (130, 1)), "start_ns", [130 - TOLERANCE_NS - 1, 130 - TOLERANCE_NS])
    assert places(recording_of(events, RANGES_OF_ONE_THREAD)) == ["(clock_mismatch)", "b"]


def test_a_graph_node_belongs_to_the_range_of_its_capture():
    nodes = [
        (1, 10, None, 1, 130),  # captured in b
        (1, 20, 10, 1, 310),  # its clone
        (1, 30, 20, 1, 320),  # the clone's clone
        (1, 40, 99, 1, 330),  # its original is not there
        (2, 20, None, 1, 110),  # the same id in another process, captured in its own range
        (1, 50, 51, 1, 110),  # a circle
        (1, 51, 50, 1, 110),
        (1, 60, None, 1, 250),  # captured outside every range
        (1, 70, None, 9, 130),  # captured on a thread without ranges
        (1, 80, None, 1, 310),  # the creation of a clone, and the clone
        (1, 80, 10, 1, 311),
    ]
    ids = [10, 20, 30, 40, 20, 50, 60, 70, 80, 777]
    events = events_of(*[(305, 1)] * len(ids))
    events = with_column(events, "graph_node_id", ids)
    events = with_column(events, "process", [1, 1, 1, 1, 2, 1, 1, 1, 1, 1])
    ranges = [*RANGES_OF_ONE_THREAD, ("other process", 2, 1, 100, 200)]
    unknown, outside = "(graph_captured_before_trace)", "(outside_any_module)"
    expected = ["b", "b", "b", unknown, "other process", unknown, outside, "(thread_not_traced)", "b", unknown]
    assert places(recording_of(events, ranges, nodes)) == expected


def test_a_node_needs_no_launch_record_but_a_capture():
    events = with_column(events_of((None, None), (None, None)), "graph_node_id", [10, 11])
    nodes = [(1, 10, None, 1, 130)]
    assert places(recording_of(events, RANGES_OF_ONE_THREAD, nodes)) == ["b", "(graph_captured_before_trace)"]


def test_a_whole_graph_belongs_to_the_range_of_its_launch_and_is_marked():
    events = with_column(events_of((130, 1), (130, 1)), "kind", ["graph", "kernel"])
    table = attribute_to_ranges(recording_of(events, RANGES_OF_ONE_THREAD))
    assert table["range_name"].to_pylist() == ["b", "b"]
    assert table["attribution_note"].to_pylist() == ["graph_not_expanded", None]
    assert set(NOTES) == {"graph_not_expanded"}


def test_events_without_any_range_are_an_error_and_no_events_are_none():
    with pytest.raises(TraceError, match="no range in this test recording"):
        attribute_to_ranges(recording_of(events_of((130, 1)), []))
    assert attribute_to_ranges(recording_of(EVENTS.empty_table(), [])).num_rows == 0
    assert attribute_to_ranges(recording_of(EVENTS.empty_table(), RANGES_OF_ONE_THREAD)).num_rows == 0


def test_only_ranges_of_modules_count_when_the_modules_are_known():
    recording = recording_of(
        events_of((105, 1), (125, 1), (155, 1), (210, 1)),
        [("Model", 1, 1, 100, 200), ("a", 1, 1, 120, 180), ("aten::mm", 1, 1, 150, 160), ("step", 1, 1, 0, 900)],
    )
    assert places(recording) == ["Model", "a", "aten::mm", "step"]
    ranges, others = ranges_of_modules(recording, {"Model": "", "a": "a", "never run": "never run"})
    assert others == ["aten::mm", "step"]
    assert ranges.schema.equals(RANGES)
    table = attribute_to_ranges(recording, ranges)
    assert table["range_name"].to_pylist() == ["", "a", "a", None]
    assert table["range_id"].to_pylist() == [100, 101, 101, None]


def test_a_librarys_range_with_a_modules_text_is_none_where_the_tracers_domain_is():
    ranges = [("a", 1, 1, 100, 200), ("a", 1, 1, 120, 180)]
    recording = recording_of(events_of((125, 1)), ranges, domains=[DOMAIN, "library"])
    assert attribute_to_ranges(recording)["range_id"].to_pylist() == [101]
    kept, others = ranges_of_modules(recording, {"a": "a"})
    assert attribute_to_ranges(recording, kept)["range_id"].to_pylist() == [100]
    assert others == ["a"]


def test_no_range_is_a_module():
    recording = recording_of(events_of((125, 1)), RANGES_OF_ONE_THREAD)
    kept, others = ranges_of_modules(recording, {})
    assert (kept.num_rows, others) == (0, ["a", "b", "c", "open"])
    with pytest.raises(TraceError, match="leave the run out"):
        attribute_to_ranges(recording, kept)
