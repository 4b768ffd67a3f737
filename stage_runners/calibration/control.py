"""The control: work of which only the machine decides how long it takes, read during a calibration and around trials.

A machine that others share changes in one thing and not in another: one-row products may take a quarter longer while
copies take as long as ever. So the control is what the time of a model hangs on: a product of many rows, a product of
one row with weights that no cache holds, and a copy.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from stage_runners.calibration.executors import call_of
from stage_runners.calibration.measure import Task
from stage_runners.calibration.operands import CACHES, Buffer, Operands, last_level_cache_bytes
from stage_runners.calibration.stopwatches import Call, stopwatch_for

if TYPE_CHECKING:
    from collections.abc import Callable

#: Many rows; and the features of either product.
_ROWS: Final = 768
_FEATURES: Final = 1024
#: Elements of the copy, in fp32: reading and writing, 16 MB.
_COPIED: Final = 1 << 21
#: Readings of each task at a point.
_READINGS: Final = 48
#: What one task needs beside its cold weights.
_WARM_BYTES: Final = 1 << 25


def control_buffer(device: torch.device) -> Buffer:
    """What the operands of the control are views of: just large enough."""
    weight_bytes = _FEATURES**2 * torch.float32.itemsize
    return Buffer(device, CACHES * last_level_cache_bytes(device) + weight_bytes + _WARM_BYTES)


def control_tasks(buffer: Buffer, dtype: str) -> dict[str, Task]:
    """The tasks: ``product``, ``row`` and ``copy``.

    Parameters
    ----------
    buffer
        From `control_buffer`.
    dtype
        Full name of the dtype of the products.
    """

    def product(rows: int) -> Call:
        sizes = {"rows": rows, "in_features": _FEATURES, "out_features": _FEATURES}
        return call_of("linear", sizes | {"dtype": dtype, "bias": False}, buffer)

    def copy() -> Call:
        make = Operands(buffer)
        source, target = (make.tensor(torch.float32, _COPIED) for _ in range(2))
        return Call(lambda: target.copy_(source))

    calls: dict[str, Callable[[], Call]] = {
        "product": partial(product, _ROWS),
        "row": partial(product, 1),
        "copy": copy,
    }
    return {
        name: Task(f"control {name}", prepare, indispensable=True, ceiling=name == "copy")
        for name, prepare in calls.items()
    }


class ControlPoint:
    """Reads the control at any time.

    Parameters
    ----------
    device
        Where it runs.
    dtype
        Full name of the dtype of the products.
    """

    def __init__(self, device: torch.device, dtype: str) -> None:
        buffer = control_buffer(device)
        self._stopwatch = stopwatch_for(device, buffer, getattr(torch, dtype))
        self._tasks = control_tasks(buffer, dtype)
        self._calls = {name: task.prepare() for name, task in self._tasks.items()}
        # As in a calibration, the shortest call that was seen tells how many make a block.
        self._took_ns = {
            name: self._stopwatch.once(self._tasks[name], call).device_ns for name, call in self._calls.items()
        }

    def read(self) -> dict[str, float]:
        """Median time of each task in ns, one task in turn with the others, as in a calibration."""
        times: dict[str, list[float]] = {name: [] for name in self._tasks}
        with torch.no_grad():
            for _ in range(_READINGS):
                for name, found in times.items():
                    reading = self._stopwatch.read(self._tasks[name], self._calls[name], self._took_ns[name])
                    found.append(reading.device_ns)
                    self._took_ns[name] = min(self._took_ns[name], reading.device_ns)
        return {name: float(np.median(found)) for name, found in times.items()}
