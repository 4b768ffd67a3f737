"""Proof that the profiler's clock and the tracer's clock can be compared, and by how much they may disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from hooks.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Largest disagreement that attribution may rest on; a Python call of a module takes longer than this.
TOLERANCE_NS = 20_000


@attrs.frozen
class Marker:
    """One event that both clocks saw: it lies between two readings of the host's clock.

    Attributes
    ----------
    before_ns, after_ns
        Host clock just before and just after the event.
    start_ns, end_ns
        The event on the profiler's clock.
    """

    before_ns: int
    after_ns: int
    start_ns: int
    end_ns: int


@attrs.frozen(eq=False)
class ClockAlignment:
    """Offset between the profiler's clock and the host's, known at several times with bounds.

    Attributes
    ----------
    profiler_ns, offset_ns
        Times on the profiler's clock (groups,) int64, and what to subtract from it there (groups,) int64.
    residual_ns
        Half the width of the widest bound: no converted time is further off than this.
    """

    profiler_ns: NDArray[np.int64]
    offset_ns: NDArray[np.int64]
    residual_ns: int

    @property
    def drift_ns(self) -> int:
        """How far the offset moved over the capture."""
        return int(self.offset_ns.max() - self.offset_ns.min())

    def to_host(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert times on the profiler's clock, linearly between the markers.

        Parameters
        ----------
        times_ns
            Times (n,) int64 on the profiler's clock.
        """
        base = int(self.offset_ns[0])
        # Only the small drift goes through floating point: epoch nanoseconds would lose their last digits.
        origin = int(self.profiler_ns[0])
        drift = np.interp(
            (times_ns - origin).astype(np.float64),
            (self.profiler_ns - origin).astype(np.float64),
            (self.offset_ns - base).astype(np.float64),
        )
        return times_ns - base - np.rint(drift).astype(np.int64)


def align(groups: Sequence[Sequence[Marker]], *, tolerance_ns: int = TOLERANCE_NS) -> ClockAlignment:
    """Bound the clocks' offset in each group of markers.

    Every marker says that the offset is at least ``end - after`` and at most ``start - before``; a group holds
    markers taken so close together that the offset is one number, so its bounds intersect.

    Parameters
    ----------
    groups
        Markers of each group, in time order.
    tolerance_ns
        Largest residual to accept.

    Raises
    ------
    TraceError
        If a group has no marker, its bounds contradict each other, or the residual exceeds the tolerance.
    """
    times, offsets, residual = [], [], 0
    for group in groups:
        if not group:
            raise TraceError("the profiler recorded no clock marker, so its events cannot be placed; run it again")
        low = max(marker.end_ns - marker.after_ns for marker in group)
        high = min(marker.start_ns - marker.before_ns for marker in group)
        if low > high:
            raise TraceError(
                f"the profiler's clock and the host's disagree with themselves by {low - high} ns within one "
                "group of markers, so events cannot be placed; run it again"
            )
        times.append(group[0].start_ns)
        offsets.append((low + high) // 2)
        residual = max(residual, (high - low + 1) // 2)
    if residual > tolerance_ns:
        raise TraceError(
            f"the profiler's clock is known only to {residual} ns, attribution needs {tolerance_ns} ns; "
            "the machine is too busy, run it again when it is quieter"
        )
    return ClockAlignment(np.asarray(times, np.int64), np.asarray(offsets, np.int64), residual)
