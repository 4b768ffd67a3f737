"""Measured memory: growth of the key-value cache, and on a GPU the activation peak of every module."""

from __future__ import annotations

from collections import Counter
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import numpy as np
import torch

from stage_runners.measurement import MeasuredMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import nn

#: Where layer ``i`` attends, and so what fills layer ``i`` of the cache.
_ATTENTION: Final = "model.layers.{}.self_attn"


class Allocator(Protocol):
    """An allocator that keeps the peak of what it hands out, in bytes."""

    def allocated(self) -> int:
        """Bytes held now."""

    def peak(self) -> int:
        """Most bytes held since the last `reset_peak`."""

    def reset_peak(self) -> None:
        """Make the bytes held now the peak."""


@attrs.frozen
class CudaAllocator:
    """Torch's own CUDA allocator. It counts on the host when memory is asked for, so nothing waits for the GPU."""

    device: torch.device

    def allocated(self) -> int:
        """Bytes held by tensors now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Most bytes held since the last `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Make the bytes held now the peak."""
        torch.cuda.reset_peak_memory_stats(self.device)


class PeakClock:
    """A clock for `hooks.tracer.Tracer` that counts its readings, and notes at each what the allocator held.

    The peak is reset at every reading, so each stretch between two readings has a peak of its own. A call's peak is the
    largest of the stretches from its start to its end, those inside its children among them.

    Parameters
    ----------
    allocator
        Where the memory comes from.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._allocated: list[int] = []
        self._peak_before: list[int] = []

    def __call__(self) -> int:
        """Take a reading; return its number."""
        self._peak_before.append(self._allocator.peak())
        self._allocated.append(self._allocator.allocated())
        self._allocator.reset_peak()
        return len(self._allocated) - 1

    def peaks_above_start(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
        """Most bytes held between two readings beyond those held at the first, for each pair of readings."""
        # Every second stretch is that of a pair; the last may end where the readings end.
        bounds = np.column_stack([start + 1, end + 1]).ravel()
        peaks = np.maximum.reduceat(np.array([*self._peak_before, 0], np.int64), bounds)[::2]
        return peaks - np.array(self._allocated, np.int64)[start]


def module_peaks(calls: pa.Table, clock: PeakClock) -> dict[tuple[str, str], int]:
    """Largest activation peak of each (stage, module path) over its calls, in bytes.

    A call's peak is what was held beyond what was held when it began: temporaries and outputs, those of its children
    included.

    Parameters
    ----------
    calls
        Schema `hooks.tables.CALLS`, of a tracer whose clock was `clock`.
    clock
        That clock.
    """
    peaks = clock.peaks_above_start(calls["start_ns"].to_numpy(), calls["end_ns"].to_numpy())
    keyed = calls.select(["stage", "module_path"]).append_column("peak", [peaks])
    largest = keyed.group_by(["stage", "module_path"]).aggregate([("peak", "max")])
    return {(row["stage"], row["module_path"]): row["peak_max"] for row in largest.to_pylist()}


class CacheRecorder:
    """Notes how large the key-value cache is that the model returns, to tell its growth by stage.

    Parameters
    ----------
    model
        Returns ``past_key_values``, which yields keys and values (and perhaps more) of each layer.

    Attributes
    ----------
    observers
        Module path of the root to the function that takes its output.
    """

    def __init__(self, model: nn.Module) -> None:
        paths = {path for path, _ in model.named_modules()}
        self._paths = list(takewhile(paths.__contains__, map(_ATTENTION.format, count())))
        self._after_prefill: list[int] = []
        self._latest: list[int] = []
        self.observers: dict[str, Callable[[Any], None]] = {"": self._note}

    def _note(self, output: Any) -> None:
        # Sizes, not the cache: its memory must not outlive its generation.
        self._latest = _held_bytes(output.past_key_values)
        self._after_prefill = self._after_prefill or self._latest

    def clear(self) -> None:
        """Forget what was recorded."""
        self._after_prefill = self._latest = []

    def growth(self) -> dict[tuple[str, str], int]:
        """Bytes by which each layer grew since the last `clear`, by (stage, path of its attention).

        The first forward since then is the prefill, all later ones are decode.
        """
        grown = zip(self._paths, self._after_prefill, self._latest, strict=False)
        return {
            key: size
            for path, before, after in grown
            for key, size in ((("prefill", path), before), (("decode", path), after - before))
        }


def _held_bytes(cache: Any) -> list[int]:
    """Size of keys and values of each layer."""
    return [sum(tensor.nbytes for tensor in layer[:2]) for layer in cache]


def combined(pages: Sequence[MeasuredMemory]) -> MeasuredMemory:
    """All pages of a run together: what caches grew by adds up, of peaks the largest counts."""
    growth: Counter[tuple[str, str]] = Counter()
    peaks: dict[tuple[str, str], int] = {}
    for page in pages:
        growth.update(page.cache_growth_bytes)
        for key, peak in page.activation_peak_bytes.items():
            peaks[key] = max(peak, peaks.get(key, peak))
    return MeasuredMemory(dict(growth), peaks)
