"""Many workloads at once: the same formulas, evaluated on arrays with one entry per workload.

Like layers of a list are evaluated once and counted (`Tape.folded`), and experts are groups of like load. In decode
every cost is affine in the number of cached positions, so a generation of any length follows exactly from two
evaluations: with an empty cache, and with the cache of the last forward.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from analytic.cost import COST_COLUMNS, MODEL_DTYPES
from analytic.layers.base import SequenceShape, Tape
from analytic.model import STAGES, Stage, checked_policy
from analytic.routing import PlannedLoad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from analytic.cost import Cost, Size
    from analytic.crops import PageLayout
    from analytic.hardware import Hardware
    from analytic.layers.base import Layer, Policy
    from analytic.model import Model
    from analytic.routing import Plan

#: float64 holds whole numbers up to 2**53 exactly, and multiplies faster than int64.
Column: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]

#: Workloads per evaluation: few enough that their columns stay in the processor's cache.
_CHUNK: Final = 8192
_NS_PER_S: Final = 1e9


@attrs.frozen(eq=False)
class Points:
    """Workloads to evaluate together.

    Attributes
    ----------
    pages
        The different page layouts that occur.
    page
        Index into `pages` (workloads,).
    seq_len, new_tokens, batch
        Positions of the prompt, tokens to generate, and prompts per forward (workloads,).
    """

    pages: Sequence[PageLayout]
    page: Counts
    seq_len: Counts
    new_tokens: Counts
    batch: Counts

    def __len__(self) -> int:
        return len(self.page)

    @property
    def image_tokens(self) -> Counts:
        """Positions of the prompt that hold image features (workloads,)."""
        return np.array([page.image_tokens for page in self.pages], dtype=np.int64)[self.page]


@attrs.frozen(eq=False)
class Evaluated:
    """Costs and times of all workloads; every column has one entry per workload.

    Attributes
    ----------
    costs
        By stage, then by the columns of `analytic.cost.COST_COLUMNS`.
    part_flops
        Tensor FLOPs by stage and part of the model.
    part_times
        Predicted ns by hardware, stage and part of the model.
    compute_times
        Those of the predicted ns, by hardware and stage, that are spent in operators bound by compute.
    cache_traffic
        Bytes read and written in decode because positions are cached.
    activation_peak_bytes
        Largest result of one operator.
    weight_bytes
        Bytes of the model's parameters.
    """

    costs: Mapping[Stage, Mapping[str, Column]]
    part_flops: Mapping[tuple[Stage, str], Column]
    part_times: Mapping[tuple[str, Stage, str], Column]
    compute_times: Mapping[tuple[str, Stage], Column]
    cache_traffic: Column
    activation_peak_bytes: Column
    weight_bytes: int

    def time(self, hardware: str, stage: Stage) -> Column:
        """Predicted ns of a stage."""
        parts = [times for (name, where, _), times in self.part_times.items() if (name, where) == (hardware, stage)]
        return np.sum(parts, axis=0) if parts else np.zeros_like(self.cache_traffic)


def evaluate(
    model: Model, points: Points, *, hardware: Sequence[Hardware], policy: Policy, routing: Plan = "balanced"
) -> Evaluated:
    """Evaluate all workloads on all devices.

    Parameters
    ----------
    model
        Which model.
    points
        Workloads.
    hardware
        Devices to predict for.
    policy
        How the model runs, and what is counted.
    routing
        How tokens are spread over experts.

    Raises
    ------
    InputError
        If the policy is unknown, or a device has no figure for its dtype.
    """
    policy = checked_policy(policy)
    bench = _Bench(model, hardware, policy, routing)
    columns = _Columns(len(points))
    for number, page in enumerate(points.pages):
        shown = np.flatnonzero(points.page == number)
        columns.add(shown, bench.page(page), points.batch[shown])
    for start in range(0, len(points), _CHUNK):
        where = slice(start, start + _CHUNK)
        columns.add(where, bench.sequences(points, where), 1)
    parameters = sum(node.parameter_count for node in model.tree)
    return columns.evaluated(parameters * MODEL_DTYPES[policy.dtype].bytes)


class _Once:
    """A single forward, whose cost depends on nothing else."""

    def total(self, empty: Size, full: Size) -> Size:
        """What it is."""
        del empty
        return full

    def longest(self, empty: tuple[Size, Size], full: tuple[Size, Size]) -> tuple[Size, Size]:
        """The longer of compute and memory time: as the first where that is compute, else as the second."""
        del empty
        compute, memory = full
        bound = compute > memory
        return np.where(bound, compute, 0.0), np.where(bound, 0.0, memory)


@attrs.frozen(eq=False)
class _Series:
    """Forwards whose costs are affine in the cached positions.

    Attributes
    ----------
    forwards
        How many.
    first, last
        Cached positions in the first and in the last of them.
    """

    forwards: Column
    first: Column
    last: Column

    def total(self, empty: Size, full: Size) -> Size:
        """Sum over all forwards of what is `empty` without cached positions and `full` in the last forward."""
        # What a cached position adds is a whole number of bytes or FLOPs: divided by first, sums stay exact.
        added = (full - empty) / self.last
        return self.forwards * empty + added * (self.forwards * (self.first + self.last) / 2)

    def longest(self, empty: tuple[Size, Size], full: tuple[Size, Size]) -> tuple[Size, Size]:
        """Sums over all forwards of the longer of compute and memory time, by which of them it is.

        Over the forwards both are straight lines, which cross at most once.
        """
        start = self.first / self.last
        compute, memory = ((low + (high - low) * start, high) for low, high in zip(empty, full, strict=True))
        first, last = compute[0] - memory[0], compute[1] - memory[1]
        begins, crosses = first > 0, (first > 0) != (last > 0)
        early: Size = self.forwards
        if np.any(crosses):  # forwards up to the crossing are bound as the first one is
            crossing = first / np.where(crosses, first - last, 1) * (self.forwards - 1)
            early = np.where(crosses, np.minimum(np.floor(crossing) + 1, self.forwards), self.forwards)
        in_compute = np.where(begins, self._sum(compute, early), self._rest(compute, early))
        in_memory = np.where(begins, self._rest(memory, early), self._sum(memory, early))
        return in_compute, in_memory

    def _rest(self, line: tuple[Size, Size], count: Size) -> Size:
        """Sum over all forwards but the first `count`."""
        return 0.0 if count is self.forwards else self._sum(line, self.forwards) - self._sum(line, count)

    def _sum(self, line: tuple[Size, Size], count: Size) -> Size:
        """Sum of a line, given by its ends, over the first `count` forwards."""
        slope = (line[1] - line[0]) / np.maximum(self.forwards - 1, 1)
        return count * line[0] + slope * (count * (count - 1) / 2)


class _Totals:
    """Sums over the operators of tapes: plain numbers, or arrays over some workloads."""

    def __init__(self) -> None:
        #: By kind (cost, flops, time, compute, cache) and what it is of.
        self.sums: defaultdict[tuple[str, ...], Size] = defaultdict(float)
        self.activation_peak_bytes: Size = 0


@attrs.frozen(eq=False)
class _Run:
    """Equal calls of one operator: how many there are in a forward, and what one costs at both ends of the forwards."""

    stage: Stage
    part: str
    dtype: str
    times: Size
    forwards: _Once | _Series
    empty: Cost
    full: Cost


@attrs.frozen(eq=False)
class _Bench:
    """Evaluates pages and chunks of workloads."""

    model: Model
    hardware: Sequence[Hardware]
    policy: Policy
    routing: Plan
    root: Layer = attrs.field(init=False)

    @root.default
    def _built(self) -> Layer:
        return self.model.family.build(self.model.config)

    def page(self, page: PageLayout) -> _Totals:
        """Vision and layout of one page."""
        totals = _Totals()
        family = self.model.family
        vision, prefill = Tape(self.policy, folded=True), Tape(self.policy, folded=True)
        family.encode_page(self.root, vision, page, 1)
        family.place_page(self.root, prefill, page, 1)
        self._add_up(totals, "vision", vision, vision, _Once())
        self._add_up(totals, "prefill", prefill, prefill, _Once())
        return totals

    def sequences(self, points: Points, where: slice) -> _Totals:
        """Prefill and decode of some workloads, without their pages."""
        totals = _Totals()
        columns = (points.batch, points.seq_len, points.image_tokens, points.new_tokens)
        batch, prompt, image_tokens, new_tokens = (column[where].astype(np.float64) for column in columns)
        prefill = self._prefill(batch, prompt, image_tokens)
        self._add_up(totals, "prefill", prefill, prefill, _Once())
        last = prompt + new_tokens - 1
        empty, full = (self._decode(batch, cached) for cached in (np.zeros_like(last), last))
        self._add_up(totals, "decode", empty, full, _Series(new_tokens - 1, prompt + 1, last))
        return totals

    def _prefill(self, batch: Column, prompt: Column, image_tokens: Column) -> Tape:
        tape = Tape(self.policy, folded=True)
        shape = SequenceShape(batch, prompt, prompt, causal=True, loads=self._loads(batch * prompt))
        self.model.family.prefill(self.root, tape, shape, image_tokens)
        return tape

    def _decode(self, batch: Column, cached: Column) -> Tape:
        tape = Tape(self.policy, folded=True)
        shape = SequenceShape(batch, 1, cached, causal=False, loads=self._loads(batch))
        self.model.family.decode(self.root, tape, shape, 1)
        return tape

    def _loads(self, tokens: Column) -> dict[int, PlannedLoad]:
        sizes = self.model.config.experts
        return dict.fromkeys(sizes.layers, PlannedLoad(self.routing, tokens, sizes))

    def _add_up(self, totals: _Totals, stage: Stage, empty: Tape, full: Tape, forwards: _Once | _Series) -> None:
        for key, operator in full.operators.items():
            part = self.model.family.part(key[0])
            for (times, steps), (_, bare) in zip(operator.runs, empty.operators[key].runs, strict=True):
                run = _Run(stage, part, operator.compute_dtype, times, forwards, bare.cost, steps.cost)
                self._add_cost(totals, run)
                self._add_times(totals, run)

    @staticmethod
    def _add_cost(totals: _Totals, run: _Run) -> None:
        stage, part, times, forwards = run.stage, run.part, run.times, run.forwards
        before, after = run.empty.columns(), run.full.columns()
        for column in COST_COLUMNS:
            added = times * forwards.total(before[column], after[column])
            totals.sums["cost", stage, column] += added
            if column == "tensor_flops":
                totals.sums["flops", stage, part] += added
        if isinstance(forwards, _Series):
            cached = sum(after[name] - before[name] for name in ("bytes_read", "bytes_written"))
            totals.sums["cache",] += times * forwards.total(0, cached)
        peak = np.where(np.asarray(times) > 0, after["activation_bytes"], 0)
        totals.activation_peak_bytes = np.maximum(totals.activation_peak_bytes, peak)

    def _add_times(self, totals: _Totals, run: _Run) -> None:
        for device in self.hardware:
            ends = (_seconds(cost, device, run.dtype) for cost in (run.empty, run.full))
            compute, memory = run.forwards.longest(*ends)
            in_compute = run.times * compute * _NS_PER_S
            totals.sums["time", device.name, run.stage, run.part] += in_compute + run.times * memory * _NS_PER_S
            totals.sums["compute", device.name, run.stage] += in_compute


def _seconds(cost: Cost, hardware: Hardware, dtype: str) -> tuple[Size, Size]:
    """Time of arithmetic, and of memory traffic."""
    compute = cost.tensor_flops / hardware.tensor_peak(dtype) + cost.vector_flops / hardware.vector_peak(dtype)
    return compute, cost.bytes_total / hardware.memory_bytes_per_s.value


class _Columns:
    """Sums of all workloads, filled in part by part."""

    def __init__(self, length: int) -> None:
        self._sums: defaultdict[tuple[str, ...], Column] = defaultdict(lambda: np.zeros(length))
        self._peak = np.zeros(length)

    def add(self, where: slice | Counts, totals: _Totals, factor: Size) -> None:
        """Add sums to those of some workloads, `factor` times."""
        for key, values in totals.sums.items():
            self._sums[key][where] += values * factor
        self._peak[where] = np.maximum(self._peak[where], totals.activation_peak_bytes)

    def evaluated(self, weight_bytes: int) -> Evaluated:
        """Everything by name."""

        def named(kind: str) -> dict[Any, Column]:
            return {key[1:]: column for key, column in self._sums.items() if key[0] == kind}

        costs: dict[Any, dict[str, Column]] = {stage: {} for stage in STAGES}
        for (stage, column), values in named("cost").items():
            costs[stage][column] = values
        return Evaluated(
            costs=costs,
            part_flops=named("flops"),
            part_times=named("time"),
            compute_times=named("compute"),
            cache_traffic=self._sums["cache",],
            activation_peak_bytes=self._peak,
            weight_bytes=weight_bytes,
        )
