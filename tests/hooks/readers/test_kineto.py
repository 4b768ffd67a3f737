from __future__ import annotations

import gzip
import json
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hooks.attribution import attribute_to_ranges
from hooks.errors import TraceError
from hooks.readers.kineto import read_kineto
from hooks.recording import RANGES
from hooks.tables import EVENTS

TRACES = Path(__file__).resolve().parents[4] / "shared" / "data" / "traces"
#: File: device events, those without a launch call, those whose launch lies in a module, as counted by hand from the
#: files and by an independent implementation.
COUNTS = {
    "kineto_h100_bert": (61, 0, 61),
    "kineto_h100_qwen_cut": (1707, 509, 1198),
    "kineto_b200_gptoss": (929, 0, 909),
}


def shared_trace(name: str) -> Path:
    path = TRACES / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    return path


def event(cat, name, pid, tid, ts, dur, **args):  # noqa: PLR0917
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


#: One step that launches a kernel, a copy and a set, as each generation writes it.
CURRENT = [
    event("user_annotation", "step", 70, 71, 100.125, 900, **{"External id": 1}),
    event("python_function", "nn.Module: Linear_3", 70, 71, 110.001, 500.5, **{"Python id": 4}),
    event("python_function", "model.py(3): forward", 70, 71, 110, 400),
    event("cpu_op", "aten::addmm", 70, 71, 111, 100, **{"External id": 2}),
    event("cuda_runtime", "cudaLaunchKernel", 70, 71, 120.25, 5, correlation=9, cbid=211),
    event("cuda_driver", "cuMemcpyAsync", 70, 71, 130, 5, correlation=10),
    event("kernel", "gemm", 0, 7, 200.333, 50.007, device=0, stream=7, correlation=9),
    event("gpu_memcpy", "Memcpy HtoD", 1, 8, 260, 1, device=1, stream=8, correlation=10),
    event("gpu_memset", "Memset", 0, 7, 270, 1, device=0, stream=7, correlation=99),
    event("gpu_user_annotation", "step", 0, 7, 200, 60),
    event("overhead", "Activity Buffer Request", -1, 0, 1, 1),
    {
        "ph": "X",
        "cat": "Trace",
        "name": "PyTorch Profiler (0)",
        "pid": "Spans",
        "tid": "PyTorch Profiler",
        "ts": 1,
        "dur": 1,
    },
    {"ph": "i", "s": "g", "name": "Iteration Start", "pid": "Traces", "tid": "Trace PyTorch Profiler", "ts": 1},
    {"ph": "s", "id": 9, "pid": 70, "tid": 71, "ts": 120.25, "cat": "ac2g", "name": "ac2g"},
    {"ph": "M", "name": "process_labels", "pid": 70, "tid": 0, "ts": 1, "args": {"labels": "CPU"}},
]
OF_2021 = [
    event("Operator", "ProfilerStep#5", 70, 71, 100, 900, **{"External id": 1}),
    event("Operator", "aten::addmm", 70, 71, 111, 100, **{"External id": 2, "external id": 2}),
    event("Runtime", "cudaLaunchKernel", 70, "71", 120, 5, **{"cbid": 211, "correlation": 9, "external id": 2}),
    event("Runtime", "cudaMemcpyAsync", 70, "71", 130, 5, **{"cbid": 41, "correlation": 10, "external id": 2}),
    event("Kernel", "gemm", 0, "stream 7", 200, 50, **{"device": 0, "stream": 7, "correlation": 9, "external id": 2}),
    event("Memcpy", "Memcpy HtoD", 1, "stream 8", 260, 1, device=1, stream=8, correlation=10),
    event("Memset", "Memset", 0, "stream 7", 270, 1, device=0, stream=7, correlation=99),
]


def write(path, events, **top):
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events, **top}))
    return path


@pytest.fixture
def trace(tmp_path):
    return lambda events, **top: write(tmp_path / "trace.json", events, **top)


@pytest.mark.parametrize("name", COUNTS)
def test_real_traces_have_every_event_and_launch(name):
    recording = read_kineto(shared_trace(name))
    events, without_launch, inside = COUNTS[name]
    assert recording.events.num_rows == events
    assert recording.events["launch_ns"].null_count == without_launch
    modules = recording.ranges.filter(pc.equal(recording.ranges["style"], "module")).to_pylist()
    spans = [(row["process"], row["thread"], row["start_ns"], row["end_ns"]) for row in modules]
    found = sum(
        any(
            (process, thread) == (row["process"], row["launch_thread"]) and start <= row["launch_ns"] < end
            for process, thread, start, end in spans
        )
        for row in recording.events.to_pylist()
        if row["launch_ns"] is not None
    )
    assert found == inside
    attributed = attribute_to_ranges(recording, recording.ranges.filter(pc.equal(recording.ranges["style"], "module")))
    assert attributed["range_id"].is_valid().to_pylist().count(True) == inside


