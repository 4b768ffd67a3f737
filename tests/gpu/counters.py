"""Measure the heaviest kernels of a finished run under Nsight Compute, as Stage 2 does, but without Nsight Systems.

The report can be joined with the run: ``dsocr-trace attribute REPORT --run RUN``.
"""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

import dsocr_trace
from dsocr_trace.recordings.captured import write_job
from dsocr_trace.runs.pipeline import RunOptions
from hooks.errors import TraceError
from hooks.nsight import find_tool
from stage_runners.counters import CounterOptions, measure, ncu_command, top_kernels


def main() -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, of the built-in model on a synthetic page")
    parser.add_argument("report", type=Path, help="the .ncu-rep to write")
    given = parser.parse_args()
    manifest, limits, ncu = dsocr_trace.load(given.run).manifest, CounterOptions(), find_tool("ncu")
    if ncu is None:
        print("SKIP counters: Nsight Compute is not here")
        return 0
    names = top_kernels(pq.read_table(given.run / "kernels.parquet"), limits.kernels)
    options = RunOptions(manifest["workload"]["id"], manifest["device"]["device"], max_new_tokens=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, options, [2])
        target = [sys.executable, "-m", "dsocr_trace.recordings.captured", str(folder)]
        command = ncu_command(ncu, given.report, target, names, limits.launches)
        try:
            measure(ncu, command, given.report)
        except TraceError as error:
            print(f"FAIL counters: {error}")
            return 1
    print(f"PASS counters: Nsight Compute {ncu.version} measured launches of {len(names)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
