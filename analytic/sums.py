"""What sweeps add up: costs and times of operators, over arrays of workloads and devices."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from analytic.cost import COST_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from analytic.cost import Size
    from analytic.hardware import Hardware
    from analytic.model import Stage

#: float64 holds whole numbers up to 2**53 exactly, and multiplies faster than int64.
Column: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

_NS_PER_S: Final = 1e9


class Ceilings:
    """Nanoseconds that a FLOP and a byte take, as columns with one row per device."""

    def __init__(self, hardware: Sequence[Hardware]) -> None:
        self._hardware = hardware
        self._per_byte = self._column(lambda device: device.memory_bytes_per_s.value)
        self._per_flop: dict[str, dict[str, Column]] = {}

    def times(self, cost: Mapping[str, Size], dtype: str) -> tuple[Size, Size]:
        """Time of arithmetic, and of memory traffic (devices, workloads)."""
        if dtype not in self._per_flop:
            self._per_flop[dtype] = {
                "tensor_flops": self._column(lambda device: device.tensor_peak(dtype)),
                "vector_flops": self._column(lambda device: device.vector_peak(dtype)),
            }
        compute = np.zeros_like(self._per_byte)
        for name, per_flop in self._per_flop[dtype].items():
            if _given(cost[name]):
                compute = compute + cost[name] * per_flop
        return compute, (cost["bytes_read"] + cost["bytes_written"]) * self._per_byte

    def _column(self, rate: Callable[[Hardware], float]) -> Column:
        return np.array([[_NS_PER_S / rate(device)] for device in self._hardware])


@attrs.frozen(eq=False)
class Run:
    """Equal calls of one operator: how many there are in a forward, and what one of them costs."""

    stage: Stage
    part: str
    dtype: str
    times: Size
    cost: Mapping[str, Size]

    @classmethod
    def joined(cls, runs: Sequence[Run]) -> Run:
        """Operators whose costs are plain numbers, as one with an entry for each."""
        cost = {name: np.array([run.cost[name] for run in runs], dtype=np.float64) for name in COST_COLUMNS}
        return attrs.evolve(runs[0], times=np.array([run.times for run in runs]), cost=cost)

    def taken(self, which: Counts) -> Run:
        """The entries `which` of all arrays."""
        cost = {name: each[which] if isinstance(each, np.ndarray) else each for name, each in self.cost.items()}
        return attrs.evolve(self, cost=cost)


class Sums:
    """Sums over operators, each a plain number or an array; those of times have one row per device."""

    def __init__(self) -> None:
        #: By kind (cost, flops, time, compute, cache) and what it is of.
        self.by_key: defaultdict[tuple[str, ...], Size] = defaultdict(float)
        self.activation_peak_bytes: Size = 0

    def add_forward(self, run: Run, ceilings: Ceilings) -> None:
        """Add costs and times of one operator."""
        self.add_cost(run)
        compute, memory = ceilings.times(run.cost, run.dtype)
        self.add_time(run, run.times * np.maximum(compute, memory), run.times * compute * (compute > memory))
        self.add_peak(run.cost["activation_bytes"] * (run.times > 0))

    def add_cost(self, run: Run) -> None:
        """Add the costs of one operator."""
        for column, each in run.cost.items():
            if _given(each):
                self.by_key["cost", run.stage, column] += run.times * each
        if _given(run.cost["tensor_flops"]):
            self.by_key["flops", run.stage, run.part] += run.times * run.cost["tensor_flops"]

    def add_time(self, run: Run, longest: Size, in_compute: Size) -> None:
        """Add the time of one operator, and that part of it which is bound by compute."""
        self.by_key["time", run.stage, run.part] += longest
        self.by_key["compute", run.stage] += in_compute

    def add_peak(self, size: Size) -> None:
        """Note the size of a result."""
        self.activation_peak_bytes = np.maximum(self.activation_peak_bytes, size)

    def add_up(self) -> None:
        """Replace arrays by sums of their entries."""
        for key, values in self.by_key.items():
            self.by_key[key] = values.sum(axis=-1, keepdims=True)
        self.activation_peak_bytes = np.max(self.activation_peak_bytes)


class Table:
    """Sums with one entry for each of many things: workloads, page layouts or batch sizes."""

    def __init__(self, length: int, devices: int) -> None:
        self._shapes = {True: (devices, length), False: (length,)}
        self._columns: dict[tuple[str, ...], Column] = {}
        #: Largest result of one operator.
        self.peak = np.zeros(length)

    def add(self, where: slice, sums: Sums) -> None:
        """Add to the sums of some entries."""
        for key, values in sums.by_key.items():
            if key not in self._columns:
                self._columns[key] = np.zeros(self._shapes[key[0] in {"time", "compute"}])
            self._columns[key][..., where] += values
        self.peak[where] = np.maximum(self.peak[where], sums.activation_peak_bytes)

    def taken(self, which: Counts, factor: Column) -> Sums:
        """The entries `which`, each as often as its `factor` says."""
        taken = Sums()
        for key, column in self._columns.items():
            taken.by_key[key] = column[..., which] * factor
        taken.add_peak(self.peak[which] * (factor > 0))
        return taken

    def named(self, kind: str) -> dict[Any, Column]:
        """Sums of one kind, by what they are of."""
        return {key[1:]: column for key, column in self._columns.items() if key[0] == kind}

    def by_device(self, kind: str, names: Sequence[str]) -> dict[Any, Column]:
        """Times of one kind, by device and by what they are of."""
        return {(name, *key): times[row] for key, times in self.named(kind).items() for row, name in enumerate(names)}


def _given(size: Size) -> bool:
    """Whether a size is something else than the plain number 0."""
    return not (isinstance(size, int) and size == 0)