@pytest.mark.parametrize("name", COUNTS)
def test_real_times_are_the_decimals_of_the_file(name):
    path = shared_trace(name)
    content = json.loads(gzip.decompress(path.read_bytes()), parse_float=Decimal)
    base = content.get("baseTimeNanoseconds", 0)
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    expected = sorted(
        (base + one["ts"] * 1000, one["dur"] * 1000, one["name"], one["args"]["stream"])
        for one in content["traceEvents"]
        if one.get("cat") in kinds
    )
    events = read_kineto(path).events
    columns = [events[name].to_pylist() for name in ("start_ns", "duration_ns", "name", "stream")]
    assert sorted(zip(*columns, strict=True)) == expected


@pytest.mark.parametrize("name", COUNTS)
def test_nothing_else_of_a_real_trace_is_kept(name):
    recording = read_kineto(shared_trace(name))
    texts = {text for table in (recording.events, recording.ranges) for text in table["name"].unique().to_pylist()}
    content = json.loads(gzip.decompress(shared_trace(name).read_bytes()))
    assert texts <= {one.get("name", "").removeprefix("nn.Module: ") for one in content["traceEvents"]}
    assert recording.version is None


def test_current_format(trace):
    recording = read_kineto(trace(CURRENT))
    assert recording.events.schema.equals(EVENTS)
    assert recording.ranges.schema.equals(RANGES)
    keys = ("kind", "name", "start_ns", "duration_ns", "device", "stream", "launch_ns", "launch_thread", "process")
    assert [tuple(row[key] for key in keys) for row in recording.events.to_pylist()] == [
        ("kernel", "gemm", 200_333, 50_007, "cuda:0", 7, 120_250, 71, 70),
        ("memcpy", "Memcpy HtoD", 260_000, 1_000, "cuda:1", 8, 130_000, 71, 70),
        ("memset", "Memset", 270_000, 1_000, "cuda:0", 7, None, None, 70),
    ]
    keys = ("style", "name", "process", "thread", "start_ns", "end_ns")
    assert [tuple(row[key] for key in keys) for row in recording.ranges.to_pylist()] == [
        ("push_pop", "step", 70, 71, 100_125, 1_000_125),
        ("module", "Linear_3", 70, 71, 110_001, 610_501),
    ]
    assert recording.notes == ()


def test_format_of_2021(trace):
    recording = read_kineto(trace(OF_2021))
    keys = ("kind", "device", "stream", "launch_ns", "launch_thread")
    assert [tuple(row[key] for key in keys) for row in recording.events.to_pylist()] == [
        ("kernel", "cuda:0", 7, 120_000, 71),
        ("memcpy", "cuda:1", 8, 130_000, 71),
        ("memset", "cuda:0", 7, None, None),
    ]
    assert recording.ranges.select(["style", "name"]).to_pylist() == [{"style": "push_pop", "name": "ProfilerStep#5"}]
    assert any("with_stack=True" in note for note in recording.notes)


def test_gzip_is_told_by_content(tmp_path, trace):
    plain = trace(CURRENT)
    packed = tmp_path / "packed.json"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_kineto(packed).events.equals(read_kineto(plain).events)


@pytest.mark.parametrize("keys", [("baseTimeNanoseconds", "traceEvents"), ("traceEvents", "baseTimeNanoseconds")])
def test_base_time_counts_wherever_it_stands(tmp_path, keys):
    values = {"baseTimeNanoseconds": 1_751_410_836_000_000_000, "traceEvents": CURRENT}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({key: values[key] for key in keys} | {"displayTimeUnit": "ms"}))
    recording = read_kineto(path)
    assert recording.events["start_ns"][0].as_py() == 1_751_410_836_000_200_333
    assert recording.events["launch_ns"][0].as_py() == 1_751_410_836_000_120_250
    assert recording.ranges["end_ns"][0].as_py() == 1_751_410_836_001_000_125


def test_times_are_exact_where_a_float_is_not(tmp_path):
    # Microseconds of Unix time with three digits, as torch 2.2 and 2.3 write them, need 62 bits.
    text = json.dumps({"traceEvents": CURRENT}).replace("200.333", "1700000000123456.789")
    assert float("1700000000123456.789") * 1000 != 1_700_000_000_123_456_789
    (tmp_path / "trace.json").write_text(text)
    assert 1_700_000_000_123_456_789 in read_kineto(tmp_path / "trace.json").events["start_ns"].to_pylist()


