"""What the host spends around the operators, and the ceilings of the device: tasks, and what their times say."""

from __future__ import annotations

import math
from functools import partial
from itertools import cycle, takewhile
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from analytic.timing.calibration import HostCosts
from stage_runners.calibration.measure import Task
from stage_runners.calibration.operands import Operands
from stage_runners.calibration.stopwatches import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stage_runners.calibration.measure import Timing
    from stage_runners.calibration.operands import Buffer

#: Modules that are called in turn: between two calls of one of them more is read than a last cache holds.
_MODULES: Final = 256
_TURNS: Final = 64
#: Sides of the square products among which the fastest is the ceiling.
_SIDES: Final = (512, 1024, 2048, 4096, 8192)
#: Bytes that streaming copies move: reading and writing, from within the first cache to beyond the last.
_COPIED: Final = tuple(1 << exponent for exponent in range(12, 30))
#: Bytes of the tensors that are filled, new ones and kept ones.
_FILLED: Final = tuple(count << 20 for count in (1, 2, 4, 8, 16, 20, 24, 32, 48, 64, 128, 256))
#: New tensors that are held at once, as by a few layers in a row: only what many hold together is given back.
_HELD: Final = 3
#: Of the largest tensors, as many tell what a byte of new memory costs.
_TELLING: Final = 4
#: glibc raises the size from which memory is new each time to that of the largest block that was given back, up to
#: 32 MB (mallopt(3), M_MMAP_THRESHOLD): every process that has run for a while has it there.
_GIVEN_BACK: Final = (32 << 20) - (1 << 16)
#: Memory counts as new from where a byte costs this share of what it costs at the largest sizes.
_FRESH_SHARE: Final = 0.3
#: What is watched for drift: a product of this side, and a copy that moves these bytes.
CONTROL_SIDE: Final = 512
CONTROL_BYTES: Final = 1 << 24


class _Nothing(nn.Module):
    """The least that a module can do."""

    def forward(self, x: Any) -> Any:
        """Hand on."""
        return x


def _nothing(x: Any) -> Any:
    return x


