"""Stage 2 with the real Nsight Systems, where it is here; and what is said where it is not. No GPU is needed."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dsocr_trace.runs.store import load
from hooks.errors import TraceError
from hooks.nsight import Tool, find_tool, isolation
from hooks.readers.nsys import read_nsys_report
from stage_runners.stage2 import nsys_command, record

NSYS = find_tool("nsys")
SECRETS = {
    "DEMO_PASSWORD": "hunter2-do-not-record",
    "HF_TOKEN": "hf_do-not-record",
    "PLAIN_VARIABLE": "not-even-this-one",
    "CUDA_API_KEY": "nor-this-one",
}

needs_nsys = pytest.mark.skipif(NSYS is None, reason="Nsight Systems is not here: make nsys")
needs_namespaces = pytest.mark.skipif(not isolation(), reason="unshare cannot make namespaces here, so none is kept")


def run(folder, *arguments, **environment):
    command = [
        sys.executable, "-m", "dsocr_trace", "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--quiet",
        "--output", str(folder), "--run-id", "run", "--max-new-tokens", "3", "--json", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)  # noqa: S603


def exported_to(folder, finished):
    """The kept recording as SQLite."""
    path = folder / "report.sqlite"
    export = [NSYS.path, "export", "--type", "sqlite", "--output", path, finished.path / "stage2.nsys-rep"]
    subprocess.run(export, capture_output=True, check=True)  # noqa: S603
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with both stages, started from an environment that holds secrets."""
    folder = tmp_path_factory.mktemp("results")
    result = run(folder, "--stage", "2", **SECRETS)
    assert result.returncode == 0, result.stderr
    return load(folder / "run")


@needs_nsys
def test_every_call_has_its_range(finished):
    rows = finished.stage2
    assert rows["agrees"].all()
    graph = finished.callgraph.groupby(["stage", "child_path"])["call_count"].sum()
    assert rows.set_index(["stage", "module_path"])["ranges"].sort_index().to_dict() == graph.to_dict()
    assert finished.manifest["stage2"]["agreement"] == {
        "modules": len(graph), "modules_differing": 0, "calls": graph.sum(), "ranges": graph.sum(),
    }  # fmt: skip


@needs_nsys
@needs_namespaces
def test_nothing_but_the_generation_is_recorded(finished):
    recording = read_nsys_report(finished.path / "stage2.nsys-rep", NSYS.path)
    names = recording.ranges["name"].to_pylist()
    # One prefill and two decode steps: the warm-up is not there, nor is loading.
    assert names.count("DeepseekOCRForCausalLM") == 3
    assert names.count("capture") == 1
    captured = finished.manifest["stage2"]["captured"]
    assert captured["ranges_of_modules"] + captured["other_ranges"] == len(names)
    assert captured["other_ranges"] == 1


@needs_nsys
def test_the_manifest_says_what_recorded_it_and_at_what_cost(finished):
    stage2 = finished.manifest["stage2"]
    assert stage2["tools"] == {"nsys": NSYS.version}
    assert stage2["captured"]["report_bytes"] > 0
    overhead = stage2["overhead"]
    assert overhead["ratio"] == pytest.approx(overhead["captured_ns"] / overhead["traced_ns"])
    assert overhead["captured_ns"] > 0


@needs_nsys
@needs_namespaces
def test_ranges_carry_stage_and_step(finished, tmp_path):
    exported = exported_to(tmp_path, finished)
    named = "names.eventType = 33 AND names.domainId = calls.domainId AND names.category = calls.category"
    query = f"SELECT names.text, calls.int64Value FROM NVTX_EVENTS calls JOIN NVTX_EVENTS names ON {named}"  # noqa: S608
    with contextlib.closing(sqlite3.connect(exported)) as file:
        rows = pd.read_sql_query(f"{query} WHERE calls.eventType = 59 ORDER BY calls.start", file)
    stages = finished.callgraph.groupby("stage")["call_count"].sum()
    assert rows["text"].value_counts().to_dict() == stages.to_dict()
    assert list(rows["int64Value"].dropna()) == [0, 1, 2]


@needs_nsys
@needs_namespaces
def test_no_secret_is_in_any_file(finished, tmp_path):
    exported = exported_to(tmp_path, finished)
    files = [exported, *(path for path in finished.path.rglob("*") if path.is_file())]
    assert finished.path / "stage2.nsys-rep" in files
    for path in files:
        content = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, (path.name, name)
            assert name.encode() not in content, (path.name, name)
    for path in finished.path.glob("*.parquet"):
        text = pd.read_parquet(path).astype(str).to_csv()
        assert not any(value in text for value in SECRETS.values())
    # The scan would see them: it sees what is passed on.
    assert os.environ["PATH"].encode() in exported.read_bytes()


@needs_nsys
def test_a_recording_that_saw_other_processes_is_not_kept(tmp_path):
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run(tmp_path, "--stage", "2", "--max-new-tokens", "1", PATH=path)
    assert result.returncode == 0, result.stderr
    made = load(tmp_path / "run")
    assert not list(made.path.glob("*.nsys-rep"))
    assert any("--keep-capture" in note for note in made.manifest["notes"])


@needs_nsys
def test_the_recording_need_not_be_kept(tmp_path):
    result = run(tmp_path, "--stage", "all", "--no-keep-capture", "--max-new-tokens", "1")
    assert result.returncode == 0, result.stderr
    made = load(tmp_path / "run")
    assert made.manifest["stage2"]["captured"]["report"] is None
    assert not list(made.path.glob("*.nsys-rep"))
    assert made.stage2["agrees"].all()


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """An Nsight Systems that fails."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "nsys"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo version 2024.1.1 || { echo "Failed: no ptrace"; exit 1; }\n'
    )
    program.chmod(0o755)
    return program


def test_a_profiler_that_fails_keeps_the_rest_of_the_run(tmp_path, silent):
    result = run(tmp_path, "--stage", "2", PATH=f"{silent.parent}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("dsocr-trace:")]
    assert "Failed: no ptrace" in line
    made = load(tmp_path / "run")
    assert "no ptrace" in made.manifest["stage2"]["failure"]
    assert any("no ptrace" in note for note in made.manifest["notes"])
    assert json.loads(result.stdout)["tokens"] == made.manifest["pages"][0]["tokens"]
    with pytest.raises(AttributeError, match="--stage 2"):
        _ = made.stage2


def test_what_the_profiler_said_is_in_the_error(tmp_path, silent):
    with pytest.raises(TraceError, match=r"recorded nothing \(Failed: no ptrace\).*status -e"):
        record(Tool("nsys", silent, "2024.1.1"), tmp_path / "out.nsys-rep", ["true"], cuda=False)


def test_on_a_gpu_cuda_is_traced_and_starts_the_recording():
    command = nsys_command(Tool("nsys", Path("nsys"), "2024.1"), Path("out.nsys-rep"), ["python", "job"], cuda=True)
    assert command[:2] == ["nsys", "profile"]
    assert command[-2:] == ["python", "job"]
    assert {"--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--cuda-graph-trace=node"} < set(command)


def test_without_a_gpu_a_range_starts_the_recording():
    command = nsys_command(Tool("nsys", Path("nsys"), "2024.1"), Path("out.nsys-rep"), ["python", "job"], cuda=False)
    assert {"--trace=nvtx", "--nvtx-capture=capture@dsocr-trace-capture", "--capture-range-end=stop"} < set(command)
    assert not [word for word in command if "cuda" in word]