def test_an_event_without_an_end_is_kept_and_named(trace):
    cut = event("kernel", "cut", 0, 7, 300, 0, device=0, stream=7, correlation=9)
    del cut["dur"]
    wrong = event("kernel", "wrong", 0, 7, 310, -4, device=0, stream=7, correlation=9)
    recording = read_kineto(trace([*CURRENT, cut, wrong]))
    rows = recording.events.take(recording.untimed).to_pylist()
    assert [(row["name"], row["duration_ns"]) for row in rows] == [("cut", 0), ("wrong", 0)]
    assert recording.events.num_rows == 5


def test_a_range_without_an_end_is_open_and_a_broken_row_is_counted(trace):
    opened = event("user_annotation", "open", 70, 71, 105, 0)
    del opened["dur"]
    negative = event("user_annotation", "negative", 70, 71, 105, -1)
    nameless = event("kernel", None, 0, 7, 1, 1)
    late = event("kernel", "late", 0, 7, 1e300, 1)
    recording = read_kineto(trace([*CURRENT, opened, negative, nameless, late, 5, None, "text"]))
    ends = dict(zip(recording.ranges["name"].to_pylist(), recording.ranges["end_ns"].to_pylist(), strict=True))
    assert ends == {"step": 1_000_125, "open": None, "Linear_3": 610_501}
    assert recording.events.num_rows == 3
    assert any(note.startswith("6 trace events were left out") for note in recording.notes)
    assert any(note.startswith("1 ranges have no duration") for note in recording.notes)


def test_the_outer_of_two_calls_with_one_id_is_the_launch(trace):
    inner = event("cuda_driver", "cuLaunchKernel", 70, 71, 121, 2, correlation=9)
    assert read_kineto(trace([inner, *CURRENT])).events["launch_ns"][0].as_py() == 120_250


def of_rank(rank, *, pid_of_device):
    """A launch and its kernel; every rank counts its correlation ids from the same number."""
    pid, start = 1000 + rank, 100 + rank
    return [
        event("cuda_runtime", "cudaLaunchKernel", pid, pid, start, 5, correlation=1),
        event("kernel", f"of rank {rank}", pid_of_device(pid), 7, 500 + rank, 5, device=0, stream=7, correlation=1),
    ]


def test_ranks_in_one_file_keep_their_launches_apart(trace):
    merged = [row for rank in range(3) for row in of_rank(rank, pid_of_device=lambda pid: pid)]
    rows = read_kineto(trace(merged)).events.to_pylist()
    assert [(row["process"], row["launch_ns"]) for row in rows] == [(1000 + n, 100_000 + 1000 * n) for n in range(3)]


def test_a_launch_is_not_guessed_among_ranks(trace):
    merged = [row for rank in range(3) for row in of_rank(rank, pid_of_device=lambda _: 0)]
    recording = read_kineto(trace(merged))
    assert recording.events["launch_ns"].null_count == recording.events["process"].null_count == 3
    assert any(note.startswith("3 device events do not tell which process") for note in recording.notes)


def test_labels_stand_for_processes(trace):
    rows = [row | {"pid": f"rank {row['pid']}"} if row.get("pid") == 70 else row for row in CURRENT]
    recording = read_kineto(trace(rows))
    assert recording.events["launch_ns"].null_count == 1
    assert set(recording.events["process"].to_pylist()) == set(recording.ranges["process"].to_pylist())


def test_kernels_of_cuda_graphs_share_a_launch_and_are_noted(trace):
    nodes = [
        event("kernel", "node", 0, 7, 300 + n, 1, device=0, stream=7, correlation=9, **{"graph node id": n + 1})
        for n in range(4)
    ]
    recording = read_kineto(trace([*CURRENT, *nodes]))
    named = recording.events.filter(pc.equal(recording.events["name"], "node"))
    assert named["launch_ns"].to_pylist() == [120_250] * 4
    assert any(note.startswith("4 device events ran in CUDA graphs") for note in recording.notes)


