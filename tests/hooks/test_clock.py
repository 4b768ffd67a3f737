from __future__ import annotations

import numpy as np
import pytest

from hooks.clock import Marker, align
from hooks.errors import TraceError


def marker(host: int, offset: int, *, before: int = 1_000, after: int = 1_000) -> Marker:
    """An instant at `host`, seen by a profiler whose clock is `offset` ahead."""
    return Marker(host - before, host + after, host + offset, host + offset)


def test_offset_is_bounded_by_the_tightest_readings():
    group = [marker(1_000_000, 500, before=10, after=5_000), marker(1_010_000, 500, before=5_000, after=30)]
    clock = align([group])
    assert clock.residual_ns == 20
    assert abs(int(clock.offset_ns[0]) - 500) <= 20
    assert abs(int(clock.to_host(np.asarray([2_000_500]))[0]) - 2_000_000) <= 20


def test_epoch_times_keep_their_last_digits():
    offset = 1_795_000_000_000_000_000
    clock = align([[marker(7_000, offset, before=0, after=0)]])
    times = np.asarray([7_001 + offset, 8_003 + offset], np.int64)
    assert clock.to_host(times).tolist() == [7_001, 8_003]
    assert clock.residual_ns == 0


def test_drift_is_followed_between_groups():
    clock = align([[marker(0, 100, before=0, after=0)], [marker(1_000_000, 300, before=0, after=0)]])
    assert clock.drift_ns == 200
    assert int(clock.to_host(np.asarray([500_200]))[0]) == 500_000


def test_contradicting_markers_fail():
    with pytest.raises(TraceError, match="disagree with themselves by 80 ns"):
        align([[marker(0, 100, before=10, after=10), marker(1_000, 200, before=10, after=10)]])


def test_a_group_without_markers_fails():
    with pytest.raises(TraceError, match="no clock marker"):
        align([[]])


def test_a_residual_beyond_the_tolerance_fails():
    with pytest.raises(TraceError, match="known only to 1000 ns, attribution needs 999 ns"):
        align([[marker(0, 100)]], tolerance_ns=999)
    assert align([[marker(0, 100)]], tolerance_ns=1_000).residual_ns == 1_000
