"""Command line and joining of hardware counters, on launches that the tests make up: no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hooks.errors import TraceError
from hooks.nsight import Tool
from hooks.readers.ncu import read_ncu
from hooks.tables import EVENTS
from stage_runners.counters import METRICS, counters_table, measure, ncu_command, top_kernels

GEMM = "void gemm<float, (int)2>(T1 *, long (*)[4])"
ADD = "void add<4>(float *)"


def events(*rows):
    """Events (kind, name, start, duration)."""
    columns = dict.fromkeys(EVENTS.names, [None] * len(rows)) | {
        "event_id": list(range(len(rows))),
        "device": ["cuda:0"] * len(rows),
        **dict(zip(("kind", "name", "start_ns", "duration_ns"), map(list, zip(*rows, strict=True)), strict=True)),
    }
    return pa.table(columns, schema=EVENTS)


TRACED = events(
    ("kernel", GEMM, 100, 40), ("kernel", ADD, 200, 5), ("memcpy", "Memcpy HtoD", 250, 900),
    ("kernel", GEMM, 300, 60), ("kernel", ADD, 400, 7),
)  # fmt: skip


def tool(path="ncu"):
    return Tool("ncu", Path(path), "2024.1.0")


def sheet(tmp_path, *launches):
    """A CSV of ncu's raw page: launches (name, module's range, duration, percent of the tensor pipe)."""
    metrics = ["gpu__time_duration.sum", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"]
    column = "Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg,Push/Pop_Range"
    lines = [f'"ID","Process ID","Kernel Name","Stream","Device","{column}","{metrics[0]}","{metrics[1]}"']
    lines.append('"","","","","","","nsecond","%"')
    for number, (name, path, duration, percent) in enumerate(launches):
        stack = f'7  ""dsocr-trace-capture:capture:none:none:none:none:none:none""  ""dsocr-trace:{path}:n:n:n:n:n:n""'
        lines.append(f'"{number}","7","{name}","7","0","{stack}","{duration}","{percent}"')
    path = tmp_path / "raw.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def module_ranges(recording, path):
    return recording.ranges.filter(pa.compute.equal(recording.ranges["name"], path))


def test_the_heaviest_kernels_by_summed_time():
    assert top_kernels(TRACED, 8) == [GEMM, ADD]
    assert top_kernels(TRACED, 1) == [GEMM]


def test_the_command_measures_the_chosen_kernels_inside_the_recorded_range():
    command = ncu_command(tool(), Path("out.ncu-rep"), ["python", "job.py"], [GEMM, ADD], 12)
    assert command[0] == "ncu"
    assert command[-2:] == ["python", "job.py"]
    assert "--nvtx-include=dsocr-trace-capture@capture/" in command
    assert "--launch-count=12" in command
    (pattern,) = [word.partition("regex:")[2] for word in command if word.startswith("--kernel-name=")]
    for name in (GEMM, ADD, GEMM.replace(", ", ",")):
        assert re.search(pattern, name), name
    assert not re.search(pattern, f"{ADD} [clone]")
    (metrics,) = [word.partition("=")[2] for word in command if word.startswith("--metrics=")]
    assert metrics.split(",") == list(METRICS)


def test_launches_are_joined_by_name_and_place(tmp_path):
    # Another demangler's blanks; the third launch of a name was never traced.
    spaced = GEMM.replace(", ", ",")
    launches = [
        (spaced, "layers.0", 50, 80),
        (ADD, "layers.0", 6, 0),
        (spaced, "layers.1", 70, 90),
        (spaced, "layers.1", 1, 1),
    ]
    measured = read_ncu(sheet(tmp_path, *launches))
    ranges = pa.concat_tables([module_ranges(measured, "layers.0"), module_ranges(measured, "layers.1")])
    rows = counters_table(measured, TRACED, ranges)
    assert list(rows["launch"]) == [0, 0, 1, 2]
    assert list(rows["traced_ns"][:3]) == [40, 5, 60]
    assert np.isnan(rows["traced_ns"][3])
    assert list(rows["module_path"]) == ["layers.0", "layers.0", "layers.1", "layers.1"]
    assert list(rows["duration_ns"]) == [50, 6, 70, 1]
    assert rows["tensor_pipe_share_of_peak"][0] == pytest.approx(0.8)
    assert rows["dram_read_bytes"].isna().all()


def fake(tmp_path, *lines, exit_code=1):
    path = tmp_path / "ncu"
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {exit_code}\n")
    path.chmod(0o755)
    return tool(path)


def test_counters_that_the_driver_refuses_are_explained(tmp_path):
    ncu = fake(tmp_path, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters")
    with pytest.raises(TraceError, match="NVreg_RestrictProfilingToAdminUsers=0"):
        measure(ncu, [str(ncu.path)], tmp_path / "out.ncu-rep")


def test_an_empty_measurement_is_an_error_with_what_was_said(tmp_path):
    ncu = fake(tmp_path, "program output", "==WARNING== No kernels were profiled.", exit_code=0)
    with pytest.raises(TraceError, match=r"measured nothing \(No kernels were profiled.\)"):
        measure(ncu, [str(ncu.path)], tmp_path / "out.ncu-rep")
