"""What predicted times rest on, in sentences. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.model import STAGES
from analytic.timing.datasheet import MEMORY_EFFICIENCY, TENSOR_EFFICIENCY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from analytic.predict import Prediction
    from analytic.timing.calibration import Calibration


def basis(prediction: Prediction) -> tuple[str, ...]:
    """Where the times of a prediction are from, what must be known of that, and what lies beyond it."""
    device = prediction.device
    found = [source_of(device), *device.notes]
    if device.source == "calibrated":
        found += _beyond(prediction)
    if device.kind == "cpu":
        found.append("a processor is its own device: it is busy in operators, and idle in what Python does around them")
    return tuple(found)


def source_of(device: Calibration) -> str:
    """Where the times on a device are from."""
    if device.source == "calibrated":
        return (
            f"times are from a calibration of {device.device}, measured {device.measured_at}, "
            f"with {len(device.samples):,} samples"
        )
    peaks = "the datasheet" if device.source == "datasheet" else "estimated peaks"
    return (
        f"times are from {peaks} of {device.device} with default efficiencies: {TENSOR_EFFICIENCY:.0%} of the peak of "
        f"matrix products, {MEMORY_EFFICIENCY:.0%} of the bandwidth, and what a host usually spends; nothing was "
        "measured on it"
    )


def _beyond(prediction: Prediction) -> Iterator[str]:
    """Each stage with the share of its time on the device that lies beyond the calibrated sizes."""
    for stage in STAGES:
        times = [each.times for each in prediction.operations if each.operation.stage == stage]
        beyond = sum(each.extrapolated_ns for each in times)
        if beyond:
            share = beyond / sum(each.predicted_device_ns for each in times)
            yield f"{share:.1%} of the device's time in {stage} is beyond the calibrated sizes"
