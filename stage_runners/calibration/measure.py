"""How times are taken, so that they can be compared with each other.

All tasks are measured in rounds, one after the other, and again: a slow phase of the machine hits all of them, and
shows as spread. A reading is the mean over a block of calls that is long enough for the clock. The garbage collector is
off while the clock runs. Figures are medians over all readings.
"""

from __future__ import annotations

import math
import time
import timeit
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import attrs
import numpy as np
import torch

from stage_runners.calibration.operands import OperandsTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

#: Shortest block of calls that is timed as one.
_BLOCK_NS: Final = 500_000
#: Time for one task in one round; a task whose call takes longer is called once.
_VISIT_NS: Final = 4_000_000
_VISIT_AND_MORE_NS: Final = 5_000_000
_READINGS_PER_VISIT: Final = 5
_ROUNDS: Final = 5
#: How long a GPU is held back for each call, while the host launches them all: longer than any call takes on the host.
_HOLD_NS_PER_CALL: Final = 200_000
_CYCLES_PER_NS: Final = 2
#: Calls of the first look.
_TRIES: Final = 4
#: Tasks of a group that stay, however short the time.
_KEPT: Final = 3
_NS_PER_S: Final = 1_000_000_000

#: Told of a phase, how much of it is done, and of how much.
Progress: TypeAlias = "Callable[[str, int, int], None]"


@attrs.frozen
class Reading:
    """Mean time of one call in a block, on the device and until it returns on the host, in ns."""

    device_ns: float
    host_ns: float


class Stopwatch(Protocol):
    """Times a block of calls, at most `max_calls` of them."""

    max_calls: int

    def __call__(self, call: Callable[[], Any], number: int, *, waits: bool) -> Reading:
        """Make `number` calls; `waits` says that each of them waits for the device itself."""


class CpuStopwatch:
    """Wall time, less what the timing loop takes itself. A CPU is its own host."""

    max_calls = 1000

    def __init__(self) -> None:
        self._loop_ns = min(_wall_ns(lambda: None, 1000) for _ in range(20))

    def __call__(self, call: Callable[[], Any], number: int, *, waits: bool) -> Reading:
        """Time a block."""
        del waits
        return Reading(max(_wall_ns(call, number) - self._loop_ns, 0.0), 0.0)


class CudaStopwatch:
    """Device time between two events, and wall time on the host.

    The device is held back by a kernel that spins while the host launches, so that the calls run back to back: else a
    short kernel would be given the time that its launch takes.

    Parameters
    ----------
    device
        Which GPU.
    """

    #: All launches of a block must fit into the queue of a GPU (1,024), and one call may launch a dozen kernels.
    max_calls = 16

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def __call__(self, call: Callable[[], Any], number: int, *, waits: bool) -> Reading:
        """Time a block."""
        torch.cuda.synchronize(self._device)
        if not waits:
            # Torch has no public kernel that spins.
            torch.cuda._sleep(number * _HOLD_NS_PER_CALL * _CYCLES_PER_NS)  # type: ignore[no-untyped-call]  # noqa: SLF001
        self._start.record()
        host_ns = _wall_ns(call, number)
        self._end.record()
        torch.cuda.synchronize(self._device)
        return Reading(self._start.elapsed_time(self._end) * 1e6 / number, host_ns)


def _wall_ns(call: Callable[[], Any], number: int) -> float:
    # It switches the garbage collector off, and back on.
    return timeit.Timer(call, timer=time.perf_counter_ns).timeit(number) / number


@attrs.frozen(eq=False)
class Task:
    """Something that is timed.

    Attributes
    ----------
    group
        Groups share the time fairly.
    prepare
        Makes what is needed, and gives the call.
    larger_than
        Whether it surely takes longer than another task.
    waits
        Whether the call itself waits for the device.
    indispensable
        Whether it stays, however long it takes.
    """

    group: str
    prepare: Callable[[], Callable[[], Any]]
    larger_than: Callable[[Task], bool] = attrs.field(default=lambda _: False, repr=False)
    waits: bool = False
    indispensable: bool = False


@attrs.frozen
class Timing:
    """What was read of one task.

    Attributes
    ----------
    rounds
        Readings of each round.
    """

    rounds: tuple[tuple[Reading, ...], ...]

    @property
    def device_ns(self) -> float:
        """Median time on the device."""
        return _median(reading.device_ns for reading in self._all)

    @property
    def host_ns(self) -> float:
        """Median time on the host."""
        return _median(reading.host_ns for reading in self._all)

    @property
    def spread(self) -> float:
        """Interquartile range of the device's time over its median."""
        low, middle, high = np.percentile([reading.device_ns for reading in self._all], (25, 50, 75))
        return float((high - low) / middle) if middle else 0.0

    @property
    def drift(self) -> float:
        """By how much the last round was slower than the first, as a ratio less 1."""
        first, last = (_median(r.device_ns for r in self.rounds[index]) for index in (0, -1))
        return last / first - 1

    @property
    def repeats(self) -> int:
        """Number of readings."""
        return len(self._all)

    @property
    def _all(self) -> list[Reading]:
        return [reading for readings in self.rounds for reading in readings]


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