def test_operators_with_self_times_where_there_is_no_device(trace):
    rows = [
        event("cpu_op", "aten::linear", 70, 71, 100, 50),
        event("cpu_op", "aten::addmm", 70, 71, 110, 30.5),
        event("cpu_op", "aten::linear", 70, 72, 100, 50),
        event("cpu_op", "aten::linear", 80, 71, 105, 50),
    ]
    events = read_kineto(trace(rows)).events
    keys = ("kind", "name", "process", "launch_thread", "start_ns", "launch_ns", "duration_ns", "device")
    assert sorted(tuple(row[key] for key in keys) for row in events.to_pylist()) == [
        ("cpu_op", "aten::addmm", 70, 71, 110_000, 110_000, 30_500, "cpu"),
        ("cpu_op", "aten::linear", 70, 71, 100_000, 100_000, 19_500, "cpu"),
        ("cpu_op", "aten::linear", 70, 72, 100_000, 100_000, 50_000, "cpu"),
        ("cpu_op", "aten::linear", 80, 71, 105_000, 105_000, 50_000, "cpu"),
    ]


def test_self_times_do_not_depend_on_where_a_thread_is_cut(trace, monkeypatch):
    rows = [
        event("cpu_op", f"level {level}", 70, 71, 100 * tree + 10 * level, 90 - 20 * level)
        for tree in range(20)
        for level in range(1 + tree % 4)
    ]
    whole = read_kineto(trace(rows)).events
    monkeypatch.setattr("hooks.readers.kineto._CHUNK_ROWS", 3)
    assert read_kineto(trace(rows)).events.equals(whole)
    assert sum(whole["duration_ns"].to_pylist()) == 20 * 90_000


def test_what_this_torch_exports(tmp_path):
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), torch.randn(2, 8)
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as profiler, record_function("mine"):
        model(x)
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    recording = read_kineto(tmp_path / "trace.json.gz")
    names = recording.events["name"].to_pylist()
    assert {"aten::addmm", "aten::relu"} <= set(names)
    assert pc.min(recording.events["duration_ns"]).as_py() >= 0
    styles = dict(zip(recording.ranges["name"].to_pylist(), recording.ranges["style"].to_pylist(), strict=True))
    assert styles["mine"] == "push_pop"
    assert {name.partition("_")[0] for name, style in styles.items() if style == "module"} == {
        "Sequential",
        "Linear",
        "ReLU",
    }
    modules = recording.ranges.filter(pc.equal(recording.ranges["style"], "module"))
    rows = attribute_to_ranges(recording, modules).to_pylist()
    owner = {row["name"]: row["range_name"] for row in rows}
    assert owner["aten::addmm"].startswith("Linear_")
    assert owner["aten::relu"].startswith("ReLU_")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete JSON file"),
        (b"kernel,duration\ngemm,5\n", "is not a complete JSON file"),
        (json.dumps({"traceEvents": CURRENT}).encode()[:-300], "is not a complete JSON file"),
        (gzip.compress(json.dumps({"traceEvents": CURRENT}).encode())[:-40], "is a damaged gzip file"),
        (b"\x1f\x8bgarbage garbage garbage", "is a damaged gzip file"),
        (b"{}", "holds no trace event"),
        (b"[1, 2]", "holds no trace event"),
        (b'{"traceEvents": []}', "holds no trace event"),
        (b'{"traceEvents": {"a": 1}}', "holds no trace event"),
        (b'{"traceEvents": [{"ts": 1e99999999999999999999999}]}', "holds a number that no trace holds"),
        (json.dumps({"traceEvents": CURRENT, "baseTimeNanoseconds": "x"}).encode(), "holds no time in baseTime"),
        (json.dumps({"traceEvents": CURRENT, "baseTimeNanoseconds": 1 << 63}).encode(), "holds no time in baseTime"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as raised:
        read_kineto(path)
    assert "\n" not in str(raised.value)


def test_an_error_does_not_quote_the_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_bytes(b'{"environment": "SECRET_TOKEN" oops}')
    with pytest.raises(TraceError) as raised:
        read_kineto(path)
    assert "SECRET" not in str(raised.value)
    path.write_bytes(b'{"environment": "SECRET_TOKEN \xff"}')
    with pytest.raises(TraceError) as raised:
        read_kineto(path)
    assert "SECRET" not in str(raised.value)


def test_an_integer_of_any_length_is_survived(tmp_path):
    digits = sys.get_int_max_str_digits()
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": CURRENT}).replace("200.333", "9" * (digits + 1)))
    recording = read_kineto(path)
    assert recording.events["name"].to_pylist() == ["Memcpy HtoD", "Memset"]
    assert sys.get_int_max_str_digits() == digits


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_kineto(tmp_path / "none.json")
    with pytest.raises(TraceError, match="cannot be read"):
        read_kineto(tmp_path)
