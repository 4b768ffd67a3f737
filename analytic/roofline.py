"""The peaks of a datasheet: a roofline per operator call.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009. An operator takes the longer of two times: that of its
arithmetic at the device's peak, and that of its memory traffic at the device's bandwidth. Matrix products and other
arithmetic of one operator depend on each other (the softmax stands between two products), so their times add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from analytic.cost import Cost
    from analytic.hardware import Hardware

_NS_PER_S = 1e9


def device_time(runs: Iterable[tuple[int, Cost]], hardware: Hardware, dtype: str) -> int:
    """Time of all calls of one operator at the peaks of a device, in ns, rounded once for the whole sum.

    Each call takes ``max(tensor_flops / peak + vector_flops / vector peak, bytes / bandwidth)``.

    Parameters
    ----------
    runs
        Pairs of a number of calls and their cost: per call as an array, or the same for each of them.
    hardware
        Peaks of the device.
    dtype
        Dtype in which the operator computes.
    """
    tensor_peak, vector_peak = hardware.tensor_peak(dtype), hardware.vector_peak(dtype)
    bandwidth = hardware.memory_bytes_per_s.value
    seconds = 0.0
    for calls, cost in runs:
        compute = cost.tensor_flops / tensor_peak + cost.vector_flops / vector_peak
        memory = cost.bytes_total / bandwidth
        if isinstance(compute, np.ndarray) or isinstance(memory, np.ndarray):
            seconds += float(np.maximum(compute, memory).sum())
        else:
            seconds += max(compute, memory) * calls
    return round(seconds * _NS_PER_S)
