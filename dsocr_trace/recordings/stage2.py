"""Stage 2 of a run: the generation again under NVIDIA's profilers, and what it says of Stage 1."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from analytic.errors import DsocrTraceError
from dsocr_trace.recordings.attribute import attribute_recording
from dsocr_trace.recordings.captured import OUTCOME, PRINTED, write_job
from dsocr_trace.recordings.reconciliation import compared_calls, module_ranges, reconcile, recorded_calls
from hooks.columns import plain
from hooks.errors import TraceError
from hooks.nsight import require_tool, silent_nvtx
from hooks.readers.ncu import read_ncu
from hooks.readers.nsys import read_nsys_report
from stage_runners.counters import CounterOptions, counters_table, measure, ncu_command, top_kernels
from stage_runners.stage1 import TRACED
from stage_runners.stage2 import record

if TYPE_CHECKING:
    import pandas as pd

    from dsocr_trace.runs.pipeline import Job
    from hooks.nsight import Tool
    from hooks.recording import Recording
    from stage_runners.measurement import Measurement, Repeat
    from stage_runners.stage1 import Progress

#: Name of the recording that a run keeps.
REPORT: Final = "stage2.nsys-rep"
_MODULE: Final = ["stage", "module_path"]
#: Columns of `dsocr_trace.recordings.reconciliation.Reconciliation.modules` in the table.
_EVENT_COLUMNS: Final = {
    "our_events": "stage1_event_count",
    "their_events": "stage2_event_count",
    "our_ns": "stage1_self_ns",
    "their_ns": "stage2_self_ns",
}
_NOT_KEPT: Final = (
    "stage 2: the recording is not kept, since it holds the environment of every process of this user: unshare cannot "
    "hide them on this machine; keep it nevertheless with --keep-capture"
)


@attrs.frozen(eq=False)
class Stage2:
    """What Stage 2 yields.

    Attributes
    ----------
    summary
        For the manifest; only ``failure`` if nothing came of it.
    tables
        The tables that it could fill.
    notes
        What the reader of the run must know.
    """

    summary: dict[str, Any]
    tables: dict[str, pd.DataFrame] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()


def run_stage2(job: Job, measurement: Measurement, folder: Path, progress: Progress) -> Stage2:
    """Record the run's generation once more and compare; what fails is said in the result, and ends nothing.

    Parameters
    ----------
    job
        The run.
    measurement
        What Stage 1 measured.
    folder
        The run directory in the making; takes the recording if it is kept.
    progress
        Called as the work goes on.
    """
    # The child needs the room of Stage 1's model, which refers to itself: only a collection lets go of it.
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="dsocr-trace-") as name:
        scratch = Path(name)
        try:
            return _recorded(job, measurement, scratch, folder, progress)
        except (DsocrTraceError, TraceError) as error:
            return Stage2({"failure": str(error)}, notes=(f"no stage 2: {error}",))


@attrs.frozen(eq=False)
class _Capture:
    """The recording of one generation.

    Attributes
    ----------
    target
        The command line of the program that was recorded.
    wall_ns
        Time of the generation.
    is_private
        Whether no other process was to be seen.
    """

    report: Path
    target: list[str]
    wall_ns: int
    is_private: bool


def _recorded(job: Job, measurement: Measurement, scratch: Path, folder: Path, progress: Progress) -> Stage2:
    nsys = require_tool("nsys")
    if silence := silent_nvtx(nsys):
        raise TraceError(silence)
    progress(f"stage 2: generation under Nsight Systems {nsys.version}", 0, 1)
    capture = _capture(job, measurement, nsys, scratch)
    keep = capture.is_private if job.options.keep_capture is None else job.options.keep_capture
    progress("stage 2: read and compare", 0, 1)
    recording = read_nsys_report(capture.report, nsys.path)
    modules = measurement.modules.to_pandas()
    rows = _with_calls(measurement, recording, modules)
    range_count = int(rows["ranges"].sum())
    plain_ns = sum(_wall(page.repeats[0]) for page in measurement.pages)
    summary: dict[str, Any] = {
        "tools": {"nsys": nsys.version},
        "captured": {
            "ranges_of_modules": range_count,
            "other_ranges": recording.ranges.num_rows - range_count,
            "events": recording.events.num_rows,
            "report": REPORT if keep else None,
            "report_bytes": capture.report.stat().st_size,
        },
        "agreement": {
            "modules": len(rows),
            "modules_differing": int((~rows["agrees"]).sum()),
            "calls": int(rows["calls"].sum()),
            "ranges": range_count,
        },
        "overhead": {
            "traced_ns": plain_ns,
            "captured_ns": capture.wall_ns,
            "ratio": capture.wall_ns / plain_ns,
        },
    }
    if keep:
        _keep(capture.report, folder)
    notes = () if keep or job.options.keep_capture is False else (_NOT_KEPT,)
    found = Stage2(summary, {"stage2": rows}, (*_difference(rows), *notes))
    if job.device.type != "cuda":
        return found
    if not recording.events.num_rows:
        return attrs.evolve(found, notes=(*found.notes, *(f"stage 2: {note}" for note in recording.notes)))
    return _with_counters(_with_events(found, recording, measurement, modules), capture, recording, modules, progress)


def _capture(job: Job, measurement: Measurement, nsys: Tool, scratch: Path) -> _Capture:
    options = attrs.evolve(job.options, device=str(job.device))
    write_job(scratch, options, [len(page.tokens) for page in measurement.pages])
    target = [sys.executable, "-m", "dsocr_trace.recordings.captured", str(scratch)]
    report = scratch / REPORT
    try:
        is_private = record(nsys, report, target, cuda=job.device.type == "cuda")
    except TraceError:
        if (scratch / PRINTED).exists():
            _outcome(scratch)  # what the program itself says explains more
        raise
    return _Capture(report, target, _checked_wall(_outcome(scratch), measurement), is_private)


def _keep(report: Path, folder: Path) -> None:
    try:
        shutil.copy(report, folder)
    except OSError as error:
        raise TraceError(f"the recording cannot be kept: {error.strerror}; use --no-keep-capture") from error


def _outcome(scratch: Path) -> dict[str, Any]:
    """What the recorded program left.

    Raises
    ------
    TraceError
        If it failed.
    """
    path, printed = scratch / OUTCOME, scratch / PRINTED
    if path.exists():
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        lines = printed.read_text(encoding="utf-8", errors="replace").split("\n") if printed.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "it was not started")
        outcome = {"failure": f"the profiled program ended early ({last})"}
    if "failure" in outcome:
        raise TraceError(str(outcome["failure"]))
    return outcome


def _checked_wall(outcome: dict[str, Any], measurement: Measurement) -> int:
    """Time of the recorded generation, which must be the one of Stage 1."""
    for mine, page in zip(outcome["pages"], measurement.pages, strict=True):
        if tuple(mine["tokens"]) != page.tokens:
            raise TraceError(
                f"page {page.name!r} got other tokens under Nsight Systems than in Stage 1: the run is not repeatable "
                "on this device; try --dtype fp32"
            )
    return sum(mine["wall_ns"] for mine in outcome["pages"])


def _wall(repeat: Repeat) -> int:
    return repeat.vision_ns + repeat.prefill_ns + sum(repeat.decode_ns)


def _with_calls(measurement: Measurement, recording: Recording, modules: pd.DataFrame) -> pd.DataFrame:
    """The calls of both stages, module by module."""
    ranges = module_ranges(recording, modules)
    recorded = recorded_calls(ranges, [len(page.tokens) for page in measurement.pages])
    calls = measurement.calls.to_pandas()
    return compared_calls(calls[calls["pass"] == TRACED], recorded)


def _difference(rows: pd.DataFrame) -> tuple[str, ...]:
    differing = rows[~rows["agrees"]]
    if differing.empty:
        return ()
    first = differing.iloc[0]
    note = (
        f"stage 2: {len(differing)} of {len(rows)} modules were called otherwise under Nsight Systems; first "
        f"{first.module_path!r} in {first.stage}: {first.calls} calls, {first.ranges} ranges"
    )
    return (note,)


def _with_events(found: Stage2, recording: Recording, measurement: Measurement, modules: pd.DataFrame) -> Stage2:
    """Add what the device did in both stages, over the forwards that Stage 1 profiled."""
    attribution = attribute_recording(recording, modules)
    columns = ["page", "stage", "step", "module_path", "duration_ns"]
    ours, theirs = (plain(table.select(columns)).to_pandas() for table in (measurement.kernels, attribution.kernels))
    profiled = ours[["page", "step"]].dropna().drop_duplicates()
    events = reconcile(ours.dropna(subset="step"), theirs.merge(profiled, on=["page", "step"]))
    renamed = events.modules.rename(columns=_EVENT_COLUMNS)[[*_MODULE, *_EVENT_COLUMNS.values()]]
    rows = found.tables["stage2"].merge(renamed, on=_MODULE, how="left")
    summary = {
        "attribution": {
            "events": attribution.events,
            "total_ns": attribution.total_ns,
            "coverage": attribution.coverage,
            "unclassified": attribution.unclassified,
        },
        "events_agreement": {
            "event_share": events.event_share,
            "time_share": events.time_share,
            "withheld": events.withheld,
        },
    }
    return attrs.evolve(
        found,
        summary=found.summary | summary,
        tables={"stage2": rows.fillna(dict.fromkeys(_EVENT_COLUMNS.values(), 0))},
        notes=(*found.notes, *(f"stage 2: {note}" for note in attribution.notes)),
    )


def _with_counters(
    found: Stage2, capture: _Capture, recording: Recording, modules: pd.DataFrame, progress: Progress
) -> Stage2:
    """Add what Nsight Compute measures of the heaviest kernels, or one note that says why it does not."""
    try:
        ncu = require_tool("ncu")
        progress(f"stage 2: counters under Nsight Compute {ncu.version}", 0, 1)
        limits = CounterOptions()
        names = top_kernels(recording.events, limits.kernels)
        report = capture.report.with_name("counters.ncu-rep")
        measure(ncu, ncu_command(ncu, report, capture.target, names, limits.launches), report)
        measured = read_ncu(report, ncu=ncu.path)
        rows = counters_table(measured, recording.events, module_ranges(measured, modules))
    except TraceError as error:
        return attrs.evolve(found, notes=(*found.notes, f"no hardware counters: {error}"))
    tools = found.summary["tools"] | {"ncu": ncu.version}
    return attrs.evolve(found, summary=found.summary | {"tools": tools}, tables=found.tables | {"counters": rows})
