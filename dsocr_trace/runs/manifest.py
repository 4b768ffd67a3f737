"""The manifest of a run: how it was made, and whether it can be trusted."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from dsocr_trace.runs.schemas import SCHEMA_VERSION
from hooks.attribution import REASONS, UNCLASSIFIED
from hooks.clock import TOLERANCE_NS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from dsocr_trace.runs.pipeline import Job
    from stage_runners.measurement import Measurement, PageMeasurement


def manifest(
    job: Job,
    measurement: Measurement,
    attribution: pd.DataFrame,
    *,
    unmapped: Mapping[str, Mapping[str, float]],
    conserved: Mapping[str, Mapping[str, int]],
    notes: Sequence[str],
    command: Sequence[str],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe a run.

    Parameters
    ----------
    job
        What was asked for.
    measurement
        What was measured.
    attribution
        The ledger.
    unmapped
        Modules for which nothing is predicted, by class.
    conserved
        Sums that the invariants found on both sides.
    notes
        What the reader must know.
    command
        The command line.
    environment
        Versions, commit and device.
    """
    hardware = job.calibration.hardware
    return {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
        "started_at": job.started_at.isoformat(timespec="seconds"),
        **environment,
        "device_state": attrs.asdict(measurement.device_state) if measurement.device_state else None,
        "model": job.options.model,
        "variant": job.variant,
        "remote_code": job.options.trust_remote_code,
        "weights": "seeded random" if job.options.model == "builtin" else "checkpoint",
        "dtype": job.dtype_name,
        "attention": job.attention,
        "seed": job.options.seed,
        "workload": attrs.asdict(job.workload),
        "hardware": {
            "name": hardware.name,
            "provenance": hardware.provenance,
            "tensor_flops_per_s": hardware.tensor_peak(job.dtype_name),
            "memory_bytes_per_s": hardware.memory_bytes_per_s.value,
            "figures": attrs.asdict(hardware),
        },
        "prediction": _prediction(job),
        "pages": [_page(page) for page in measurement.pages],
        "passes": {
            "plain": "prefill without wrappers or profiler; warm-up and check of the first token",
            "traced": "one greedy generation under the tracer, no profiler: wall times, calls, routing",
            "profiled": "prefill and sampled decode steps again under the profiler: events",
            "memory": "on CUDA, prefill and the last decode steps again: activation peaks; in no other table",
        },
        "sampling": {
            "vision": "whole",
            "prefill": "whole",
            "decode": "each page's profiled steps, scaled to all its decode steps where a column says scaled",
        },
        "overhead": overhead(measurement.pages),
        "clock": attrs.asdict(measurement.clock) | {"tolerance_ns": TOLERANCE_NS},
        "coverage": coverage(attribution),
        "unclassified": unclassified(attribution),
        "unmapped": unmapped,
        "conserved": conserved,
        "expert_routing": {"source": "measured", "experts_hit": _experts_hit(measurement.pages)},
        "events_outside_generation": measurement.outside_windows,
        "peak_device_bytes": measurement.peak_device_bytes,
        "notes": list(notes),
    }


def _prediction(job: Job) -> dict[str, Any]:
    """Say what the predicted times are from."""
    calibration = job.calibration
    return {
        "device": calibration.device,
        "source": calibration.source,
        "tensor_flops_per_s": calibration.tensor_flops_per_s[job.dtype_name],
        "memory_bytes_per_s": calibration.memory_bytes_per_s[max(calibration.memory_bytes_per_s)],
        "file": job.options.hardware if calibration.source == "calibrated" else None,
        "measured_at": calibration.measured_at,
        "notes": list(calibration.notes),
    }


def _page(page: PageMeasurement) -> dict[str, Any]:
    return {
        "name": page.name,
        "source": page.source,
        "page_px": [page.workload.page_width, page.workload.page_height],
        "crop_grid": page.workload.grid,
        "seq_len": page.workload.seq_len,
        "tokens": list(page.tokens),
        "stopped_at_eos": page.stopped_at_eos,
        "decode_steps": len(page.tokens) - 1,
        "profiled_steps": list(page.profiled_steps),
        "repeats": [
            {"vision_ns": repeat.vision_ns, "prefill_ns": repeat.prefill_ns, "decode_ns": sum(repeat.decode_ns)}
            for repeat in page.repeats
        ],
    }


def overhead(pages: Sequence[PageMeasurement]) -> dict[str, Any]:
    """The tracer's cost: median over pairs of the same decode step, run plain and traced in turn."""
    ratios = [pair.traced_ns / pair.plain_ns for page in pages for pair in page.step_pairs]
    if not ratios:
        return {"pairs": 0, "ratio": None, "quartiles": None}
    quartiles = [float(value) for value in np.quantile(ratios, [0.25, 0.75])]
    return {"pairs": len(ratios), "ratio": statistics.median(ratios), "quartiles": quartiles}


def coverage(attribution: pd.DataFrame) -> dict[str, float]:
    """Share of the measured time that stands in named modules, by stage and in all."""
    named = attribution["module_path"] != UNCLASSIFIED
    whole = attribution.groupby("stage")["measured_self_ns"].sum()
    inside = attribution[named].groupby("stage")["measured_self_ns"].sum().reindex(whole.index, fill_value=0)
    shares = {str(stage): float(inside[stage] / ns) for stage, ns in whole.items() if ns}
    return shares | {"all": float(inside.sum() / whole.sum())}


def unclassified(attribution: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Events and time of no module, by reason."""
    rows = attribution[attribution["module_path"] == UNCLASSIFIED]
    sums = rows.groupby("unclassified_reason")[["event_count", "measured_self_ns"]].sum()
    return {
        str(reason): {
            "count": int(row["event_count"]),
            "ns": int(row["measured_self_ns"]),
            "means": REASONS[str(reason)],
        }
        for reason, row in sums.iterrows()
    }


def _experts_hit(pages: Sequence[PageMeasurement]) -> dict[str, float | int]:
    """How many experts of all layers the prefills reached, and how many a decode step reaches on average."""
    prefill = sum(int((counts > 0).sum()) for page in pages for counts in page.routing.prefill.values())
    decode = [int((counts > 0).sum()) for page in pages for counts in page.routing.decode.values()]
    steps = sum(len(page.tokens) - 1 for page in pages)
    return {"prefill": prefill, "decode_per_step": sum(decode) / steps if steps else 0}
