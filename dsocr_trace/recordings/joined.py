"""A foreign trace beside a run: whether both tell of the same forwards, and if so, the run's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa

from dsocr_trace.recordings.attribute import Attribution, attribute_recording
from dsocr_trace.recordings.reconciliation import Reconciliation, reconcile
from hooks.columns import plain
from stage_runners.stage1 import TRACED

if TYPE_CHECKING:
    from dsocr_trace.runs.store import Run
    from hooks.recording import Recording


@attrs.frozen(eq=False)
class Joined:
    """A trace, attributed, and what a run says of it.

    Attributes
    ----------
    attribution
        The trace; with the run's predictions if both made the same calls.
    calls
        The run's calls beside the trace's ranges; None without a run, and for a tool that picks single launches.
    events
        The run's events beside the trace's, in the forwards that the run profiled; None without events.
    counters
        What the tool measured of each kernel, see `counters`; None if it measured none.
    """

    attribution: Attribution
    calls: Reconciliation | None = None
    events: Reconciliation | None = None
    counters: pa.Table | None = None

    def summary(self) -> dict[str, Any]:
        """The machine-readable summary."""
        found = self.attribution
        modules = found.modules.astype({"total_ns": "Int64"})
        stages = found.table.groupby("stage")[["event_count", "measured_self_ns"]].sum()
        return {
            "tool": found.recording.tool,
            "tool_version": found.recording.version,
            "events": found.events,
            "total_ns": found.total_ns,
            "attributed_events": found.attributed_events,
            "attributed_ns": found.attributed_ns,
            "coverage": found.coverage,
            "unclassified": found.unclassified,
            "stages": {
                str(stage): {"event_count": int(row["event_count"]), "self_ns": int(row["measured_self_ns"])}
                for stage, row in stages.iterrows()
            },
            "modules": modules.astype(object).where(modules.notna(), None).to_dict("records"),
            "calls_beside_run": _summary(self.calls),
            "events_beside_run": _summary(self.events),
            "counters": None if self.counters is None else list(found.recording.counters),
            "unmatched_ranges": list(found.recorded.unmatched),
            "notes": list(found.notes),
        }


def _summary(reconciliation: Reconciliation | None) -> dict[str, Any] | None:
    if reconciliation is None:
        return None
    differing = reconciliation.modules[~reconciliation.modules["agrees"]]
    return {
        "modules": len(reconciliation.modules),
        "modules_differing": len(differing),
        "event_share": reconciliation.event_share,
        "time_share": reconciliation.time_share,
        "withheld": reconciliation.withheld,
        "differing": differing.drop(columns="agrees").to_dict("records"),
    }


def join(recording: Recording, run: Run | None = None) -> Joined:
    """Attribute a trace, beside a run or alone.

    Parameters
    ----------
    recording
        The trace.
    run
        The run whose module tree it is joined with.

    Raises
    ------
    InputError, hooks.errors.TraceError
        As `dsocr_trace.recordings.attribute.attribute_recording` does; also if the run lacks a table.
    """
    found = attribute_recording(recording, None if run is None else run.modules)
    measured = counters(found, None if run is None else run.predictions) if recording.counters else None
    if run is None or measured is not None:
        return Joined(found, counters=measured)
    calls = run.calls[run.calls["pass"] == TRACED]
    place = ["page", "stage", "step", "module_path"]
    same_calls = reconcile(calls[place], found.recorded.calls[place], least_events=1.0, what="calls")
    if same_calls.withheld is None:
        found = found.beside(run.predictions)
    else:
        note = f"the run's predictions are left out: the trace holds other calls than the run ({same_calls.withheld})"
        found = attrs.evolve(found, notes=(*found.notes, note))
    return Joined(found, same_calls, _events(found, run.kernels) if found.events else None)


def _events(found: Attribution, ours: pd.DataFrame) -> Reconciliation:
    """Compare in the forwards that the run profiled: a sample of the decode steps."""
    columns = ["page", "stage", "step", "module_path", "duration_ns"]
    ours = ours[columns].dropna(subset="step")
    theirs = plain(found.kernels.select(columns)).to_pandas().dropna(subset="step")
    forwards = ours[["page", "step"]].drop_duplicates()
    return reconcile(ours, theirs.merge(forwards, on=["page", "step"]))


def counters(found: Attribution, predictions: pd.DataFrame | None) -> pa.Table:
    """What the tool measured of each kernel, one row per launch, beside what is predicted of its module.

    Parameters
    ----------
    found
        An attributed trace with counters.
    predictions
        The run's (`dsocr_trace.runs.schemas.PREDICTIONS`), if there is one.

    Returns
    -------
    pyarrow.Table
        ``event_id``, ``name``, ``launch`` (its number among the launches of that name, from 0), ``stage``,
        ``module_path``, ``duration_ns``; with predictions ``predicted_bytes_per_call`` and
        ``predicted_flops_per_call`` of the module itself, on average over its calls; and a column for each counter.
    """
    rows = plain(found.kernels.select(["event_id", "name", "stage", "module_path", "duration_ns"])).to_pandas()
    rows.insert(2, "launch", rows.groupby("name").cumcount())
    if predictions is not None:
        rows = rows.join(_per_call(predictions), on="module_path")
    for name, values in found.recording.counters.items():
        rows[name] = values.to_numpy(zero_copy_only=False)
    return pa.Table.from_pandas(rows, preserve_index=False)


def _per_call(predictions: pd.DataFrame) -> pd.DataFrame:
    # One kernel does not tell its stage, so all stages of the module are taken together.
    sums = predictions.groupby("module_path").sum(numeric_only=True)
    calls = sums["calls"].where(sums["calls"] > 0, np.nan)
    return pd.DataFrame(
        {
            "predicted_bytes_per_call": (sums["bytes_read"] + sums["bytes_written"]) / calls,
            "predicted_flops_per_call": (sums["tensor_flops"] + sums["vector_flops"]) / calls,
        }
    )
