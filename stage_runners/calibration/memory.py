"""New memory: from which size on results come in it, what it costs, and how samples are taken without it.

The GNU C library gives large blocks back to the operating system as soon as they are free, and the top of its heap when
much of it is free. So the pages of large results are made again each time. Whether that meets a sample depends on what
was freed before it. So samples are taken while the library keeps what is freed, and new memory has a cost of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
import torch

from stage_runners.calibration.measure import Task
from stage_runners.calibration.stopwatches import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stage_runners.calibration.measure import Timing

#: Parameters of mallopt(3), and what they are once a process has given back a block of 32 MB: the library raises its
#: thresholds to the size of such a block, and to twice that, but no further.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_MMAP_MAX: Final = -4
_USUAL: Final = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65_536}
_KEEPING: Final = {_MMAP_MAX: 0, _TRIM_THRESHOLD: (1 << 31) - 1}
#: Results that are tried, and how many of them are held at once, as by a few layers in a row.
_RESULTS: Final = tuple(count << 20 for count in (8, 12, 16, 20, 24, 28, 33, 40, 48))
_HELD: Final = 3
_TRIES: Final = 3
#: Bytes that are filled.
_FILLED: Final = tuple(count << 20 for count in (32, 64, 96))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep what is freed. Afterwards it gives back again, but not what lies below other blocks."""
    _set(_KEEPING)
    try:
        yield
    finally:
        _set(_USUAL)
        if library := _glibc():
            library.malloc_trim(0)


def fresh_from_bytes() -> int | None:
    """Smallest result that comes in new memory, with others beside it; None where the library is another one."""
    if _glibc() is None:
        return None
    _set(_USUAL)
    kept = 0
    for size in _RESULTS:
        # The heap may grow at first.
        if min(_given_back(size) for _ in range(_TRIES)) > _HELD * size // 2:
            return (kept + size) // 2
        kept = size
    return kept


def _given_back(size: int) -> int:
    """Bytes that go back to the operating system when a few results of some size are freed."""
    held = [torch.empty(size, dtype=torch.uint8).fill_(1) for _ in range(_HELD)]
    before = psutil.Process().memory_info().rss
    del held
    return before - psutil.Process().memory_info().rss


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None


def _set(parameters: Mapping[int, int]) -> None:
    if library := _glibc():
        for parameter, value in parameters.items():
            library.mallopt(parameter, value)


def fill_tasks() -> dict[tuple[str, int], Task]:
    """Fills of new memory and of memory that is kept, by kind and bytes."""
    kept = torch.ones(max(_FILLED), dtype=torch.uint8)

    def fresh(size: int) -> None:
        torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8).fill_(1)

    def again(size: int) -> None:
        kept[:size].fill_(1)

    def ready(run: Callable[[], Any]) -> Call:
        return Call(run)

    # One large result follows another: a hypervisor has had no time to take the memory back.
    return {
        (kind, size): Task(
            f"{kind} fill", partial(ready, partial(run, size)), indispensable=True, large=True, frequent=True
        )
        for kind, run in (("fresh", fresh), ("kept", again))
        for size in _FILLED
    }


def fresh_byte_ns(timings: Mapping[tuple[str, int], Timing]) -> float:
    """What a byte of new memory costs.

    Parameters
    ----------
    timings
        Of `fill_tasks`.
    """
    extra = [
        (timings["fresh", size].device_ns - timings["kept", size].device_ns) / size
        for kind, size in timings
        if kind == "fresh"
    ]
    return max(float(np.median(extra)), 0.0)
