"""Hardware counters of the kernels that take most of the time, measured by Nsight Compute.

Nsight Compute runs each chosen launch alone and several times, so its durations are those of a cold, undisturbed
kernel. Both profilers see the launches of a name in the same order: its place in it tells which launch is which.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from hooks.attribution import attribute_to_ranges
from hooks.columns import each_distinct, is_text, plain
from hooks.errors import TraceError
from hooks.nsight import profile
from stage_runners.stage2 import CAPTURE, CAPTURE_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    import pyarrow as pa

    from hooks.nsight import Tool
    from hooks.recording import Recording

#: Counter to column, and what the counter's value is multiplied by: shares count in percent there.
METRICS: Final = {
    "gpu__time_duration.sum": ("duration_ns", 1),
    "dram__bytes_read.sum": ("dram_read_bytes", 1),
    "dram__bytes_write.sum": ("dram_written_bytes", 1),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_share_of_peak", 0.01),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("sm_share_of_peak", 0.01),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("tensor_pipe_share_of_peak", 0.01),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy", 0.01),
}
_COUNTER_PERMISSION: Final = "ERR_NVGPUCTRPERM"


@attrs.frozen
class CounterOptions:
    """How much to measure.

    Attributes
    ----------
    kernels
        How many kernels, those with the largest summed time.
    launches
        How many launches of all of them together; each is run several times.
    """

    kernels: int = 8
    launches: int = 64


def top_kernels(events: pa.Table, count: int) -> list[str]:
    """Names of the kernels with the largest summed time, the largest first; at most ``count``.

    Parameters
    ----------
    events
        Schema `hooks.tables.EVENTS`.
    count
        How many.
    """
    kernels = events.filter(is_text(events["kind"], "kernel")).select(["name", "duration_ns"])
    sums = plain(kernels.unify_dictionaries().group_by("name").aggregate([("duration_ns", "sum")]))
    heaviest = sums.sort_by([("duration_ns_sum", "descending"), ("name", "ascending")])
    return [str(name) for name in heaviest["name"][:count].to_pylist()]


def ncu_command(ncu: Tool, report: Path, target: Sequence[str], names: Sequence[str], launches: int) -> list[str]:
    """The command line that measures the kernels ``names`` inside the range `CAPTURE`.

    Parameters
    ----------
    ncu
        Nsight Compute.
    report
        Where the results go (``.ncu-rep``).
    target
        The program and its arguments.
    names
        Full (demangled) names.
    launches
        Of all of them together, the first ones.
    """
    patterns = "|".join(map(_pattern, names))
    return [
        str(ncu.path),
        "--nvtx",
        f"--nvtx-include={CAPTURE_DOMAIN}@{CAPTURE}/",
        "--kernel-name-base=demangled",
        f"--kernel-name=regex:^({patterns})$",
        f"--launch-count={launches}",
        "--kill=yes",
        # The clocks stay as the run had them: its times are what the counters stand beside.
        "--clock-control=none",
        f"--metrics={','.join(METRICS)}",
        "--force-overwrite",
        f"--export={report}",
        *target,
    ]


def measure(ncu: Tool, command: Sequence[str], report: Path) -> None:
    """Run Nsight Compute.

    Raises
    ------
    TraceError
        If it measured nothing; says why, and what helps.
    """
    done = profile(command, report.parent)
    said = done.stdout + done.stderr
    if _COUNTER_PERMISSION in said:
        raise TraceError(
            f"the driver lets only administrators read counters ({_COUNTER_PERMISSION}); run as root, or load the "
            "module nvidia with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if not report.exists():
        errors = [line for line in said.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
        reason = errors[0].partition("== ")[2] if errors else f"exit code {done.returncode}"
        raise TraceError(f"Nsight Compute {ncu.version} measured nothing ({reason})")


def counters_table(measured: Recording, traced: pa.Table, ranges: pa.Table) -> pd.DataFrame:
    """One row for each measured launch.

    Parameters
    ----------
    measured
        What Nsight Compute measured.
    traced
        Events of the same generation as Nsight Systems saw it, schema `hooks.tables.EVENTS`.
    ranges
        The modules' ranges in ``measured``, named by path (see `hooks.attribution.ranges_of_modules`).

    Returns
    -------
    pandas.DataFrame
        ``name``, ``launch`` (its number among the launches of that name in the generation, from 0), ``module_path``
        (None outside every module), ``traced_ns`` (the same launch under Nsight Systems, missing if it saw none), and
        the columns of `METRICS`.

    Raises
    ------
    TraceError
        If no kernel was measured.
    """
    if not measured.events.num_rows:
        raise TraceError("Nsight Compute measured no launch of the chosen kernels")
    rows = _numbered(measured.events)
    # What was measured are the first launches of all chosen kernels, so numbers within a name are those of the trace.
    launches = _numbered(traced)[["key", "launch", "duration_ns"]]
    joined = rows.merge(
        launches.rename(columns={"duration_ns": "traced_ns"}), on=["key", "launch"], how="left", validate="one_to_one"
    )
    joined["name"] = joined["name"].astype(str)
    joined["module_path"] = plain(attribute_to_ranges(measured, ranges))["range_name"].to_pandas().to_numpy()
    for metric, (column, factor) in METRICS.items():
        values = measured.counters.get(metric)
        joined[column] = np.nan if values is None else values.to_pandas().to_numpy() * factor
    columns = ["name", "launch", "module_path", "traced_ns", *(column for column, _ in METRICS.values())]
    return joined[columns]


def _numbered(events: pa.Table) -> pd.DataFrame:
    """Kernels in the order of their start, each with its name without blanks (``key``) and its number under it."""
    key = each_distinct(lambda names: [name.replace(" ", "") for name in names], events["name"])
    frame = events.select(["kind", "name", "start_ns", "duration_ns"]).append_column("key", key).to_pandas()
    kernels = frame[frame["kind"] == "kernel"].sort_values("start_ns", kind="stable")
    return kernels.assign(launch=kernels.groupby("key", observed=True).cumcount())


def _pattern(name: str) -> str:
    """Match a name, whichever of its blanks another demangler leaves out."""
    return r"\s*".join(re.escape(part) for part in re.split(r"\s+", name))
