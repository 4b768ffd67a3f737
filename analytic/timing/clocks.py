"""Two clocks: the host that launches, and the device that runs what was launched.

The host goes through modules and operators in their order. Each costs it something; what it launches begins on the
device when both the launch has arrived and the device is done with what came before. A read-back makes the host wait
for the device. Where the host is faster the device is always busy, where it is slower the device has gaps. A processor
is its own device: there both clocks are one, and everything takes its turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from analytic.layers.base import Moment
    from analytic.operators import OperatorCall
    from analytic.timing.calibration import HostCosts
    from analytic.timing.curves import Curves

Cause: TypeAlias = Literal["compute", "memory", "launch", "host"]
#: Module, and what it calls the operator: empty for the call of the module itself.
Place: TypeAlias = "tuple[str, str]"

#: Operators that start no kernel, and the one that waits.
_VIEW: Final = "view"
_LOOP: Final = "host_loop"
_READ_BACK: Final = "to_host"
_WITHOUT_KERNEL: Final = (_VIEW, _LOOP)


@attrs.define
class Spent:
    """What one operator of a module spends, or several together, in ns.

    Attributes
    ----------
    wall_ns
        By how much it moves the end of everything.
    device_ns, host_ns
        Busy time of the device and of the host.
    roof_ns
        What the calibrated ceilings would allow.
    floor_ns
        Part of it: the shortest time that anything takes, for each launch.
    extrapolated_ns
        How much of the device's time lies beyond the calibrated sizes.
    by_cause
        The wall time by what it waits for.
    """

    wall_ns: float = 0.0
    device_ns: float = 0.0
    host_ns: float = 0.0
    roof_ns: float = 0.0
    floor_ns: float = 0.0
    extrapolated_ns: float = 0.0
    by_cause: defaultdict[Cause, float] = attrs.field(factory=lambda: defaultdict(float))

    def add(self, other: Spent, times: float = 1.0) -> None:
        """Take in what another spends, a number of times."""
        self.wall_ns += other.wall_ns * times
        self.device_ns += other.device_ns * times
        self.host_ns += other.host_ns * times
        self.roof_ns += other.roof_ns * times
        self.floor_ns += other.floor_ns * times
        self.extrapolated_ns += other.extrapolated_ns * times
        for cause, nanoseconds in other.by_cause.items():
            self.by_cause[cause] += nanoseconds * times


@attrs.frozen
class Timeline:
    """One forward on both clocks.

    Attributes
    ----------
    wall_ns
        From its first step to the end of both clocks.
    busy_ns
        How long the device works.
    places
        What each operator of each module spends; their wall times add up to `wall_ns`.
    calls
        How often each module was called.
    """

    wall_ns: float
    busy_ns: float
    places: Mapping[Place, Spent]
    calls: Mapping[str, int]

    @property
    def idle_ns(self) -> float:
        """How long the device waits for the host."""
        return self.wall_ns - self.busy_ns


def simulate(sequence: Iterable[Moment], curves: Curves, host: HostCosts) -> Timeline:
    """Run one forward.

    Parameters
    ----------
    sequence
        Calls of modules and operators, in their order (`analytic.layers.base.Tape.sequence`).
    curves
        Times of operators.
    host
        What the host spends around them.
    """
    clocks = _Clocks(curves, host)
    for moment in sequence:
        spent, times = clocks.places[moment.path, moment.name], int(moment.times)
        if moment.steps is None:
            clocks.calls[moment.path] += times
            clocks.host_works(spent, host.module_call_ns * times)
            continue
        for _ in range(times):
            for call in moment.steps.calls:
                for _ in range(1 if call.operator.name in _WITHOUT_KERNEL else int(call.times)):
                    clocks.run(spent, call)
    return clocks.timeline()


class _Clocks:
    """Where both clocks stand."""

    def __init__(self, curves: Curves, host: HostCosts) -> None:
        self._curves, self._host = curves, host
        self._one_clock = host.launch_ns == 0
        self._host_at = self._device_at = self._busy = 0.0
        self.places: defaultdict[Place, Spent] = defaultdict(Spent)
        self.calls: Counter[str] = Counter()

    def timeline(self) -> Timeline:
        """Everything that was run."""
        return Timeline(max(self._host_at, self._device_at), self._busy, dict(self.places), dict(self.calls))

    def run(self, spent: Spent, call: OperatorCall) -> None:
        """One operator."""
        if call.operator.name == _VIEW:
            self.host_works(spent, self._host.dispatch_ns * float(call.times))
        elif call.operator.name == _LOOP:
            self.host_works(spent, self._host.loop_turn_ns * float(call.arguments["turns"]))
        elif call.operator.name == _READ_BACK:
            self._wait(spent)
        else:
            self._launch(spent, call)

    def host_works(self, spent: Spent, nanoseconds: float) -> None:
        """The host is busy with something that launches nothing."""
        spent.host_ns += nanoseconds
        self._advance(spent, "host", self._host_at + nanoseconds, self._device_at)

    def _wait(self, spent: Spent) -> None:
        spent.host_ns += self._host.synchronise_ns
        self._advance(spent, "host", max(self._host_at, self._device_at) + self._host.synchronise_ns, self._device_at)

    def _launch(self, spent: Spent, call: OperatorCall) -> None:
        time = self._curves.time(call)
        spent.device_ns += time.device_ns
        spent.host_ns += time.host_ns
        spent.roof_ns += time.roof_ns
        spent.floor_ns += time.floor_ns
        spent.extrapolated_ns += time.device_ns * (time.source != "calibrated")
        self._busy += time.device_ns
        at_floor = time.roof_ns < 2 * time.floor_ns
        cause: Cause = "launch" if at_floor else "compute" if time.compute_bound else "memory"
        if self._one_clock:
            end = self._host_at + time.device_ns
            self._advance(spent, cause, end, end)
            return
        launched = self._host_at + time.host_ns
        arrives = launched + self._host.launch_ns
        if arrives > self._device_at:
            self._advance(spent, "host", launched, arrives)
        self._advance(spent, cause, launched, max(arrives, self._device_at) + time.device_ns)

    def _advance(self, spent: Spent, cause: Cause, host_at: float, device_at: float) -> None:
        """Move both clocks; the later one is the wall."""
        before = max(self._host_at, self._device_at)
        self._host_at, self._device_at = host_at, device_at
        moved = max(host_at, device_at) - before
        spent.wall_ns += moved
        spent.by_cause[cause] += moved
