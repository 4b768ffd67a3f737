"""Damaged traces: whatever a file holds, reading it ends in tables that keep their promises or in a `TraceError`."""

from __future__ import annotations

import gzip
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooks.errors import TraceError
from hooks.readers.kineto import read_kineto
from hooks.recording import RANGES
from hooks.tables import EVENTS

ON_DEVICE = ["kernel", "Kernel", "gpu_memcpy", "Memset"]
ON_HOST = ["cuda_runtime", "cuda_driver", "Runtime", "cpu_op", "Operator", "python_function", "user_annotation", "x"]
KEYS = ("ph", "cat", "name", "pid", "tid", "ts", "dur", "args")
BOUNDED = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(st.text(max_size=4), scalars, max_size=2))
small = st.integers(0, 3)
good_events = st.fixed_dictionaries(
    {
        "ph": st.just("X"),
        "cat": st.sampled_from(ON_DEVICE + ON_HOST),
        "name": st.sampled_from(["gemm", "nn.Module: Linear_0", "ProfilerStep#1", "aten::mm"]),
        "pid": st.one_of(small, st.just("rank 1")),
        "tid": st.one_of(small, st.just("stream 7")),
        "ts": st.integers(0, 1000),
        "dur": st.one_of(st.integers(-1, 50), st.decimals(0, 50, places=3).map(float)),
        "args": st.fixed_dictionaries(
            {"device": small}, optional={"stream": small, "correlation": small, "graph node id": small}
        ),
    }
)


@st.composite
def damaged_events(draw):
    event = dict(draw(good_events))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        if draw(st.booleans()):
            event.pop(key, None)
        else:
            event[key] = draw(values)
    return event


def check(path):
    recording = None
    try:
        recording = read_kineto(path)
    except TraceError as error:
        one_line = "\n" not in str(error)
    else:
        one_line = True
        check_tables(recording)
    assert one_line
    return recording


def check_tables(recording):
    recording.events.validate(full=True)
    recording.ranges.validate(full=True)
    assert recording.events.schema.equals(EVENTS)
    assert recording.ranges.schema.equals(RANGES)
    rows = recording.events.to_pylist()
    assert all(row["duration_ns"] >= 0 for row in rows)
    assert all((row["launch_ns"] is None) == (row["launch_thread"] is None) for row in rows)
    assert [row["start_ns"] for row in rows] == sorted(row["start_ns"] for row in rows)


@BOUNDED
@given(
    events=st.lists(st.one_of(good_events, damaged_events(), values), max_size=12), base=st.one_of(st.none(), values)
)
def test_any_event(tmp_path, events, base):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events} | ({} if base is None else {"baseTimeNanoseconds": base})))
    check(path)


@BOUNDED
@given(events=st.lists(good_events, min_size=1, max_size=12))
def test_no_good_event_is_lost(tmp_path, events):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    recording = check(path)
    on_device = [one for one in events if one["cat"] in ON_DEVICE]
    if on_device:
        assert recording.events.num_rows == len(on_device)
        expected = sum(round(max(one["dur"], 0) * 1000) for one in on_device)
        assert sum(recording.events["duration_ns"].to_pylist()) == expected


@BOUNDED
@given(
    events=st.lists(good_events, min_size=1, max_size=6),
    packed=st.booleans(),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_any_damage_to_the_bytes(tmp_path, events, packed, damage):
    content = json.dumps({"traceEvents": events, "baseTimeNanoseconds": 5}).encode()
    content = gzip.compress(content) if packed else content
    for where, inserted, removed in damage:
        at = int(where * len(content))
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    check(path)
