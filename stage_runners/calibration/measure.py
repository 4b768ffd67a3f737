"""In which order times are taken, so that they can be compared with each other.

All tasks come in rounds: a slow phase of the machine hits all of them and shows as spread. Short ones come in hands of
a few, drawn at random and dealt several times in random order: as in a model, other operators run before one comes
again. A processor forgets code and the ways of its branches meanwhile, which costs a short call more than cold data.
Figures are medians over all readings.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np
import torch

from stage_runners.calibration.operands import OperandsTooLargeError
from stage_runners.calibration.stopwatches import SHORT_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from stage_runners.calibration.stopwatches import Call, Reading, Stopwatch

#: What a reading takes besides the call.
_READING_NS: Final = 500_000
#: Short calls that come together, how often in a round, and rounds that have a long one.
_HAND: Final = 4
_DEALS: Final = 6
_LONG_ROUNDS: Final = 2
_ROUNDS: Final = 5
#: Most calls of the first look, and when they are enough.
_TRIES: Final = 4
#: And of one that is longer than it may be.
_LONG_TRIES: Final = 2
_LOOKED_NS: Final = 20_000_000
#: Tasks of a group that stay, however short the time.
_KEPT: Final = 3
_NS_PER_S: Final = 1_000_000_000

#: Told of a phase, how much of it is done, and of how much.
Progress: TypeAlias = "Callable[[str, int, int], None]"


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
    large
        Whether it may take long.
    ceiling
        Whether it shall show what the device can do at best.
    frequent
        Whether a model does it all the time, so that what it needs is at hand, whatever else is not.
    """

    group: str
    prepare: Callable[[], Call]
    larger_than: Callable[[Task], bool] = attrs.field(default=lambda _: False, repr=False)
    waits: bool = False
    indispensable: bool = False
    large: bool = False
    ceiling: bool = False
    frequent: bool = False


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
    def fastest_ns(self) -> float:
        """Shortest time on the device."""
        return min(reading.device_ns for reading in self._all)

    @property
    def spread(self) -> float:
        """How far the rounds differ: the interquartile range of their medians over the median of these."""
        rounds = [_median(reading.device_ns for reading in readings) for readings in self.rounds]
        low, middle, high = np.percentile(rounds, (25, 50, 75))
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
    total_s
        The first look and all rounds together.
    call_s, large_call_s
        One call, and one of a large task; tasks that take longer are left out.
    rounds
        How many; a call that takes longer than `call_s` is in the first two of them only.
    """

    look_s: float
    total_s: float
    call_s: float
    large_call_s: float
    rounds: int = _ROUNDS

    def call_ns(self, task: Task) -> float:
        """How long a task's call may take."""
        return (self.large_call_s if task.large else self.call_s) * _NS_PER_S

    def readings(self, took_ns: float, number: int) -> int:
        """How many readings of a call there are in a round."""
        if took_ns < SHORT_NS:
            return _DEALS
        return int(took_ns < self.call_s * _NS_PER_S or number < _LONG_ROUNDS)

    def cost_ns(self, took_ns: float) -> float:
        """What all readings of a call take."""
        return (took_ns + _READING_NS) * sum(self.readings(took_ns, number) for number in range(self.rounds))


@attrs.frozen
class Looked:
    """A task that is ready: its call, and how long it takes, in ns."""

    call: Call
    took_ns: float


