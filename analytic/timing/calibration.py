"""What is known of a device's speed: its operators at many sizes, its ceilings, and what its host takes around them."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  the classes are rebuilt from files by their types
from typing import Any, Literal

import attrs

from analytic.hardware import Hardware  # noqa: TC001


@attrs.frozen
class Sample:
    """One operator at one size.

    Attributes
    ----------
    operator
        Name of the operator (`analytic.operators.OPERATORS`).
    dtype
        Name of the dtype of the model that runs it.
    arguments
        What the formula is given, by parameter; dtypes by their names.
    device_ns
        Median time on the device, in memory that is not new. A CPU is its own host: there it is the time of the whole
        call.
    host_ns
        Median time until the call returns on the host; 0 on a CPU.
    spread
        Interquartile range of `device_ns` over its median.
    repeats
        Timed repetitions.
    """

    operator: str
    dtype: str
    arguments: Mapping[str, int | str | bool]
    device_ns: float
    host_ns: float
    spread: float
    repeats: int


@attrs.frozen
class HostCosts:
    """What the host spends around the operators, in ns.

    Attributes
    ----------
    module_call_ns
        Calling a module: ``torch.nn.Module.__call__`` and a Python ``forward``.
    dispatch_ns
        One dispatched operator that starts no kernel, such as a view.
    operator_ns
        An operator of unknown host time, until it is launched; 0 on a CPU.
    loop_turn_ns
        One turn of a Python loop that finds nothing to do.
    launch_ns
        From a launch on the host to its start on an idle device; 0 on a CPU.
    kernel_floor_ns
        The shortest time that anything takes on the device.
    synchronise_ns
        Bringing a number back from a device that is done already.
    fresh_byte_ns
        Touching a byte of new memory for the first time, over touching it again; 0 where memory is kept for reuse.
    fresh_from_bytes
        Results of this size and more come in new memory each time.
    """

    module_call_ns: float
    dispatch_ns: float
    operator_ns: float
    loop_turn_ns: float
    launch_ns: float
    kernel_floor_ns: float
    synchronise_ns: float
    fresh_byte_ns: float = 0.0
    fresh_from_bytes: int = 1 << 62


@attrs.frozen
class Calibration:
    """Everything that is known of a device's speed.

    Attributes
    ----------
    device
        Its name.
    kind
        cpu or cuda.
    hardware
        Its entry: what its datasheet says.
    samples
        Operators at many sizes.
    host
        What the host spends.
    tensor_flops_per_s
        Fastest matrix product that was seen, by dtype.
    memory_bytes_per_s
        Bandwidth of a streaming copy, reading and writing, by the bytes that it moves.
    measured_at
        When, in ISO 8601; None where nothing was measured.
    source
        Whether it was measured, or where `hardware` has its figures from.
    state
        The machine during the measurement: versions, threads, clocks, load.
    notes
        What must be known of it, one sentence each, such as that it was noisy.
    """

    device: str
    kind: Literal["cpu", "cuda"]
    hardware: Hardware
    samples: tuple[Sample, ...]
    host: HostCosts
    tensor_flops_per_s: Mapping[str, float]
    memory_bytes_per_s: Mapping[int, float]
    measured_at: str | None
    source: Literal["calibrated", "datasheet", "estimated"] = "calibrated"
    state: Mapping[str, Any] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
