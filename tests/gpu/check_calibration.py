"""Check a calibration of a GPU against what the device can do, and print each check with its figure.

Exits with 1 if any check failed, after all have run.
"""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
from verdicts import SkippedError, all_hold, checked

from analytic.timing.curves import cost_of
from dsocr_trace.machine.calibrations import load_calibration

if TYPE_CHECKING:
    from analytic.timing.calibration import Calibration

#: How far a clock above the datasheet's may bring a figure above its peak.
ABOVE: Final = 1.05
#: A ceiling below this share of the datasheet's was measured wrongly, or on a device that did something else.
LEAST: Final = 0.4
#: The shortest kernels take about 1 to 3 us (docs/rtx-5090.md; A. Gray, "Getting started with CUDA graphs", 2019).
SHORTEST_NS: Final = (500, 5_000)


def of_gpu(calibration: Calibration) -> Calibration:
    """Only a GPU has a host of its own, and a datasheet."""
    if calibration.kind != "cuda":
        raise SkippedError("only a GPU's")
    return calibration


def held_back(calibration: Calibration) -> str:
    """Short operators take less on the device than their launch takes: they were not timed as they were launched."""
    samples, floor_ns = of_gpu(calibration).samples, calibration.host.kernel_floor_ns
    short = [sample for sample in samples if sample.device_ns < 2 * floor_ns]
    slower = sum(sample.device_ns < sample.host_ns for sample in short)
    ratio = statistics.median(sample.device_ns / sample.host_ns for sample in short) if short else None
    figure = f"{slower} of {len(short)} take longer on the host, median device over host {ratio and round(ratio, 2)}"
    return checked(slower > 0.9 * len(short) > 0, figure)


def floor(calibration: Calibration) -> str:
    """The shortest kernel and the way from a launch to its start are of a believable length."""
    host = of_gpu(calibration).host
    low, high = SHORTEST_NS
    return checked(low <= host.kernel_floor_ns <= high and host.launch_ns > 0, json.dumps(attrs.asdict(host)))


def ceilings(calibration: Calibration) -> str:
    """The fastest product and the largest copy stay below the datasheet's peaks, and not far below."""
    hardware = of_gpu(calibration).hardware
    reached = calibration.tensor_flops_per_s.items()
    shares = {dtype: flops_per_s / hardware.tensor_peak(dtype) for dtype, flops_per_s in reached}
    largest = calibration.memory_bytes_per_s[max(calibration.memory_bytes_per_s)]
    shares["memory"] = largest / hardware.memory_bytes_per_s.value
    figure = ", ".join(f"{name} {share:.2f}" for name, share in shares.items()) + " of the datasheet"
    return checked(all(LEAST <= share <= ABOVE for share in shares.values()), figure)


def cold_weights(calibration: Calibration) -> str:
    """No weight that one row is multiplied by is read faster than memory allows: none came from a cache."""
    peak = of_gpu(calibration).hardware.memory_bytes_per_s.value
    rates = [
        float(cost_of(sample.operator, sample.arguments).weight_bytes) * 1e9 / sample.device_ns / peak
        for sample in calibration.samples
        if sample.operator == "linear" and sample.arguments["rows"] == 1
    ]
    figure = f"{len(rates)} products of one row, the fastest at {max(rates, default=0):.2f} of the bandwidth"
    return checked(bool(rates) and max(rates) <= ABOVE, figure)


def main() -> int:
    """Check one calibration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration", type=Path, help="what dsocr-trace calibrate wrote")
    calibration = load_calibration(parser.parse_args().calibration)
    hold = all_hold(calibration.device, (held_back, floor, ceilings, cold_weights), calibration)
    counts = Counter(sample.operator for sample in calibration.samples)
    for name in ("noisy", "median_spread", "control_drift", "rounds", "points", "points_left_out"):
        print(f"INFO {name}: {calibration.state.get(name)}")
    print(f"INFO samples: {dict(counts)}")
    print(f"INFO notes: {list(calibration.notes)}")
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