def first_look(tasks: Sequence[Task], stopwatch: Stopwatch, limits: Limits, progress: Progress) -> dict[Task, Looked]:
    """Call each task a few times, to see how long it takes.

    Left out are tasks that need too much memory, that take too long, that are larger than one that takes half of that,
    and those whose turn comes too late.

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
    found: dict[Task, Looked] = {}
    seen: dict[Task, float] = {}
    deadline = time.monotonic() + limits.look_s
    for done, task in enumerate(tasks):
        progress("first look", done, len(tasks))
        bound = limits.call_ns(task)
        if not task.indispensable and (time.monotonic() > deadline or _surely_exceeds(task, seen, bound / 2)):
            continue
        try:
            call = task.prepare()
            took = seen[task] = _quickest(task, call, stopwatch, bound / 2)
        except (OperandsTooLargeError, torch.OutOfMemoryError):
            continue
        if took < bound or task.indispensable:
            found[task] = Looked(call, took)
    return found


def _surely_exceeds(task: Task, seen: Mapping[Task, float], bound_ns: float) -> bool:
    """Whether a smaller one took that long; the next larger one takes several times as long."""
    return any(took > bound_ns and task.larger_than(other) for other, took in seen.items())


def _quickest(task: Task, call: Call, stopwatch: Stopwatch, bound_ns: float) -> float:
    """Shortest of a few calls: the first may compile, and a busy machine delays some."""
    took, spent = math.inf, 0.0
    for tries in range(1, _TRIES + 1):
        last = stopwatch.once(task, call).device_ns
        took, spent = min(took, last), spent + last
        if spent > _LOOKED_NS and (took < bound_ns or tries == _LONG_TRIES):
            break
    return max(took, 1.0)


def affordable(found: Mapping[Task, Looked], limits: Limits, budget_s: float) -> dict[Task, Looked]:
    """The tasks for which the budget suffices: the longest one of the group that takes most is the first to go.

    Parameters
    ----------
    found
        All tasks.
    limits
        How often each is read.
    budget_s
        What all rounds may take.
    """
    costs = {task: limits.cost_ns(looked.took_ns) for task, looked in found.items()}
    groups: dict[str, list[Task]] = {}
    for task in sorted(found, key=lambda task: found[task].took_ns):
        groups.setdefault(task.group, []).append(task)
    sums = {name: sum(costs[task] for task in tasks) for name, tasks in groups.items()}
    # Nothing else tells what a large one tells.
    open_groups = {
        name: [task for task in tasks[_KEPT:] if not (task.indispensable or task.large)]
        for name, tasks in groups.items()
    }
    dropped: set[Task] = set()
    while sum(sums.values()) > budget_s * _NS_PER_S and any(open_groups.values()):
        name = max((name for name, tasks in open_groups.items() if tasks), key=sums.__getitem__)
        task = open_groups[name].pop()
        sums[name] -= costs[task]
        dropped.add(task)
    return {task: looked for task, looked in found.items() if task not in dropped}


def measure(
    kept: Mapping[Task, Looked], stopwatch: Stopwatch, limits: Limits, budget_s: float, progress: Progress
) -> dict[Task, Timing]:
    """Read every task in every round, in random order, until the budget is spent; each at least once.

    Parameters
    ----------
    kept
        The tasks.
    stopwatch
        Takes the times.
    limits
        Number of rounds, and how often each is read.
    budget_s
        What they may take.
    progress
        Told of every hand.
    """
    rounds: dict[Task, list[tuple[Reading, ...]]] = {task: [] for task in kept}
    # The first look may have been slow by accident.
    took = {task: looked.took_ns for task, looked in kept.items()}
    deadline = time.monotonic() + budget_s
    order = random.Random(0)  # noqa: S311
    for number in range(limits.rounds):
        visits = _deal({task: limits.readings(took[task], number) for task in kept}, order)
        readings: dict[Task, list[Reading]] = {}
        for done, visit in enumerate(visits):
            progress("rounds", number * len(visits) + done, limits.rounds * len(visits))
            for task in visit:
                if (number == 0 and task not in readings) or time.monotonic() < deadline:
                    readings.setdefault(task, []).append(stopwatch.read(task, kept[task].call, took[task]))
                    took[task] = min(took[task], readings[task][-1].device_ns)
        for task, found in readings.items():
            rounds[task].append(tuple(found))
    progress("rounds", limits.rounds, limits.rounds)
    return {task: Timing(tuple(readings)) for task, readings in rounds.items()}


def _deal(readings: Mapping[Task, int], order: random.Random) -> list[list[Task]]:
    """What is read in a round, in its order: short tasks in hands, all others alone."""
    short = [task for task, number in readings.items() if number == _DEALS]
    order.shuffle(short)
    hands = [short[start : start + _HAND] for start in range(0, len(short), _HAND)]
    visits = [[task for _ in range(_DEALS) for task in order.sample(hand, len(hand))] for hand in hands]
    visits += [[task] for task, number in readings.items() if number == 1]
    order.shuffle(visits)
    return visits