_VIEWS: Final[tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = (
    lambda x: x.view(-1),
    lambda x: x.transpose(0, 1),
    lambda x: x.unsqueeze(0),
)


def host_tasks(device: torch.device) -> dict[str, Task]:
    """Tasks that `host_costs` needs, by name."""
    modules, numbers = cycle([_Nothing() for _ in range(_MODULES)]), [0] * _TURNS
    x, one = torch.ones(64, 64, device=device), torch.ones(1, device=device)
    functions = cycle([_nothing])
    views = cycle(_VIEWS)

    def turns() -> None:
        for _, count in enumerate(numbers):
            if count:
                raise AssertionError

    def launch_and_wait() -> None:
        one.neg()
        _wait(device)

    found: dict[str, tuple[Callable[[], Any], bool]] = {
        "module": (lambda: next(modules)(x), False),
        "function": (lambda: next(functions)(x), False),
        "view": (lambda: next(views)(x), False),
        "turns": (turns, False),
        "shortest": (one.neg, False),
        "read_back": (one.item, True),
        "wait": (lambda: _wait(device), True),
        "launch_and_wait": (launch_and_wait, True),
    }
    return {
        name: Task("host", _ready(run), waits=waits, indispensable=True, frequent=name != "shortest")
        for name, (run, waits) in found.items()
    }


def _ready(run: Callable[[], Any]) -> Callable[[], Call]:
    return lambda: Call(run)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_costs(timings: Mapping[str, Timing], fills: Mapping[tuple[str, int], Timing], kind: str) -> HostCosts:
    """What the host spends.

    Parameters
    ----------
    timings
        Of `host_tasks`.
    fills
        Of `fill_tasks`.
    kind
        cpu or cuda.
    """
    on_host = {name: timing.device_ns if kind == "cpu" else timing.host_ns for name, timing in timings.items()}
    floor = timings["shortest"].device_ns
    launch = on_host["launch_and_wait"] - on_host["shortest"] - on_host["wait"] - floor
    return HostCosts(
        module_call_ns=max(on_host["module"] - on_host["function"], 0.0),
        dispatch_ns=max(on_host["view"] - on_host["function"], 0.0),
        operator_ns=0.0 if kind == "cpu" else on_host["shortest"],
        loop_turn_ns=on_host["turns"] / _TURNS,
        launch_ns=0.0 if kind == "cpu" else max(launch, 0.0),
        kernel_floor_ns=floor,
        synchronise_ns=on_host["read_back"],
        **fresh_memory(fills),
    )


def fill_tasks(device: torch.device, most: int) -> dict[tuple[str, int], Task]:
    """Fills of tensors that are made for it, several in a row, and of one that is kept, by kind and bytes.

    Parameters
    ----------
    device
        Where; a GPU's memory is kept for reuse, and there is nothing to measure.
    most
        Bytes that may be taken.
    """
    sizes = [size for size in _FILLED if _HELD * size <= most] if device.type == "cpu" else []
    torch.empty(min(most, _GIVEN_BACK), dtype=torch.uint8)
    kept = torch.ones(sizes[-1] // 4 if sizes else 0)

    def fresh(size: int) -> Call:
        return Call(lambda: [torch.empty(size // 4).fill_(1) for _ in range(_HELD)])

    def again(size: int) -> Call:
        return Call(partial(kept[: size // 4].fill_, 1))

    return {
        (kind, size): Task(f"{kind} fill", partial(make, size), large=size > _GIVEN_BACK)
        for kind, make in (("fresh", fresh), ("kept", again))
        for size in sizes
    }


def fresh_memory(timings: Mapping[tuple[str, int], Timing]) -> dict[str, Any]:
    """What a byte of new memory costs, and from how many bytes on memory is new.

    Parameters
    ----------
    timings
        Of `fill_tasks`.

    Returns
    -------
    dict
        ``fresh_byte_ns`` and ``fresh_from_bytes`` of `HostCosts`; empty where new memory costs nothing.
    """
    extra = {
        size: (timings[kind, size].device_ns / _HELD - timings["kept", size].device_ns) / size
        for kind, size in timings
        if kind == "fresh" and ("kept", size) in timings
    }
    sizes = sorted(extra)
    per_byte = float(np.median([extra[size] for size in sizes[-_TELLING:]])) if sizes else 0.0
    fresh = list(takewhile(lambda size: extra[size] > max(_FRESH_SHARE * per_byte, 0.0), reversed(sizes)))
    if not fresh:
        return {}
    # Somewhere between the smallest that is new and the largest that is not.
    kept = max((size for size in sizes if size < fresh[-1]), default=fresh[-1])
    return {"fresh_byte_ns": per_byte, "fresh_from_bytes": math.isqrt(kept * fresh[-1])}


def product_tasks(buffer: Buffer, dtypes: tuple[str, ...]) -> dict[tuple[str, int], Task]:
    """Square matrix products by dtype and side."""

    def prepare(dtype: torch.dtype, side: int) -> Call:
        make = Operands(buffer)
        left, right = (make.tensor(dtype, side, side) for _ in range(2))
        return Call(lambda: torch.mm(left, right))

    tasks: dict[tuple[str, int], Task] = {}
    for dtype in dtypes:
        for number, side in enumerate(_SIDES):
            larger = _one_of([tasks[dtype, smaller] for smaller in _SIDES[:number]])
            make = partial(prepare, getattr(torch, dtype), side)
            needed = side == CONTROL_SIDE
            tasks[dtype, side] = Task(f"product {dtype}", make, larger, indispensable=needed, ceiling=True)
    return tasks


def copy_tasks(buffer: Buffer) -> dict[int, Task]:
    """Streaming copies by the bytes that they move."""

    def prepare(moved: int) -> Call:
        make = Operands(buffer)
        source, target = (make.tensor(torch.float32, moved // 8) for _ in range(2))
        return Call(lambda: target.copy_(source))

    tasks: dict[int, Task] = {}
    for moved in _COPIED:
        larger = _one_of(list(tasks.values()))
        needed = moved <= CONTROL_BYTES
        tasks[moved] = Task("copy", partial(prepare, moved), larger, indispensable=needed, ceiling=True)
    return tasks


def _one_of(smaller: list[Task]) -> Callable[[Task], bool]:
    return lambda task: task in smaller
