"""What a stage runner hands on: tables and figures, no behaviour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from analytic.workload import Workload
    from stage_runners.telemetry import DeviceState


@attrs.frozen
class Repeat:
    """Wall time of one traced generation without a profiler, in ns.

    Attributes
    ----------
    vision_ns
        From the first vision call to the end of the last view's projection; a GPU is waited for there.
    prefill_ns
        The first forward and the choice of its token, without vision.
    decode_ns
        Each decode step with the choice of its token.
    """

    vision_ns: int
    prefill_ns: int
    decode_ns: tuple[int, ...]


@attrs.frozen(eq=False)
class RoutingCounts:
    """How many tokens the router sent to each expert.

    Attributes
    ----------
    prefill
        Module path of each router to its counts (experts,) int64 of the prefill.
    decode
        The same for decode: (steps, experts) int64.
    """

    prefill: dict[str, NDArray[np.int64]]
    decode: dict[str, NDArray[np.int64]]


@attrs.frozen(eq=False)
class PageMeasurement:
    """One page: its generation, the instrumented repetitions of its steps, and how it was sampled."""

    name: str
    source: str
    workload: Workload
    tokens: tuple[int, ...]
    stopped_at_eos: bool
    repeats: tuple[Repeat, ...]
    routing: RoutingCounts
    profiled_steps: tuple[int, ...]
    step_pairs: tuple[StepPair, ...]


@attrs.frozen
class StepPair:
    """The same decode step, run plain and traced one after the other, in ns."""

    step: int
    plain_ns: int
    traced_ns: int


@attrs.frozen
class ClockReport:
    """How well the profiler's clock and the host's were aligned, over all captures."""

    captures: int
    residual_ns: int
    drift_ns: int


@attrs.frozen
class MeasuredMemory:
    """Memory by (stage, module path), in bytes.

    Attributes
    ----------
    cache_growth_bytes
        By how much the key-value cache grew; only modules that fill it.
    activation_peak_bytes
        Most that a call held beyond what was held when it began; empty where that cannot be measured.
    """

    cache_growth_bytes: dict[tuple[str, str], int]
    activation_peak_bytes: dict[tuple[str, str], int]


@attrs.frozen(eq=False)
class Measurement:
    """All that one in-process run yields; times are ns of `time.perf_counter_ns`.

    Attributes
    ----------
    modules, calls, callgraph, kernels
        Tables of the schemas in `hooks.tables`; the call graph counts the calls of the first traced generation.
    outside_windows
        Profiled events that belong to the measuring itself, not to the generation; left out of `kernels`.
    memory
        Of all pages together.
    device_state
        How the GPU was doing; None on a CPU, or where no driver answers.
    peak_device_bytes
        Peak of torch's allocator since the process began; None on a CPU.
    """

    modules: pa.Table
    calls: pa.Table
    callgraph: pa.Table
    kernels: pa.Table
    pages: tuple[PageMeasurement, ...]
    clock: ClockReport
    outside_windows: int
    notes: tuple[str, ...]
    memory: MeasuredMemory
    device_state: DeviceState | None
    peak_device_bytes: int | None
