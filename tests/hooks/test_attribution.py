from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hooks.attribution import REASONS, UNCLASSIFIED, attribute
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
