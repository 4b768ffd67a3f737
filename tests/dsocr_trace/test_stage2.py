"""What Stage 2 makes of a GPU's recording: a real run's calls as ranges, and made-up kernels inside of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from analytic.errors import DsocrTraceError
from dsocr_trace.commands.run import require_stage2
from dsocr_trace.recordings.stage2 import Stage2, _Capture, _with_counters, _with_events
from dsocr_trace.runs.schemas import STAGE2_TABLES
from dsocr_trace.runs.store import RunWriter, load
from hooks import nsight
from hooks.nvtx_ranges import DOMAIN
from hooks.recording import RANGES, Recording
from hooks.tables import EVENTS

GEMM, ADD = "void gemm<float>(float *)", "void add(float *)"


def table(schema, count, **columns):
    return pa.table({name: columns.get(name, [None] * count) for name in schema.names}, schema=schema)


@pytest.fixture(scope="module")
def calls(finished):
    run, _ = finished
    return run.calls[run.calls["pass"] == "traced"]


@pytest.fixture(scope="module")
def recording(finished, calls):
    """Every call as a range, with one kernel launched at its start; and one kernel after all of them."""
    run, _ = finished
    root = run.modules["module_class"].iloc[0]
    count = len(calls)
    ranges = table(
        RANGES,
        count,
        range_id=np.arange(count),
        name=[path or root for path in calls["module_path"]],
        domain=[DOMAIN] * count,
        style=["push_pop"] * count,
        process=[1] * count,
        thread=[2] * count,
        start_ns=calls["start_ns"].to_numpy(),
        end_ns=calls["end_ns"].to_numpy(),
    )
    launch = np.append(calls["start_ns"].to_numpy(), calls["end_ns"].max() + 10)
    events = table(
        EVENTS,
        count + 1,
        event_id=np.arange(count + 1),
        kind=["kernel"] * (count + 1),
        name=[GEMM if number % 2 else ADD for number in range(count + 1)],
        start_ns=launch + 1,
        duration_ns=np.full(count + 1, 100),
        device=["cuda:0"] * (count + 1),
        launch_ns=launch,
        launch_thread=[2] * (count + 1),
        process=[1] * (count + 1),
    )
    return Recording("nsys", "2024.2", events, ranges)


@pytest.fixture
def found(calls):
    rows = calls.groupby(["stage", "module_path"]).size().rename("calls").reset_index()
    return Stage2({"tools": {"nsys": "2024.2"}}, {"stage2": rows.assign(ranges=rows["calls"], agrees=True)})


def test_device_work_is_compared_over_the_forwards_that_stage_1_profiled(finished, recording, found):
    run, _ = finished
    kernels = pa.Table.from_pandas(run.kernels)
    made = _with_events(found, recording, SimpleNamespace(kernels=kernels), run.modules)
    rows = made.tables["stage2"].set_index(["stage", "module_path"])
    theirs = rows["stage2_event_count"]
    # Three of seven decode steps were profiled; vision and prefill whole.
    share = np.where(rows.index.get_level_values("stage") == "decode", 3, 1)
    steps = np.where(rows.index.get_level_values("stage") == "decode", 7, 1)
    whole = ~rows.index.get_level_values("module_path").str.contains(".mlp", regex=False)  # experts: as they are routed
    assert np.array_equal((theirs * steps)[whole], (rows["calls"] * share)[whole])
    assert np.array_equal(rows["stage2_self_ns"], theirs * 100)
    ours = (
        run.kernels[run.kernels["call_id"].notna()]
        .groupby(["stage", "module_path"])["duration_ns"]
        .agg(["size", "sum"])
    )
    assert rows["stage1_event_count"].sum() == ours["size"].sum()
    assert rows["stage1_self_ns"].sum() == ours["sum"].sum()
    assert made.summary["attribution"]["events"] == recording.events.num_rows
    assert made.summary["attribution"]["unclassified"] == {"outside_any_module": {"count": 1, "ns": 100}}
    assert made.summary["events_agreement"]["withheld"]


def capture(tmp_path):
    return _Capture(tmp_path / "stage2.nsys-rep", ["python", "job"], 1, is_private=True)


def fake_ncu(tmp_path, monkeypatch, body):
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\ntest $1 = --version && echo Version 2024.1.0 && exit\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_counters_become_a_table_that_can_be_written(tmp_path, monkeypatch, finished, recording, found):
    run, _ = finished
    root = run.modules["module_class"].iloc[0]
    column = "Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg,Push/Pop_Range"
    stack = f'7  ""dsocr-trace:{root}:n:n:n:n:n:n""  ""dsocr-trace:lm_head:n:n:n:n:n:n""'
    names = [
        "ID",
        "Process ID",
        "Kernel Name",
        "Stream",
        "Device",
        column,
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
    ]
    rows = [names, [*[""] * 6, "nsecond", "byte"], ["0", "7", GEMM, "7", "0", stack, "50", "4096"]]
    (tmp_path / "raw.csv").write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    body = f"case $* in *--import*) cat {tmp_path}/raw.csv;; *) : > {tmp_path}/counters.ncu-rep;; esac"
    fake_ncu(tmp_path, monkeypatch, body)
    made = _with_counters(found, capture(tmp_path), recording, run.modules, lambda *_: None)
    assert made.summary["tools"] == {"nsys": "2024.2", "ncu": "2024.1.0"}
    writer = RunWriter(tmp_path, "written")
    writer.table("counters", made.tables["counters"])
    writer.manifest({})
    rows = load(writer.publish()).counters
    assert list(rows.columns) == STAGE2_TABLES["counters"].names
    assert rows[["module_path", "traced_ns", "duration_ns", "dram_read_bytes"]].iloc[0].tolist() == [
        "lm_head",
        100,
        50,
        4096,
    ]


def test_refused_counters_leave_one_note_and_all_else(tmp_path, monkeypatch, finished, recording, found):
    fake_ncu(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    made = _with_counters(found, capture(tmp_path), recording, finished[0].modules, lambda *_: None)
    (note,) = made.notes
    assert "NVreg_RestrictProfilingToAdminUsers=0" in note
    assert made.tables.keys() == {"stage2"}


def test_a_missing_ncu_leaves_one_note(tmp_path, monkeypatch, finished, recording, found):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_FOLDERS", ())
    made = _with_counters(found, capture(tmp_path), recording, finished[0].modules, lambda *_: None)
    assert [note.partition(" (")[0] for note in made.notes] == ["no hardware counters: Nsight Compute"]


@pytest.mark.parametrize("stage2", [None, {"tools": {}}])
def test_a_run_without_a_failure_of_stage_2_is_fine(tmp_path, stage2):
    (tmp_path / "run.json").write_text(json.dumps({"stage2": stage2}))
    require_stage2(tmp_path, "2")


def test_stage_2_asked_for_by_number_must_succeed(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"stage2": {"failure": "why"}}))
    with pytest.raises(DsocrTraceError, match="no stage 2: why"):
        require_stage2(tmp_path, "2")


def test_for_all_stages_a_failure_is_a_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"stage2": {"failure": "why"}}))
    require_stage2(tmp_path, "all")
    assert capsys.readouterr().err == "dsocr-trace: no stage 2: why\n"
