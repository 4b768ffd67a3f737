"""The time model: a roofline per operator call.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009. An operator takes the longer of two times: that of its
arithmetic at the device's peak, and that of its memory traffic at the device's bandwidth. Matrix products and other
arithmetic of one operator depend on each other (the softmax stands between two products), so their times add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from analytic.cost import Cost
    from analytic.hardware import Hardware

Bound: TypeAlias = Literal["compute", "memory"]

_NS_PER_S = 1e9


def device_time(runs: Iterable[tuple[int, Cost]], hardware: Hardware, dtype: str) -> tuple[int, Bound]:
    """Time of all calls of one operator, and what most of that time is bound by.

    Each call takes ``max(tensor_flops / peak + vector_flops / vector peak, bytes / bandwidth)``.

    Parameters
    ----------
    runs
        Pairs of a number of calls and their cost: per call as an array, or the same for each of them.
    hardware
        Ceilings of the device.
    dtype
        Dtype in which the operator computes.

    Returns
    -------
    tuple of int and str
        Nanoseconds, rounded once for the whole sum; and ``compute`` or ``memory``.
    """
    tensor_peak, vector_peak = hardware.tensor_peak(dtype), hardware.vector_peak(dtype)
    bandwidth = hardware.memory_bytes_per_s.value
    compute_bound_s = memory_bound_s = 0.0
    for calls, cost in runs:
        compute_s = np.asarray(cost.tensor_flops / tensor_peak + cost.vector_flops / vector_peak)
        memory_s = np.asarray(cost.bytes_total / bandwidth)
        in_compute = np.where(compute_s > memory_s, compute_s, 0.0)
        in_memory = np.where(compute_s > memory_s, 0.0, memory_s)
        compute_bound_s += _over(in_compute, calls)
        memory_bound_s += _over(in_memory, calls)
    nanoseconds = round((compute_bound_s + memory_bound_s) * _NS_PER_S)
    return nanoseconds, "compute" if compute_bound_s > memory_bound_s else "memory"


def _over(seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]], calls: int) -> float:
    return float(seconds.sum()) if seconds.ndim else float(seconds) * calls
