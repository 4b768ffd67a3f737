"""Many workloads at once: the same formulas, evaluated on arrays with one entry per workload.

Like layers of a list are evaluated once and counted (`Tape.folded`), and experts are groups of like load. What many
workloads share is evaluated once: each page layout, and the decode forwards of each batch size. In decode every cost is
affine in the number of cached positions, so a generation of any length follows exactly from two evaluations: with an
empty cache, and with one cached position.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from analytic.cost import COST_COLUMNS, MODEL_DTYPES
from analytic.layers.base import SequenceShape, Tape
from analytic.model import STAGES, Stage, checked_policy
from analytic.routing import PlannedLoad
from analytic.sums import Ceilings, Column, Counts, Run, Sums, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from analytic.crops import PageLayout, View
    from analytic.hardware import Hardware
    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.routing import Plan

#: Entries per array, over workloads and devices: few enough that they stay in the processor's cache.
_CHUNK: Final = 16384


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
        Devices to predict for, at least one.
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
    bench = _Bench(model, policy, routing, hardware)
    batches, which = np.unique(points.batch, return_inverse=True)
    pages, steps = bench.pages(points.pages), bench.steps(batches.astype(np.float64))
    columns = Table(len(points), len(hardware))
    sizes = (points.batch, points.seq_len, points.image_tokens, points.new_tokens)
    chunk = max(_CHUNK // len(hardware), 1)
    for start in range(0, len(points), chunk):
        where = slice(start, start + chunk)
        batch, prompt, image_tokens, new_tokens = (column[where].astype(np.float64) for column in sizes)
        columns.add(where, pages.taken(points.page[where], batch))
        columns.add(where, bench.prefill(batch, prompt, image_tokens))
        for sums in steps.over(bench.ceilings, which[where], prompt, new_tokens - 1):
            columns.add(where, sums)
    names = [device.name for device in hardware]
    costs, nothing = columns.named("cost"), np.zeros(len(points))
    parameters = sum(node.parameter_count for node in model.tree)
    return Evaluated(
        costs={stage: {name: costs.get((stage, name), nothing) for name in COST_COLUMNS} for stage in STAGES},
        part_flops=columns.named("flops"),
        part_times=columns.by_device("time", names),
        compute_times=columns.by_device("compute", names),
        cache_traffic=columns.named("cache").get((), nothing),
        activation_peak_bytes=columns.peak,
        weight_bytes=parameters * MODEL_DTYPES[policy.dtype].bytes,
    )


@attrs.frozen(eq=False)
class _Line:
    """What changes by the same amount from one forward to the next."""

    start: Column
    slope: Column

    def sum(self, forwards: Column) -> Column:
        """Sum over the first forwards."""
        total: Column = forwards * self.start + self.slope * (forwards * (forwards - 1) / 2)
        return total


def _sum_of_longer(compute: _Line, memory: _Line, forwards: Column) -> tuple[Column, Column]:
    """Sums over all forwards of the longer of two times, by which of them it is.

    Straight lines cross at most once: up to there all forwards are bound as the first one is.
    """
    ahead, closing = compute.start - memory.start, memory.slope - compute.slope
    begins = ahead > 0
    crosses = begins != (ahead > closing * (forwards - 1))
    crossing = np.floor(ahead / np.where(crosses, closing, 1)) + 1
    early = np.where(crosses, np.clip(crossing, 0, forwards), forwards)
    in_compute = np.where(begins, compute.sum(early), compute.sum(forwards) - compute.sum(early))
    in_memory = np.where(begins, memory.sum(forwards) - memory.sum(early), memory.sum(early))
    return in_compute, in_memory


@attrs.frozen(eq=False)
class _Growing:
    """An operator of decode whose calls take longer with every cached position.

    Attributes
    ----------
    empty
        What it costs with an empty cache.
    added
        What each cached position adds.
    """

    empty: Run
    added: Run

    def add_to(self, sums: Sums, ceilings: Ceilings, which: Counts, prompt: Column, forwards: Column) -> None:
        """Add the times of all forwards of workloads with these batch sizes, prompts and numbers of forwards."""
        empty, added = self.empty.taken(which), self.added.taken(which)
        starts, slopes = (ceilings.times(run.cost, run.dtype) for run in (empty, added))
        compute, memory = (
            _Line(start + slope * (prompt + 1), slope) for start, slope in zip(starts, slopes, strict=True)
        )
        in_compute, in_memory = _sum_of_longer(compute, memory, forwards)
        sums.add_time(empty, empty.times * (in_compute + in_memory), empty.times * in_compute)
        result = empty.cost["activation_bytes"] + added.cost["activation_bytes"] * (prompt + forwards)
        sums.add_peak(result * (forwards > 0))


@attrs.frozen(eq=False)
class _Steps:
    """Decode forwards of each batch size.

    Attributes
    ----------
    fixed
        Costs of a forward with an empty cache, and times of the operators that do not grow.
    added
        Costs that each cached position adds.
    growing
        The operators that grow.
    """

    fixed: Table
    added: Table
    growing: Sequence[_Growing]

    def over(self, ceilings: Ceilings, which: Counts, prompt: Column, forwards: Column) -> Iterator[Sums]:
        """All forwards of workloads with these batch sizes, prompts and numbers of forwards."""
        yield self.fixed.taken(which, forwards)
        # Positions prompt + 1, ..., prompt + forwards.
        yield self.added.taken(which, forwards * (2 * prompt + forwards + 1) / 2)
        times = Sums()
        for operator in self.growing:
            operator.add_to(times, ceilings, which, prompt, forwards)
        yield times


class _Bench:
    """Evaluates page layouts, prefills and decode forwards."""

    def __init__(self, model: Model, policy: Policy, routing: Plan, hardware: Sequence[Hardware]) -> None:
        self._family, self._experts = model.family, model.config.experts
        self._root = model.family.build(model.config)
        self._policy, self._routing = policy, routing
        self._devices = len(hardware)
        self._part = functools.cache(model.family.part)
        self.ceilings = Ceilings(hardware)

    def pages(self, pages: Sequence[PageLayout]) -> Table:
        """Vision and layout of each page. What encoding costs follows from the page's views alone."""
        table = Table(len(pages), self._devices)
        encoded: dict[tuple[View, ...], list[Sums]] = {}
        for number, page in enumerate(pages):
            if page.views not in encoded:
                encoded[page.views] = self._page("vision", self._family.encode_page, page)
            for sums in (*encoded[page.views], *self._page("prefill", self._family.place_page, page)):
                table.add(slice(number, number + 1), sums)
        return table

    def _page(self, stage: Stage, note: Callable[[Any, Tape, PageLayout, int], None], page: PageLayout) -> list[Sums]:
        """One stage of one page; operators of one part and dtype are evaluated together."""
        tape = Tape(self._policy, folded=True)
        note(self._root, tape, page, 1)
        alike: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in self._runs(stage, tape):
            alike[run.part, run.dtype].append(run)
        found = [Sums() for _ in alike]
        for sums, runs in zip(found, alike.values(), strict=True):
            sums.add_forward(Run.joined(runs), self.ceilings)
            sums.add_up()
        return found

    def prefill(self, batch: Column, prompt: Column, image_tokens: Column) -> Sums:
        """Prefill of some workloads, without their pages."""
        tape, sums = Tape(self._policy, folded=True), Sums()
        shape = SequenceShape(batch, prompt, prompt, causal=True, loads=self._loads(batch * prompt))
        self._family.prefill(self._root, tape, shape, image_tokens)
        for run in self._runs("prefill", tape):
            sums.add_forward(run, self.ceilings)
        return sums

    def steps(self, batches: Column) -> _Steps:
        """Decode forwards of each batch size."""
        fixed, added, growing = Sums(), Sums(), []
        for empty, one in zip(self._step(batches, 0), self._step(batches, 1), strict=True):
            more = attrs.evolve(empty, cost={name: one.cost[name] - empty.cost[name] for name in COST_COLUMNS})
            if not any(np.any(each) for each in more.cost.values()):
                fixed.add_forward(empty, self.ceilings)
                continue
            fixed.add_cost(empty)
            added.add_cost(more)
            added.by_key["cache",] += more.times * (more.cost["bytes_read"] + more.cost["bytes_written"])
            growing.append(_Growing(empty, more))
        return _Steps(self._table(len(batches), fixed), self._table(len(batches), added), growing)

    def _step(self, batches: Column, cached: int) -> Iterator[Run]:
        tape = Tape(self._policy, folded=True)
        shape = SequenceShape(batches, 1, cached, causal=False, loads=self._loads(batches))
        self._family.decode(self._root, tape, shape, 1)
        return self._runs("decode", tape)

    def _table(self, length: int, sums: Sums) -> Table:
        table = Table(length, self._devices)
        table.add(slice(length), sums)
        return table

    def _loads(self, tokens: Column) -> dict[int, PlannedLoad]:
        return dict.fromkeys(self._experts.layers, PlannedLoad(self._routing, tokens, self._experts))

    def _runs(self, stage: Stage, tape: Tape) -> Iterator[Run]:
        for (path, _), operator in tape.operators.items():
            for times, steps in operator.runs:
                yield Run(stage, self._part(path), operator.compute_dtype, times, steps.cost.columns())
