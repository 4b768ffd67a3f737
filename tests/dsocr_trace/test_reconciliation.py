"""Recorded ranges beside the tracer's calls, on a model of three modules."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from dsocr_trace.recordings.reconciliation import compared_calls, module_ranges, recorded_calls
from hooks.errors import TraceError
from hooks.nvtx_ranges import DOMAIN
from hooks.recording import RANGES, Recording
from hooks.tables import EVENTS

MODULES = pd.DataFrame(
    {"module_path": ["", "model.sam_model", "head"], "module_class": ["Model", "Sam", "Linear"]},
)
#: (name, start, end): a prefill with vision, and a decode step.
TREE = [("Model", 0, 100), ("model.sam_model", 10, 40), ("head", 50, 90), ("Model", 200, 300), ("head", 210, 290)]


def recording(ranges):
    """A recording of ranges on one thread."""
    count = len(ranges)
    columns = {
        "range_id": list(range(count)),
        "domain": [DOMAIN] * count,
        "style": ["push_pop"] * count,
        "process": [1] * count,
        "thread": [2] * count,
        **dict(zip(("name", "start_ns", "end_ns"), map(list, zip(*ranges, strict=True)), strict=True)),
    }
    table = pa.table({name: columns[name] for name in RANGES.names}, schema=RANGES)
    return Recording("nsys", "2024.2", EVENTS.empty_table(), table)


def calls():
    """The tracer's calls of `TREE`."""
    rows = [
        (0, None, "prefill", 0, ""),
        (1, 0, "vision", 0, "model.sam_model"),
        (2, 0, "prefill", 0, "head"),
        (3, None, "decode", 1, ""),
        (4, 3, "decode", 1, "head"),
    ]
    frame = pd.DataFrame(rows, columns=["call_id", "parent_call_id", "stage", "step", "module_path"])
    return frame.assign(page=0, parent_call_id=frame["parent_call_id"].astype("float"))


def rows_of(recorded):
    found = compared_calls(calls(), recorded_calls(module_ranges(recorded, MODULES), [2]))
    return found.set_index(["stage", "module_path"])


def test_calls_are_read_from_the_nesting():
    found = recorded_calls(module_ranges(recording(TREE), MODULES), [2])
    assert list(found["stage"]) == ["prefill", "vision", "prefill", "decode", "decode"]
    assert list(found["step"]) == [0, 0, 0, 1, 1]
    assert list(found["parent_path"].isna()) == [True, False, False, True, False]
    assert set(found["parent_path"].dropna()) == {""}


def test_each_page_begins_with_a_prefill():
    found = recorded_calls(module_ranges(recording(TREE), MODULES), [1, 1])
    assert list(found["page"]) == [0, 0, 0, 1, 1]
    assert "decode" not in set(found["stage"])


def test_equal_calls_agree():
    rows = rows_of(recording(TREE))
    assert rows["agrees"].all()
    assert rows["calls"].sum() == rows["ranges"].sum() == len(TREE)


def test_a_lost_range_is_found():
    rows = rows_of(recording(TREE[:-1]))
    assert list(rows.index[~rows["agrees"]]) == [("decode", "head")]


def test_as_many_calls_from_another_caller_differ():
    moved = [*TREE[:2], ("head", 20, 30), *TREE[3:]]
    rows = rows_of(recording(moved))
    assert rows.loc[("prefill", "head"), "calls"] == rows.loc[("prefill", "head"), "ranges"] == 1
    assert not rows.loc[("prefill", "head"), "agrees"]


def test_a_recording_without_ranges_of_modules_is_an_error_with_its_fix():
    with pytest.raises(TraceError, match=r"nvtx==0.2.11"):
        module_ranges(recording([("other", 0, 1)]), MODULES)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        (TREE[:3], "1 outermost calls where the generation makes 2 forwards"),
        ([*TREE, ("head", 280, 310)], "ends after"),
    ],
)
def test_a_damaged_recording_is_refused(ranges, said):
    with pytest.raises(TraceError, match=said):
        recorded_calls(module_ranges(recording(ranges), MODULES), [2])
