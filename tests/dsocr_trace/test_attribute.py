"""Traces of other tools, through the command line: what is found is what is in them, and nothing is lost."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import sqlite3
from pathlib import Path

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsocr_trace.recordings import read as recordings
from dsocr_trace.recordings.attribute import attribute_recording
from dsocr_trace.recordings.joined import Joined
from dsocr_trace.recordings.modules import read_modules
from dsocr_trace.runs.invariants import BrokenInvariantError, check_conservation
from dsocr_trace.runs.schemas import ATTRIBUTION, RECORDED_KERNELS
from hooks.nvtx_ranges import DOMAIN
from hooks.recording import RANGES, Recording
from hooks.tables import EVENTS

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
#: File: events, ns, those in a range or module, and the reasons of the others, as counted by independent
#: implementations that were checked against NVIDIA's own reports, and by hand.
KNOWN = {
    "nsys_2gpu_h100.sqlite": (5299, 541_106_145, 5268, {"no_launch_record": {"count": 31, "ns": 18_700_516}}),
    "kineto_h100_bert.json.gz": (61, 309_437, 61, {}),
    "kineto_h100_qwen_cut.json.gz": (1707, 45_647_300, 1198, {"no_launch_record": {"count": 509, "ns": 13_741_827}}),
    "kineto_b200_gptoss.json.gz": (929, 11_665_760, 909, {"outside_any_module": {"count": 20, "ns": 35_104}}),
    "ncu/kernel_0001.metrics.csv": (1, 6_750, 0, {"no_launch_record": {"count": 1, "ns": 6_750}}),
}
#: Innermost ranges of the 2-GPU file, by the same independent implementation.
INNERMOST = {
    "flash_attn::_flash_attn_forward": (66, 256_586_234),
    "aten::copy_": (2831, 69_869_064),
    "aten::addmm": (602, 57_807_320),
    "aten::mul": (501, 42_979_045),
    "ncclGroupEnd": (64, 25_179_513),
    "aten::add": (505, 23_916_556),
}
PROCESS, THREAD = 7, 9
ROOT_CLASS = "DeepseekOCRForCausalLM"


def shared_trace(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    return path


@pytest.fixture
def summary_of(invoke):
    def run(*arguments: object) -> dict:
        result = invoke("attribute", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def refused(invoke):
    """Expect a refusal, and give back its one line."""

    def run(*arguments: object, exit_code: int = 2) -> str:
        result = invoke("attribute", *arguments)
        assert result.exit_code == exit_code, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        return line

    return run


@pytest.mark.parametrize("name", KNOWN)
def test_real_traces_hold_what_is_known_of_them(summary_of, tmp_path, name):
    found = summary_of(shared_trace(name), "--output", tmp_path / "out")
    assert (found["events"], found["total_ns"], found["attributed_events"], found["unclassified"]) == KNOWN[name]
    kernels, table = (pd.read_parquet(tmp_path / "out" / f"{table}.parquet") for table in ("kernels", "attribution"))
    check_conservation(table, kernels)
    assert (len(kernels), kernels["duration_ns"].sum()) == KNOWN[name][:2]
    assert sum(row["event_count"] for row in found["modules"]) == found["attributed_events"]
    assert sum(row["self_ns"] for row in found["modules"]) == found["attributed_ns"]
    assert found["attributed_ns"] + sum(rest["ns"] for rest in found["unclassified"].values()) == found["total_ns"]


def test_a_real_trace_s_innermost_ranges(summary_of):
    rows = summary_of(shared_trace("nsys_2gpu_h100.sqlite"))["modules"]
    assert {row["module_path"]: (row["event_count"], row["self_ns"]) for row in rows[:6]} == INNERMOST


def test_a_real_trace_without_a_device_is_refused_unless_there_is_a_run_to_compare(refused):
    line = refused(shared_trace("nsys_cpu_modules.sqlite"), exit_code=1)
    assert "holds no work of a device" in line
    assert "87 ranges" in line
    assert "--run" in line


def table(schema: pa.Schema, rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in rows], schema=schema)


def recording(ranges, launches, *, style="push_pop", domain=None, tool="nsys", **more) -> Recording:
    """Ranges as (name, start, end), launches as (moment, duration)."""
    place = {"process": PROCESS, "thread": THREAD}
    events = [
        {"event_id": number, "kind": "kernel", "name": "gemm", "start_ns": at + 5, "duration_ns": duration}
        | {"device": "cuda:0", "launch_ns": at, "launch_thread": THREAD, "process": PROCESS}
        for number, (at, duration) in enumerate(launches)
    ]
    spans = [
        {"range_id": 100 + number, "name": name, "domain": domain, "style": style, "start_ns": start, "end_ns": end}
        | place
        for number, (name, start, end) in enumerate(ranges)
    ]
    return Recording(tool, None, table(EVENTS, events), table(RANGES, spans), **more)


def modules_of(*paths: str, root: str = "Net") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "module_path": ["", *paths],
            "module_class": [root, *("X" for _ in paths)],
            "analytic_layer": None,
            "parent_path": [None, *(path.rpartition(".")[0] for path in paths)],
            "depth": [0, *(path.count(".") + 1 for path in paths)],
        }
    )


def places(found) -> list[tuple]:
    rows = found.kernels.select(["stage", "step", "module_path", "unclassified_reason"]).to_pylist()
    return [tuple(row.values()) for row in rows]


def totals(found) -> dict[str, int]:
    return found.modules.set_index("module_path")["total_ns"].to_dict()


def test_with_a_run_only_its_modules_count_and_containers_sum_up():
    trace = recording(
        [("Net", 0, 100), ("a", 10, 50), ("aten::mm, op_id = 3", 20, 30), ("a.b", 32, 40), ("library", 60, 70)],
        [(25, 1), (35, 10), (65, 100), (150, 1000)],
    )
    found = attribute_recording(trace, modules_of("a", "a.b"))
    assert [row[2] for row in places(found)] == ["a", "a.b", "", "unclassified"]
    assert totals(found) == {"": 111, "a": 11, "a.b": 10}
    assert found.recorded.unmatched == ("aten::mm", "library")
    assert found.unclassified == {"outside_any_module": {"count": 1, "ns": 1000}}


def test_without_a_run_a_label_s_total_is_what_its_ranges_hold_each_event_once():
    trace = recording(
        [("step", 0, 100), ("mm, op_id = 1", 10, 50), ("mm, seq = 4, op_id = 2", 20, 40), ("add, op_id = 3", 60, 70)],
        [(5, 1), (15, 10), (30, 100), (65, 1000)],
    )
    found = attribute_recording(trace)
    assert totals(found) == {"step": 1111, "mm": 110, "add": 1000}
    assert found.modules.set_index("module_path")["self_ns"].to_dict() == {"step": 1, "mm": 110, "add": 1000}


def test_ranges_that_overlap_have_own_times_only():
    trace = recording([("x", 0, 50), ("y", 20, 80)], [(10, 1), (30, 10), (60, 100)], style="start_end")
    found = attribute_recording(trace)
    assert found.modules.set_index("module_path")["self_ns"].to_dict() == {"x": 1, "y": 110}
    assert found.modules["total_ns"].isna().all()
    assert any("no totals" in note for note in found.notes)


def test_module_calls_of_the_tool_come_before_other_ranges():
    trace = recording([("Linear_0", 0, 50), ("step", 10, 40)], [(20, 1), (60, 2)])
    styles = pa.array(["module", "push_pop"], RANGES.field("style").type)
    ranges = trace.ranges.set_column(3, RANGES.field("style"), styles)
    found = attribute_recording(Recording("torch.profiler", None, trace.events, ranges))
    assert [row[2] for row in places(found)] == ["Linear_0", "unclassified"]
    assert found.recorded.unmatched == ("step",)


VISION = "model.sam_model"
FORWARDS = [
    *[("Net", 0, 100), ("model", 10, 90), (VISION, 20, 30), ("lm_head", 92, 95)],
    *[("Net", 200, 300), ("model", 210, 290)],
    *[("Net", 400, 500), ("model", 410, 490), (VISION, 420, 430)],
]


def test_stages_follow_from_the_order_of_the_forwards():
    trace = recording(FORWARDS, [(1, 1), (25, 1), (110, 1), (215, 1), (310, 1), (425, 1), (500, 1)], domain=DOMAIN)
    expected = [
        ("prefill", 0, "", None),
        ("vision", 0, VISION, None),
        ("prefill", 0, "unclassified", "outside_any_module"),
        ("decode", 1, "model", None),
        ("decode", 1, "unclassified", "outside_any_module"),
        ("vision", 0, VISION, None),
        ("prefill", 0, "unclassified", "outside_any_module"),
    ]
    for modules in (None, modules_of("model", VISION, "lm_head")):
        found = attribute_recording(trace, modules)
        assert places(found) == expected
        assert found.kernels["page"].to_pylist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_trace_that_begins_with_decode_steps_has_no_prefill_there():
    trace = recording(FORWARDS[4:], [(215, 1), (415, 1)], domain=DOMAIN)
    found = attribute_recording(trace, modules_of("model", VISION, "lm_head"))
    assert places(found) == [("decode", None, "model", None), ("prefill", 0, "model", None)]
    assert any("begins after a prefill" in note for note in found.notes)
    only_decode = attribute_recording(recording(FORWARDS[4:6], [(215, 1)], domain=DOMAIN), modules_of("model", VISION))
    assert places(only_decode) == [("decode", None, "model", None)]


def test_a_module_outside_every_forward_leaves_the_stages_open():
    trace = recording([*FORWARDS, ("lm_head", 600, 610)], [(25, 1), (215, 1), (605, 1)], domain=DOMAIN)
    found = attribute_recording(trace, modules_of("model", VISION, "lm_head"))
    assert [row[:3] for row in places(found)] == [
        ("vision", None, VISION), ("other", None, "model"), ("other", None, "lm_head"),
    ]  # fmt: skip
    assert any("not told apart" in note for note in found.notes)


def test_forwards_at_the_same_time_leave_the_stages_open():
    other = [(name, start + 7, end + 7) for name, start, end in FORWARDS]
    trace = recording([*FORWARDS, *other], [(25, 1), (215, 1)], domain=DOMAIN)
    threads = pa.array([THREAD] * len(FORWARDS) + [THREAD + 1] * len(other))
    ranges = trace.ranges.set_column(5, RANGES.field("thread"), threads)
    found = attribute_recording(Recording("nsys", None, trace.events, ranges))
    assert [row[:3] for row in places(found)] == [("vision", None, VISION), ("other", None, "model")]
    assert any("forwards overlap" in note for note in found.notes)


def test_a_trace_of_this_tool_names_its_own_tree():
    found = read_modules(recording([("Net", 0, 100), ("a.b.c", 10, 20)], [(15, 1)], domain=DOMAIN))
    assert found.modules["module_path"].tolist() == ["", "a", "a.b", "a.b.c"]
    assert found.modules["parent_path"].tolist()[1:] == ["", "a", "a.b"]
    assert found.ranges["name"].to_pylist() == ["", "a.b.c"]


def test_a_range_that_is_never_closed_lasts_to_the_end():
    found = attribute_recording(recording([("a", 0, None), ("b", 10, 20)], [(30, 2)]))
    assert places(found)[0][2] == "a"
    assert found.table.set_index("module_path").loc["a", "wall_total_ns"] == 35


def test_the_sums_are_checked(monkeypatch):
    from dsocr_trace.recordings import attribute  # noqa: PLC0415

    whole = attribute.attribution_table
    monkeypatch.setattr(attribute, "attribution_table", lambda *given: whole(*given[:2], given[2].iloc[1:], given[3]))
    with pytest.raises(BrokenInvariantError, match="the ledger holds"):
        attribute_recording(recording([("a", 0, 10)], [(1, 1), (2, 2)]))


def test_names_that_no_rule_knows_are_told_the_longest_time_first():
    known = recording([("a", 0, 100)], [(10, 5), (20, 7), (30, 9)])
    assert not any("no rule" in note for note in attribute_recording(known).notes)
    names = pa.array(["gemm", "qqq", "x" * 500])
    place = known.events.schema.get_field_index("name")
    field = known.events.schema.field(place)
    unknown = attrs.evolve(known, events=known.events.set_column(place, field, names.cast(field.type)))
    (note,) = [note for note in attribute_recording(unknown).notes if "no rule" in note]
    assert note.startswith("2 events ")
    assert note.endswith(f"'{'x' * 100}', 'qqq'")


def test_events_without_any_range_are_refused_and_counters_are_not(refused, tmp_path):
    assert "no range in this nsys recording" in refused(nsys_export(tmp_path / "t.sqlite", [], [(5, 1)]), exit_code=1)
    found = attribute_recording(recording([], [(5, 1)], tool="ncu", counters={"dram__bytes.sum": pa.array([1.0])}))
    assert found.attributed_events == 0


# Traces of a run of this tool, made from what the run itself recorded.


def nsys_export(path: Path, ranges, launches=(), *, domain=DOMAIN) -> Path:
    """Write an Nsight Systems export: ranges as (name, start, end), kernels as (launch, duration)."""
    thread = 1 << 48 | PROCESS << 24 | THREAD
    process = 1 << 48 | PROCESS << 24
    with sqlite3.connect(path) as file:
        file.executescript(
            "CREATE TABLE StringIds (id INT, value TEXT); INSERT INTO StringIds VALUES (1, 'gemm');"
            "CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, globalTid INT, domainId INT, text TEXT);"
            "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, globalTid INT, correlationId INT);"
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT,"
            " correlationId INT, globalPid INT, demangledName INT);"
        )
        file.execute("INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, ?, 1, ?)", (thread, domain))
        file.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, 59, ?, 1, ?)",
            [(int(start), int(end), thread, name) for name, start, end in ranges],
        )
        for number, (at, duration) in enumerate(launches, start=1):
            start = int(at) + 1
            file.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?)", (int(at), thread, number))
            file.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 7, ?, ?, 1)",
                (start, start + int(duration), number, process),
            )
    file.close()
    return path


def traced_calls(run) -> pd.DataFrame:
    return run.calls[run.calls["pass"] == "traced"]


def ranges_of(calls: pd.DataFrame) -> list[tuple]:
    return [(row.module_path or ROOT_CLASS, row.start_ns, row.end_ns) for row in calls.itertuples()]


def launches_of(run) -> list[tuple[int, int]]:
    """Moments in the traced pass for the events of the profiled pass: at the start of the same call."""
    key = ["page", "step", "module_path"]
    traced = traced_calls(run).assign(nth=lambda rows: rows.groupby(key).cumcount())
    profiled = run.calls[run.calls["pass"] == "profiled"].assign(nth=lambda rows: rows.groupby(key).cumcount())
    start = profiled.merge(traced, on=[*key, "nth"], suffixes=("", "_traced")).set_index("call_id")["start_ns_traced"]
    ends = traced[traced["parent_call_id"].isna()].set_index(["page", "step"])["end_ns"]
    return [
        (
            ends[event.page, event.step] + 1 if np.isnan(event.call_id) else start[event.call_id],
            event.duration_ns,
        )
        for event in run.kernels.itertuples()
    ]


@pytest.fixture(scope="module")
def run(finished):
    return finished[0]


def test_ranges_alone_agree_with_the_calls_of_their_run(run, summary_of, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", ranges_of(traced_calls(run)))
    beside = summary_of(trace, "--run", run.path)["calls_beside_run"]
    assert (beside["withheld"], beside["modules_differing"], beside["event_share"]) == (None, 0, 1.0)
    assert beside["modules"] == len(traced_calls(run).groupby(["stage", "module_path"]))


def test_one_call_less_withholds_the_verdict(run, summary_of, tmp_path):
    calls = traced_calls(run)
    removed = calls[calls["module_path"] == "model.norm"].iloc[-1]
    trace = nsys_export(tmp_path / "t.sqlite", ranges_of(calls.drop(removed.name)))
    found = summary_of(trace, "--run", run.path)
    (row,) = found["calls_beside_run"]["differing"]
    assert (row["stage"], row["module_path"]) == (removed["stage"], "model.norm")
    assert row["our_events"] - row["their_events"] == 1
    assert "100% needed" in found["calls_beside_run"]["withheld"]
    assert any("predictions are left out" in note for note in found["notes"])


def test_events_of_a_run_come_to_where_the_run_put_them(run, summary_of, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", ranges_of(traced_calls(run)), launches_of(run))
    found = summary_of(trace, "--run", run.path, "--output", tmp_path / "out")
    assert found["events_beside_run"]["withheld"] is None
    assert (found["events_beside_run"]["event_share"], found["events_beside_run"]["modules_differing"]) == (1.0, 0)
    key, sums = ["stage", "module_path"], ["calls", "event_count", "measured_self_ns", "measured_total_ns"]
    theirs = pd.read_parquet(tmp_path / "out" / "attribution.parquet").set_index(key)
    ours = run.attribution.set_index(key)
    pd.testing.assert_frame_equal(theirs[sums].sort_index(), ours[sums].sort_index())
    predicted = ["predicted_self_ns", "tensor_flops", "bytes_total"]
    pd.testing.assert_frame_equal(theirs[predicted].sort_index(), ours[predicted].sort_index())


def test_a_trace_of_this_tool_needs_no_run(run, summary_of, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", ranges_of(traced_calls(run)), launches_of(run))
    alone, beside = summary_of(trace), summary_of(trace, "--run", run.path)
    assert alone["stages"] == beside["stages"]
    called = [[row for row in found["modules"] if row["calls"]] for found in (alone, beside)]
    assert sorted(called[0], key=str) == sorted(called[1], key=str)


def test_another_run_is_refused_by_name(run, refused, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", [("Net", 0, 9), ("tower.0", 1, 5), ("tower.1", 6, 8)])
    line = refused(trace, "--run", run.path)
    assert "'Net', 'tower.0', 'tower.1'" in line
    assert "give the run that was recorded with --run, or leave --run out" in line
    # Foreign ranges one of which is a module's path by chance, as in another domain.
    foreign = [("model", 0, 9), *((f"step {number}", 10 + number, 11 + number) for number in range(30))]
    assert "'step 0'" in refused(nsys_export(tmp_path / "u.sqlite", foreign, domain="x"), "--run", run.path)


def test_a_broken_run_is_refused(run, refused, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", ranges_of(traced_calls(run)))
    assert "is not a run directory" in refused(trace, "--run", tmp_path)
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "modules.parquet").unlink()
    assert "modules.parquet is missing" in refused(trace, "--run", copy)


def test_counters_stand_beside_the_prediction_of_their_module(run, summary_of, tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    head = ["ID", "Process ID", "Kernel Name", "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg"]
    nvtx = [f'"{DOMAIN}:{name}:none:none:none:none:none:none"' for name in (ROOT_CLASS, path)]
    rows = [
        [*head, "gpu__time_duration.sum", "dram__bytes_read.sum"],
        ["", "", "", "", "ns", "byte"],
        *([launch, PROCESS, "gemm", f"{THREAD} {' '.join(nvtx)}", 100 + launch, 5000] for launch in (0, 1)),
    ]
    trace = tmp_path / "result.csv"
    with trace.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = summary_of(trace, "--run", run.path, "--output", tmp_path / "out")
    assert found["counters"] == ["gpu__time_duration.sum", "dram__bytes_read.sum"]
    counters = pd.read_parquet(tmp_path / "out" / "counters.parquet")
    assert counters["module_path"].tolist() == [path, path]
    assert counters["launch"].tolist() == [0, 1]
    assert counters["duration_ns"].tolist() == counters["gpu__time_duration.sum"].tolist() == [100, 101]
    assert counters["dram__bytes_read.sum"].tolist() == [5000.0, 5000.0]
    of_module = run.predictions[run.predictions["module_path"] == path]
    flops = (of_module["tensor_flops"] + of_module["vector_flops"]).sum() / of_module["calls"].sum()
    assert counters["predicted_flops_per_call"].tolist() == [flops, flops]


def test_every_key_of_the_summary_is_documented():
    found = Joined(attribute_recording(recording([("a", 0, 10)], [(5, 3)]))).summary()
    page = (Path(__file__).parents[2] / "docs" / "external-traces.md").read_text(encoding="utf-8")
    lines = [line for line in page.partition("## Summary")[2].splitlines() if line.startswith("| `")]
    assert [key for line in lines for key in re.findall(r"`(\w+)`", line.split("|")[1])] == list(found)


# Files.


def test_bad_files_are_one_line_each(refused, tmp_path):
    files = {
        "empty.sqlite": (b"", "is empty"),
        "text.json": (b"nothing of use\n", "is of no kind that can be read"),
        "cut.sqlite": (b"SQLite format 3\0" + bytes(50), "cannot be read"),
        "cut.json": (b'{"traceEvents": [{"ph"', "is not a complete JSON file"),
        "cut.json.gz": (gzip.compress(b'{"traceEvents": []}' * 99)[:40], "is a damaged gzip file"),
        "other.csv": (b"ID,Name\n1,x\n", "is of no kind that can be read"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        assert expected in refused(tmp_path / name), name
    assert "is a directory" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "absent.sqlite")


@pytest.mark.parametrize(("suffix", "tool"), [(".nsys-rep", "nsys"), (".ncu-rep", "ncu")])
def test_a_report_needs_the_program_that_reads_it(refused, tmp_path, monkeypatch, suffix, tool):
    monkeypatch.setattr(recordings, "find_tool", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / f"t{suffix}").write_bytes(b"report")
    line = refused(tmp_path / f"t{suffix}", exit_code=1)
    assert f"needs the program {tool}" in line
    assert "where it was recorded, run: " in line


def test_an_empty_trace_is_a_failed_job(refused, tmp_path):
    (tmp_path / "t.json").write_text('{"traceEvents": []}')
    assert "holds no trace event" in refused(tmp_path / "t.json", exit_code=1)
    assert "holds no work of a device" in refused(nsys_export(tmp_path / "t.sqlite", []), exit_code=1)


def test_the_content_tells_the_kind(summary_of, tmp_path):
    trace = nsys_export(tmp_path / "trace.json", [("a", 0, 10)], [(5, 3)], domain="x")
    assert summary_of(trace)["tool"] == "nsys"
    event = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 5, "dur": 1, "args": {"device": 0}}
    span = {"ph": "X", "cat": "user_annotation", "name": "a", "pid": 1, "tid": 1, "ts": 0, "dur": 9}
    (tmp_path / "trace.sqlite").write_text("\n" + json.dumps({"traceEvents": [event, span]}))
    assert summary_of(tmp_path / "trace.sqlite")["tool"] == "torch.profiler"


def test_what_is_written_has_the_stated_schemas_and_is_not_replaced_unasked(invoke, refused, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", [("a|b", 0, 10)], [(5, 3)], domain="x")
    out = tmp_path / "deep" / "out"
    assert invoke("attribute", trace, "--output", out).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "attribution.json", "attribution.md", "attribution.parquet", "kernels.parquet",
    ]  # fmt: skip
    for name, schema in (("kernels", RECORDED_KERNELS), ("attribution", ATTRIBUTION)):
        assert pq.read_schema(out / f"{name}.parquet").remove_metadata().equals(schema)
    assert "| a\\|b | 1 | 3 ns | 100.0% | 3 ns |" in (out / "attribution.md").read_text()
    (out / "mark").touch()
    assert "--force" in refused(trace, "--output", out)
    assert (out / "mark").exists()
    assert invoke("attribute", trace, "--output", out, "--force").exit_code == 0
    assert not (out / "mark").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_force_replaces_nothing_but_an_attribution(refused, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", [("a", 0, 10)], [(5, 3)], domain="x")
    assert "holds no attribution.json" in refused(trace, "--output", tmp_path, "--force")
    assert trace.exists()


def test_a_failure_leaves_nothing_behind(refused, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", [])
    refused(trace, "--output", tmp_path / "out", exit_code=1)
    assert [path.name for path in tmp_path.iterdir()] == [trace.name]


def test_the_terminal_shows_modules_reasons_and_coverage(invoke, tmp_path):
    trace = nsys_export(tmp_path / "t.sqlite", [("a", 0, 10)], [(5, 3000), (50, 1000)], domain="x")
    shown = invoke("attribute", trace).stdout
    assert "nsys: 2 events, 4 µs" in shown
    assert "1 of them in modules, coverage 75.0% of the time" in shown
    assert "outside_any_module" in shown


def test_large_times_stay_exact():
    unix = 1_760_000_000_123_456_789
    found = attribute_recording(recording([("a", unix, unix + 10)], [(unix + 3, 7)]))
    assert found.kernels["launch_ns"].to_pylist() == [unix + 3]
    assert found.recorded.calls["start_ns"].tolist() == [unix]