@attrs.frozen
class Limits:
    """What a measurement may take.

    Attributes
    ----------
    look_s
        The first look at all tasks.
    budget_s
        All rounds together.
    call_s
        One call; tasks that take longer are left out.
    rounds
        How often every task is visited.
    """

    look_s: float
    budget_s: float
    call_s: float
    rounds: int = _ROUNDS


def first_look(tasks: Sequence[Task], stopwatch: Stopwatch, limits: Limits, progress: Progress) -> dict[Task, float]:
    """Call each task a first time, and again to see how long it takes, in ns.

    Left out are tasks that need too much memory, that take too long, that are larger than one that takes long, and
    those whose turn comes too late.

    Parameters
    ----------
    tasks
        Small ones before large ones.
    stopwatch
        Takes the times.
    limits
        What a call may take, and all of them.
    progress
        Told of every task.
    """
    found: dict[Task, float] = {}
    slow: list[Task] = []
    bound, deadline = limits.call_s * _NS_PER_S, time.monotonic() + limits.look_s
    for done, task in enumerate(tasks):
        progress("first look", done, len(tasks))
        late = time.monotonic() > deadline
        if not task.indispensable and (late or any(task.larger_than(other) for other in slow)):
            continue
        try:
            call = task.prepare()
            took = _quickest(call, task, stopwatch, bound / 2)
        except (OperandsTooLargeError, torch.OutOfMemoryError):
            continue
        if took < bound or task.indispensable:
            found[task] = took
        # The next larger one takes several times as long.
        if took > bound / 2:
            slow.append(task)
    return found


def _quickest(call: Callable[[], Any], task: Task, stopwatch: Stopwatch, bound_ns: float) -> float:
    """Shortest of two calls, or of a few more where both exceed a bound: a busy machine may have delayed them."""
    took = math.inf
    for number in range(_TRIES):
        took = min(took, stopwatch(call, 1, waits=task.waits).device_ns)
        if number and took < bound_ns:
            break
    return max(took, 1.0)


def affordable(found: Mapping[Task, float], limits: Limits) -> dict[Task, float]:
    """The tasks for which the budget suffices: the longest one of the group that takes most is the first to go.

    Parameters
    ----------
    found
        Time of one call, in ns.
    limits
        What all rounds may take.
    """
    groups: dict[str, list[Task]] = {}
    for task in sorted(found, key=found.__getitem__):
        groups.setdefault(task.group, []).append(task)
    costs = {name: sum(_visit_ns(found[task]) for task in tasks) for name, tasks in groups.items()}
    dropped: set[Task] = set()
    while sum(costs.values()) * limits.rounds > limits.budget_s * _NS_PER_S:
        open_groups = [name for name, tasks in groups.items() if len(tasks) > _KEPT and not tasks[-1].indispensable]
        if not open_groups:
            break
        name = max(open_groups, key=costs.__getitem__)
        task = groups[name].pop()
        costs[name] -= _visit_ns(found[task])
        dropped.add(task)
    return {task: took for task, took in found.items() if task not in dropped}


def _visit_ns(took: float) -> float:
    """What `_visit` takes: one long call, or a short one to warm up and several readings."""
    return max(took, _VISIT_AND_MORE_NS)


def measure(kept: Collection[Task], stopwatch: Stopwatch, limits: Limits, progress: Progress) -> dict[Task, Timing]:
    """Visit every task in every round; after the first round, until the budget is spent.

    Parameters
    ----------
    kept
        The tasks.
    stopwatch
        Takes the times.
    limits
        Budget, and number of rounds.
    progress
        Told of every visit.
    """
    rounds: dict[Task, list[tuple[Reading, ...]]] = {task: [] for task in kept}
    deadline = time.monotonic() + limits.budget_s
    for number in range(limits.rounds):
        for done, task in enumerate(kept):
            progress("rounds", number * len(kept) + done, limits.rounds * len(kept))
            if number == 0 or time.monotonic() < deadline:
                rounds[task].append(_visit(task, stopwatch))
    progress("rounds", limits.rounds * len(kept), limits.rounds * len(kept))
    return {task: Timing(tuple(readings)) for task, readings in rounds.items()}


def _visit(task: Task, stopwatch: Stopwatch) -> tuple[Reading, ...]:
    """Readings of one round.

    The first call drives out what the task before has left in the caches. It counts only where it is so long that this
    makes no difference.
    """
    call = task.prepare()
    warm = stopwatch(call, 1, waits=task.waits)
    if warm.device_ns > _VISIT_NS:
        return (warm,)
    number = int(min(max(_BLOCK_NS / max(warm.device_ns, 1.0), 1), stopwatch.max_calls))
    readings: list[Reading] = []
    spent = 0.0
    while not readings or (spent < _VISIT_NS and len(readings) < _READINGS_PER_VISIT):
        readings.append(stopwatch(call, number, waits=task.waits))
        spent += readings[-1].device_ns * number
    return tuple(readings)
