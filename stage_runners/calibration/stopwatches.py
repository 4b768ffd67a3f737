"""How one time is taken: as a model would find the operator.

Between two small operators of a model megabytes of weights stream through the caches. In a tight loop an operator takes
a fraction of what it takes there. So a reading on a CPU is one call, after memory that no cache holds was read. Only
ceilings are taken in a tight loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import numpy as np
import torch

from stage_runners.calibration.operands import Eviction

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from stage_runners.calibration.measure import Task
    from stage_runners.calibration.operands import Buffer

#: Whether the caches are warm makes no difference to a call that takes longer.
SHORT_NS: Final = 2_000_000
#: Shortest block of calls that is timed as one.
_BLOCK_NS: Final = 500_000
#: How long a GPU is held back for each call, while the host launches them all: longer than any call takes on the host.
_HOLD_NS_PER_CALL: Final = 200_000
_CYCLES_PER_NS: Final = 2
#: Readings that tell what the clock itself takes.
_CLOCK_READINGS: Final = 99


@attrs.frozen
class Call:
    """What is timed.

    Attributes
    ----------
    run
        Makes the call.
    inputs
        What in a model the operator before has just written.
    """

    run: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()


@attrs.frozen
class Reading:
    """Time of one call, on the device and until it returns on the host, in ns."""

    device_ns: float
    host_ns: float


class Stopwatch(Protocol):
    """Times calls."""

    def once(self, task: Task, call: Call) -> Reading:
        """Time a call as it comes."""

    def read(self, task: Task, call: Call, took_ns: float) -> Reading:
        """Time a call, which took so long before, as a model would find it; a ceiling in a tight loop."""


def stopwatch_for(device: torch.device, buffer: Buffer, dtype: torch.dtype) -> Stopwatch:
    """What takes times on a device.

    Parameters
    ----------
    device
        Which one.
    buffer
        What is streamed through the caches of a CPU.
    dtype
        That of the model.
    """
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch(Eviction(buffer, dtype))


class CpuStopwatch:
    """Wall time, less what the clock takes itself. A CPU is its own host.

    Parameters
    ----------
    evict
        Streams memory through the caches.
    """

    def __init__(self, evict: Callable[[], Any]) -> None:
        self._evict = evict
        self._clock_ns = float(np.median([self._evicted_ns(lambda: None) for _ in range(_CLOCK_READINGS)]))

    def once(self, task: Task, call: Call) -> Reading:
        """Time a call as it comes."""
        del task
        return self._reading(_wall_ns(call.run))

    def read(self, task: Task, call: Call, took_ns: float) -> Reading:
        """Time a call whose inputs have left the inner caches, but not the last one."""
        if task.ceiling:
            call.run()
            return Reading(_block_ns(call.run, _block_of(took_ns)), 0.0)
        if took_ns > SHORT_NS:
            if task.frequent:
                call.run()
            return self.once(task, call)
        for tensor in call.inputs:
            tensor.sum()
        return self._reading(self._evicted_ns(call.run, frequent=task.frequent))

    def _evicted_ns(self, run: Callable[[], Any], *, frequent: bool = False) -> float:
        self._evict()
        if frequent:
            run()
        return _wall_ns(run)

    def _reading(self, wall_ns: float) -> Reading:
        return Reading(max(wall_ns - self._clock_ns, 0.0), 0.0)


class CudaStopwatch:
    """Device time between two events, and wall time on the host, of calls back to back.

    The device is held back by a kernel that spins while the host launches, so that the calls run back to back: else a
    short kernel would be given the time that its launch takes.

    Parameters
    ----------
    device
        Which GPU.
    """

    #: All launches of a block must fit into the queue of a GPU (1,024), and one call may launch a dozen kernels.
    _MAX_CALLS: Final = 16

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def once(self, task: Task, call: Call) -> Reading:
        """Time a single call."""
        return self._block(task, call, 1)

    def read(self, task: Task, call: Call, took_ns: float) -> Reading:
        """Time a block of calls, after one that does not count."""
        call.run()
        return self._block(task, call, min(_block_of(took_ns), self._MAX_CALLS))

    def _block(self, task: Task, call: Call, number: int) -> Reading:
        torch.cuda.synchronize(self._device)
        if not task.waits:
            # Torch has no public kernel that spins.
            torch.cuda._sleep(number * _HOLD_NS_PER_CALL * _CYCLES_PER_NS)  # type: ignore[no-untyped-call]  # noqa: SLF001
        self._start.record()
        host_ns = _block_ns(call.run, number)
        self._end.record()
        torch.cuda.synchronize(self._device)
        return Reading(self._start.elapsed_time(self._end) * 1e6 / number, host_ns)


def _wall_ns(run: Callable[[], Any]) -> float:
    started = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - started


def _block_of(took_ns: float) -> int:
    return int(max(_BLOCK_NS / max(took_ns, 1.0), 1))


def _block_ns(run: Callable[[], Any], number: int) -> float:
    def block() -> None:
        for _ in range(number):
            run()

    return _wall_ns(block) / number
