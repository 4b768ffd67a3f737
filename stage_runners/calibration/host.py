"""What the host spends around the operators, and the ceilings of the device: tasks, and what their times say."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

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
#: Copies up to this one are measured, however little time there is.
_NEEDED_COPY: Final = 1 << 24


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


def host_costs(timings: Mapping[str, Timing], kind: str) -> HostCosts:
    """What the host spends.

    Parameters
    ----------
    timings
        Of `host_tasks`.
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
    )


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
            needed = side == _SIDES[0]
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
        needed = moved <= _NEEDED_COPY
        tasks[moved] = Task("copy", partial(prepare, moved), larger, indispensable=needed, ceiling=True)
    return tasks


def _one_of(smaller: list[Task]) -> Callable[[Task], bool]:
    return lambda task: task in smaller
