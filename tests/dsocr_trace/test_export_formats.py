"""What runs become for other tools: Perfetto, speedscope, Graphviz and CSV. Sums must be those of the ledger."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import socket
import subprocess
import zipfile
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsocr_trace.exports.analytic_report import walk
from dsocr_trace.exports.builder import run_report
from dsocr_trace.exports.files import RUN_FORMATS
from dsocr_trace.exports.perfetto import _one_after_the_other, perfetto_trace
from dsocr_trace.runs.schemas import KERNELS, TABLES
from dsocr_trace.runs.store import load
from hooks.attribution import attribute_to_ranges, ranges_of_modules
from hooks.readers.kineto import read_kineto

#: The schema that speedscope publishes; its licence is beside it.
SPEEDSCOPE = Path(__file__).with_name("speedscope") / "file-format-schema.json"
DOT = shutil.which("dot")
EVENTS = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}
KEY = ["stage", "module_path"]


@pytest.fixture(scope="module")
def cpu_run(finished):
    return finished[0]


@pytest.fixture(scope="module")
def cuda_run(cpu_run, tmp_path_factory):
    """The same run as if on a GPU: its operators are kernels on two streams, where they overlap; two have no launch."""
    folder = tmp_path_factory.mktemp("cuda") / "run"
    shutil.copytree(cpu_run.path, folder)
    kernels = cpu_run.kernels.sort_values("start_ns", ignore_index=True)
    number = np.arange(len(kernels))
    alone = np.isin(number, [3, 70])
    kernels = kernels.assign(
        kind=np.choose(number % 9 % 3, ["kernel", "memcpy", "memset"]),
        device=np.where(number % 5, "cuda:0", "cuda:1"),
        stream=np.where(number % 2, 7, 13),
        launch_ns=kernels["launch_ns"].mask(alone),
        launch_thread=kernels["launch_thread"].mask(alone),
        start_ns=kernels["start_ns"] + 4000,
        correlation_id=number + 100,
        call_id=kernels["call_id"].mask(alone),
        module_path=kernels["module_path"].mask(alone, "unclassified"),
        unclassified_reason=kernels["unclassified_reason"].mask(alone, "no_launch_record"),
    )
    pq.write_table(pa.Table.from_pandas(kernels, schema=KERNELS, preserve_index=False), folder / "kernels.parquet")
    return load(folder)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def traced(request, cpu_run, cuda_run):
    """A run and its Chrome trace, numbers exact."""
    run = {"cpu": cpu_run, "cuda": cuda_run}[request.param]
    return run, json.loads(perfetto_trace(run), parse_float=Decimal)["traceEvents"]


def nanoseconds(microseconds) -> int:
    exact = microseconds * 1000
    assert exact == int(exact)
    return int(exact)


def counted(frame) -> Counter:
    """How often each row is there; nulls are None."""
    return Counter(frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None))


def slices(events, categories):
    """Start, end and the event of each slice, in the order of the file."""
    for event in events:
        if event["ph"] == "X" and event["cat"] in categories:
            start = nanoseconds(event["ts"])
            yield start, start + nanoseconds(event["dur"]), event


def by_track(events, categories):
    tracks = defaultdict(list)
    for start, end, event in slices(events, categories):
        tracks[event["pid"], event["tid"]].append((start, end, event))
    return {track: sorted(found, key=lambda one: one[0]) for track, found in tracks.items()}


def test_slices_of_perfetto_add_up_to_the_ledger(traced):
    run, events = traced
    counts, sums = Counter(), Counter()
    for start, end, event in slices(events, EVENTS):
        counts[event["args"]["stage"]] += 1
        sums[event["args"]["stage"]] += end - start
    ledger = run.attribution.groupby("stage")
    assert counts == Counter(ledger.event_count.sum().to_dict())
    assert sums == Counter(ledger.measured_self_ns.sum().to_dict())


def test_slices_of_a_track_are_nested_or_apart(traced):
    """Viewers drop or misplace what overlaps otherwise; and what runs in a call is drawn in it."""
    _, events = traced
    for track in by_track(events, {*EVENTS, "stage", "user_annotation"}).values():
        around = []
        for start, end, event in track:
            while around and around[-1][0] <= start:
                around.pop()
            assert not around or end <= around[-1][0], event
            if event["cat"] == "cpu_op":
                call = around[-1][1]["args"].get("call_id") if around else None
                assert event["args"].get("call_id") == call
            around.append((end, event))


def test_every_call_of_the_pass_is_a_slice(cpu_run):
    for name in ("profiled", "traced"):
        events = json.loads(perfetto_trace(cpu_run, name), parse_float=Decimal)["traceEvents"]
        calls = cpu_run.calls[cpu_run.calls["pass"] == name]
        classes = cpu_run.modules.set_index("module_path").module_class
        expected = Counter(
            (row.call_id, row.module_path or classes[""], row.start_ns, row.end_ns, row.thread, row.stage, row.step)
            for row in calls.itertuples()
        )
        found = Counter(
            (args["call_id"], event["name"], start, end, event["tid"], args["stage"], args["step"])
            for start, end, event in slices(events, {"user_annotation"})
            for args in [event["args"]]
        )
        assert found == expected
        forwards = calls[calls.parent_call_id.isna()]
        titles = Counter(event["name"] for _, _, event in slices(events, {"stage"}))
        assert {title: count for title, count in titles.items() if title != "vision"} == Counter(
            f"decode step {row.step}" if row.stage == "decode" else row.stage for row in forwards.itertuples()
        )
        assert any(slices(events, EVENTS)) == (name == "profiled")


def test_a_trace_that_is_read_back_is_attributed_as_the_run_was(traced, tmp_path, invoke):
    run, _ = traced
    path = tmp_path / "trace.json.gz"
    assert invoke("export", run.path, "--format", "perfetto", "--output", path).exit_code == 0
    recording = read_kineto(path)
    kernels = run.kernels
    names = ["kind", "name", "duration_ns"]
    if kernels.kind.iloc[0] != "cpu_op":
        names += ["start_ns", "device", "stream", "correlation_id", "launch_ns", "launch_thread"]
    modules = {path or name: path for path, name in zip(run.modules.module_path, run.modules.module_class, strict=True)}
    ranges, others = ranges_of_modules(recording, modules)
    assert others == []
    attributed = attribute_to_ranges(recording, ranges).to_pandas().assign(module_path=lambda rows: rows.range_name)
    expected = kernels.assign(module_path=kernels.module_path.mask(kernels.unclassified_reason.notna()))
    columns = [*names, "module_path", "unclassified_reason"]
    assert counted(attributed[columns]) == counted(expected[columns])


def test_arrows_lead_from_the_launch_to_what_it_launched(cuda_run):
    events = json.loads(perfetto_trace(cuda_run), parse_float=Decimal)["traceEvents"]
    launches = {event["bind_id"]: (event["tid"], start, end) for start, end, event in slices(events, {"cuda_runtime"})}
    arrows = {
        event["args"]["event_id"]: launches[event["bind_id"]]
        for _, _, event in slices(events, EVENTS)
        if "bind_id" in event
    }
    launched = cuda_run.kernels.dropna(subset="launch_ns")
    assert len(launched) == len(cuda_run.kernels) - 2
    assert arrows == {row.event_id: (row.launch_thread, row.launch_ns, row.launch_ns) for row in launched.itertuples()}


def test_the_counter_is_what_is_launched_and_not_finished(cuda_run):
    events = json.loads(perfetto_trace(cuda_run), parse_float=Decimal)["traceEvents"]
    device = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    counters = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[device[event["pid"]]].append((nanoseconds(event["ts"]), event["args"]["events"]))
    kernels = cuda_run.kernels.dropna(subset="launch_ns")
    for name, mine in kernels.groupby("device"):
        assert counters[name][-1][1] == 0
        for at, count in dict(counters[name][:: len(mine) // 50]).items():
            later = [found for found in counters[name] if found[0] == at]
            ended = mine.start_ns + mine.duration_ns
            assert later[-1][1] == ((mine.launch_ns <= at) & (ended > at)).sum(), count


def test_tracks_have_names_and_nobody_is_named(traced):
    run, events = traced
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"} <= named
    text = perfetto_trace(run)
    for private in (socket.gethostname(), str(Path.home()), str(run.path.parent)):
        assert private not in text


def test_operators_are_drawn_one_after_the_other_within_their_call():
    never = np.iinfo(np.int64).max
    # The first calls the second, and the fourth would pass the end of its call by 3: the clocks differ.
    start, duration = np.array([0, 2, 40, 58, 70]), np.array([10, 20, 15, 5, 1])
    limit = np.array([60, 60, 60, 60, never])
    assert _one_after_the_other(start, duration, limit).tolist() == [0, 10, 40, 55, 70]


def test_speedscope_adds_up_module_by_module(traced):
    run, _ = traced
    content = json.loads(RUN_FORMATS["speedscope"](run))
    schema = json.loads(SPEEDSCOPE.read_text())
    jsonschema.Draft7Validator(schema | {"$ref": "#/definitions/FileFormat.File"}).validate(content)
    names = [frame["name"] for frame in content["shared"]["frames"]]
    assert len(set(names)) == len(names)
    root = run.modules.module_class[0]
    own, total = Counter(), Counter()
    for profile in content["profiles"]:
        assert len(profile["samples"]) == len(profile["weights"])
        assert profile["endValue"] == sum(profile["weights"])
        for sample, weight in zip(profile["samples"], profile["weights"], strict=True):
            *stack, _ = ["" if names[frame] == root else names[frame] for frame in sample]
            assert len(set(stack)) == len(stack)
            if stack[0] != "unclassified":
                own[profile["name"], stack[-1]] += weight
            total.update({(profile["name"], place): weight for place in stack})
    rows = run.kernels.groupby([*KEY, "unclassified_reason"], dropna=False).duration_ns.sum().reset_index()
    named = rows[rows.unclassified_reason.isna()]
    assert own == Counter(named.groupby(KEY).duration_ns.sum().to_dict())
    for row in rows[rows.unclassified_reason.notna()].itertuples():
        assert total[row.stage, row.unclassified_reason] == row.duration_ns
    assert {profile["name"]: profile["endValue"] for profile in content["profiles"]} == rows.groupby(
        "stage"
    ).duration_ns.sum().to_dict()


def test_the_speedscope_schema_refuses_what_is_none():
    schema = json.loads(SPEEDSCOPE.read_text())
    validator = jsonschema.Draft7Validator(schema | {"$ref": "#/definitions/FileFormat.File"})
    sampled = {"type": "sampled", "name": "a", "unit": "nanoseconds", "startValue": 0, "endValue": 1, "samples": [[0]]}
    content = {"$schema": schema["definitions"]["FileFormat.File"]["properties"]["$schema"]["const"]}
    content |= {"shared": {"frames": [{"name": "f"}]}, "profiles": [sampled | {"weights": [1]}]}
    assert validator.is_valid(content)
    assert not validator.is_valid(content | {"profiles": [sampled]})


@pytest.fixture(scope="module")
def drawn(cpu_run):
    """The graph as Graphviz reads it: nodes by name, with their clusters, and edges."""
    if DOT is None:
        pytest.skip("Graphviz is not installed; apt-get install graphviz")
    text = RUN_FORMATS["dot"](cpu_run)
    done = subprocess.run([DOT, "-Tjson"], input=text, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_graphviz_reads_the_whole_call_graph(cpu_run, drawn):
    clusters = {one["name"]: one["nodes"] for one in drawn["objects"] if one["name"].startswith("cluster_")}
    stage_of = {node: name.removeprefix("cluster_") for name, nodes in clusters.items() for node in nodes}
    counts = Counter()
    for edge in drawn["edges"]:
        assert stage_of[edge["tail"]] == stage_of[edge["head"]]
        counts[stage_of[edge["head"]]] += int(edge["label"])
    graph = cpu_run.callgraph
    inner = graph[graph.parent_path.notna()]
    assert counts == Counter(inner.groupby("stage").call_count.sum().to_dict())
    assert set(stage_of.values()) == set(graph.stage)


def test_nodes_are_the_folded_modules_of_the_report(cpu_run, drawn):
    folded = {module.module_id: module for module in walk(run_report(cpu_run).root)}
    entries = {f"{entry.stage}:{name}": (module, entry) for name, module in folded.items() for entry in module.stages}
    nodes = {one["name"]: one for one in drawn["objects"] if not one["name"].startswith("cluster_")}
    called = {name for name, (_, entry) in entries.items() if entry.calls}
    assert {name for name, node in nodes.items() if "dashed" not in node["style"]} == called
    stage_ns = cpu_run.attribution.groupby("stage").measured_self_ns.sum()
    shades = defaultdict(list)
    for name in called:
        module, entry = entries[name]
        assert module.module_class in nodes[name]["label"]
        assert (f"{module.instances} \N{MULTIPLICATION SIGN} " in nodes[name]["label"]) == (module.instances > 1)
        share = entry.measured.measured_self_ns / stage_ns[entry.stage]
        assert f"({share:.1%})" in nodes[name]["label"]
        shades[int(nodes[name]["fillcolor"])].append(share)
    assert len(shades) > 3
    for lighter, darker in zip(sorted(shades), sorted(shades)[1:], strict=False):
        assert max(shades[lighter]) < min(shades[darker])


def test_one_stage_is_drawn_alone(cpu_run):
    text = RUN_FORMATS["dot"](cpu_run, stage="decode")
    assert re.findall(r"cluster_(\w+)", text) == ["decode"]
    lines = set(RUN_FORMATS["dot"](cpu_run).splitlines())
    assert set(text.splitlines()) < lines


@pytest.mark.parametrize("which", ["cpu", "cuda"])
def test_csv_is_read_back_equal(cpu_run, cuda_run, which):
    run = {"cpu": cpu_run, "cuda": cuda_run}[which]
    packed = RUN_FORMATS["csv"](run)
    assert RUN_FORMATS["csv"](run) == packed
    archive = zipfile.ZipFile(io.BytesIO(packed))
    assert archive.testzip() is None
    assert archive.namelist() == [f"{name}.csv" for name in TABLES]
    for name in TABLES:
        with archive.open(f"{name}.csv") as file:
            found = pd.read_csv(file, keep_default_na=False, na_values=["NULL"])
        expected = run.table(name)
        empty = [column for column in expected if expected[column].isna().all()]
        assert found[empty].isna().all(axis=None)
        pd.testing.assert_frame_equal(found.drop(columns=empty), expected.drop(columns=empty), check_exact=True)


def test_what_is_shown_is_what_is_written(invoke, cpu_run, tmp_path):
    for name in RUN_FORMATS:
        for ending in ("plain", "gz"):
            result = invoke("export", cpu_run.path, "--format", name, "--output", tmp_path / f"{name}.{ending}")
            assert (result.exit_code, result.stdout) == (0, "")
        written = (tmp_path / f"{name}.plain").read_bytes()
        assert gzip.decompress((tmp_path / f"{name}.gz").read_bytes()) == written
        if name != "csv":
            assert invoke("export", cpu_run.path, "--format", name).stdout_bytes == written


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--format", "csv"), "name it with --output FILE.zip"),
        (("--format", "csv", "--pass", "traced"), "--pass belongs to --format perfetto"),
        (
            ("--format", "perfetto", "--stage", "decode"),
            "--stage belongs to --format dot; leave it out with --format perf",
        ),
        (
            ("--format", "perfetto", "--pass", "plain"),
            "no pass 'plain'; its passes are traced, profiled; choose one with",
        ),
        (("--format", "dot", "--stage", "x"), "stage 'x'; choose one of vision, prefill, decode with --stage"),
    ],
)
def test_what_a_format_cannot_do_is_refused(invoke, cpu_run, arguments, part):
    result = invoke("export", cpu_run.path, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["perfetto", "speedscope", "dot", "csv"])
def test_a_run_without_a_table_is_refused(invoke, cpu_run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(cpu_run.path, folder)
    (folder / "modules.parquet").write_bytes(b"damaged")
    result = invoke("export", folder, "--format", name, "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "is incomplete" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "file").exists()
