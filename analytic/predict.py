"""From a workload and a device to predicted cost and time per module."""

from __future__ import annotations

import functools
from collections import defaultdict
from functools import cached_property
from operator import add, attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import numpy as np

from analytic.cost import COST_COLUMNS, Cost, total
from analytic.errors import DsocrTraceError
from analytic.model import STAGES, Operation, Stage, Work, operations
from analytic.roofline import device_time
from analytic.timing.workload import SAMPLING, time_workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from analytic.families.base import ModuleNode
    from analytic.hardware import Hardware
    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.operators import Steps
    from analytic.routing import Counts, Plan, Routing
    from analytic.timing.calibration import Calibration
    from analytic.timing.clocks import Cause, Spent
    from analytic.workload import Workload

Summand = TypeVar("Summand", int, Cost, "Counts")


@attrs.frozen(kw_only=True)
class Times:
    """What something takes, in ns.

    Attributes
    ----------
    predicted_ns
        By how much it moves the end of everything: what it takes on the clock.
    predicted_device_ns, predicted_host_ns
        Busy time of the device and of the host.
    datasheet_ns
        Roofline with the peaks of the device's entry.
    roof_ns
        The same with the ceilings that the time model takes, and the launch floor.
    floor_ns
        The launch floor: the shortest time that anything takes, for each launch.
    extrapolated_ns
        How much of the device's time lies beyond the calibrated sizes.
    """

    predicted_ns: int = 0
    predicted_device_ns: int = 0
    predicted_host_ns: int = 0
    datasheet_ns: int = 0
    roof_ns: int = 0
    floor_ns: int = 0
    extrapolated_ns: int = 0


TIME_COLUMNS: Final = tuple(field.name for field in attrs.fields(Times))


@attrs.frozen
class TimedPart:
    """Something that a module does, with its time and by what it waits for on the clock."""

    times: Times
    by_cause: Mapping[Cause, float] = attrs.field(repr=False)

    @property
    def bound(self) -> Cause | None:
        """What most of its time waits for; None where it takes none."""
        return _largest(self.by_cause)


def _largest(by_cause: Mapping[Cause, float]) -> Cause | None:
    return max(by_cause, key=by_cause.__getitem__, default=None)


@attrs.frozen
class PredictedOperation(TimedPart):
    """One operator of one module in one stage."""

    operation: Operation


@attrs.frozen
class Prediction:
    """Predicted cost and time of everything that a workload runs.

    Attributes
    ----------
    device
        What the times are for.
    work
        Module tree, calls and routing.
    operations
        All operators with their times; `work.operations` without them.
    module_calls
        Times of the calls themselves, by stage and module.
    sampling
        Times of the choice of a token, outside every module, by stage.
    """

    device: Calibration
    work: Work
    operations: tuple[PredictedOperation, ...]
    module_calls: Mapping[tuple[Stage, str], TimedPart]
    sampling: Mapping[Stage, TimedPart]

    @property
    def hardware(self) -> Hardware:
        """Entry of the device."""
        return self.device.hardware

    @cached_property
    def sums(self) -> dict[tuple[Stage, str], _Sum]:
        """What each module runs itself, its calls included, by stage and module."""
        found: defaultdict[tuple[Stage, str], _Sum] = defaultdict(_Sum)
        for predicted in self.operations:
            found[predicted.operation.stage, predicted.operation.module_path].add_operation(predicted)
        for key, called in self.module_calls.items():
            found[key].add(called)
        return dict(found)


@attrs.frozen(kw_only=True)
class CostRow(Times):
    """Cost and time, in the columns of the prediction tables.

    Attributes
    ----------
    activation_peak_bytes
        Output of the largest single run of an operator.
    bound
        What most of the time waits for; None where nothing runs.
    source
        ``calibrated``, or ``extrapolated`` where more than half of the device's time is; without a calibration, where
        the device's entry has its figures from.
    """

    stage: Stage
    calls: int
    tensor_flops: int
    vector_flops: int
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    activation_bytes: int
    activation_peak_bytes: int
    kv_cache_bytes: int
    bound: Cause | None
    source: str


@attrs.frozen(kw_only=True)
class ModuleRow(CostRow):
    """What one module runs in its own forward, in one stage."""

    module_path: str


@attrs.frozen(kw_only=True)
class StageRow(CostRow):
    """What all modules run in one stage, and how long it takes with what is outside of them.

    Attributes
    ----------
    predicted_wall_ns, predicted_busy_ns
        From beginning to end, the choice of tokens included, and of that the device's work.
    """

    predicted_wall_ns: int
    predicted_busy_ns: int


@attrs.frozen(kw_only=True)
class CategoryRow:
    """What one module runs in operators of one category, in one stage.

    Attributes
    ----------
    predicted_ns
        Busy time of the device.
    flops
        Tensor and vector FLOPs.
    bytes
        Bytes read and written.
    share_of_module_flops
        Share of the module's own FLOPs in this stage; None where it has none.
    """

    stage: Stage
    module_path: str
    operator_category: str
    predicted_ns: int
    flops: int
    bytes: int
    share_of_module_flops: float | None


def predict(
    model: Model,
    workload: Workload,
    *,
    device: Calibration,
    policy: Policy,
    routing: Routing | Plan = "balanced",
    new_tokens: int | None = None,
    kv_lengths: Sequence[int] | Counts | None = None,
) -> Prediction:
    """Predict cost and time of a workload.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    device
        Device to predict for: measured, or `analytic.timing.datasheet.from_datasheet`.
    policy
        How the model runs, and what is counted.
    routing
        Tokens per expert, with one row per evaluated decode forward; or how to plan them.
    new_tokens
        Replaces the workload's ``max_new_tokens``, for a generation that ended early.
    kv_lengths
        Cached positions after each decode forward to predict, prompt length + s for forward s; all if not given.

    Raises
    ------
    InputError
        If an argument is unknown to the model or the device, or does not fit the workload.
    """
    if new_tokens is not None:
        workload = attrs.evolve(workload, max_new_tokens=new_tokens)
    work = operations(model, workload, policy=policy, routing=routing, kv_lengths=kv_lengths)
    timed = time_workload(model, workload, work, device, policy=policy)
    # Equal layers share their steps, so most of these times are needed many times.
    at_the_peaks = functools.cache(functools.partial(_device_time, hardware=device.hardware))
    predicted = []
    for operation in work.operations:
        spent = timed[operation.stage].places[operation.module_path, operation.name]
        datasheet_ns = at_the_peaks(operation.runs, operation.compute_dtype)
        predicted.append(PredictedOperation(_times(spent, datasheet_ns), spent.by_cause, operation))
    calls = {(stage, path): timed[stage].places[path, ""] for stage, path in work.calls}
    sampling = {stage: done.own(SAMPLING) for stage, done in timed.items() if done.samples}
    prediction = Prediction(
        device=device,
        work=work,
        operations=tuple(predicted),
        module_calls={key: TimedPart(_times(spent), spent.by_cause) for key, spent in calls.items()},
        sampling={stage: TimedPart(_times(spent), spent.by_cause) for stage, spent in sampling.items()},
    )
    _check_conserved(prediction)
    return prediction


def _device_time(runs: tuple[tuple[int, Steps], ...], dtype: str, *, hardware: Hardware) -> int:
    return device_time(((calls, steps.cost) for calls, steps in runs), hardware, dtype)


def _times(spent: Spent, datasheet_ns: int = 0) -> Times:
    return Times(
        predicted_ns=round(spent.wall_ns),
        predicted_device_ns=round(spent.device_ns),
        predicted_host_ns=round(spent.host_ns),
        datasheet_ns=datasheet_ns,
        roof_ns=round(spent.roof_ns),
        floor_ns=round(spent.floor_ns),
        extrapolated_ns=round(spent.extrapolated_ns),
    )


def subtree_totals(tree: tuple[ModuleNode, ...], own: Mapping[str, Summand], zero: Summand) -> dict[str, Summand]:
    """For every module, its own value and those of all modules below it.

    Parameters
    ----------
    tree
        Modules, parents before their children.
    own
        Own values by module path; absent where there is none.
    zero
        Sum of nothing.
    """
    totals = {node.module_path: own.get(node.module_path, zero) for node in tree}
    for node in reversed(tree):
        if node.parent_path is not None:
            totals[node.parent_path] = totals[node.parent_path] + totals[node.module_path]
    return totals


def module_rows(prediction: Prediction) -> list[ModuleRow]:
    """One row per stage and called module, with what it runs itself, in the order of the tree."""
    calls, sums = prediction.work.calls, prediction.sums
    keys = [(stage, node.module_path) for stage in STAGES for node in prediction.work.tree]
    return [
        ModuleRow(module_path=key[1], stage=key[0], calls=calls[key], **sums[key].columns(prediction.device))
        for key in keys
        if key in calls
    ]


def stage_rows(prediction: Prediction) -> list[StageRow]:
    """One row per stage with everything that runs in it; `calls` counts the calls of all modules."""
    rows = []
    for stage in STAGES:
        whole = _Sum()
        for (where, _), own in prediction.sums.items():
            if where == stage:
                whole.include(own)
        columns = whole.columns(prediction.device)
        outside = prediction.sampling[stage].times if stage in prediction.sampling else Times()
        rows.append(
            StageRow(
                stage=stage,
                calls=sum(count for (where, _), count in prediction.work.calls.items() if where == stage),
                predicted_wall_ns=columns["predicted_ns"] + outside.predicted_ns,
                predicted_busy_ns=columns["predicted_device_ns"] + outside.predicted_device_ns,
                **columns,
            )
        )
    return rows


def category_rows(prediction: Prediction) -> list[CategoryRow]:
    """One row per stage, module and operator category that costs the device anything, in order of first run."""
    groups: dict[tuple[Stage, str, str], list[PredictedOperation]] = defaultdict(list)
    module_flops: dict[tuple[Stage, str], int] = defaultdict(int)
    for predicted in prediction.operations:
        operation = predicted.operation
        groups[operation.stage, operation.module_path, operation.operator_category].append(predicted)
        module_flops[operation.stage, operation.module_path] += _flops(operation.cost)
    rows = []
    for (stage, path, category), members in groups.items():
        cost = total(member.operation.cost for member in members)
        if not _keeps_device_busy(cost):
            continue
        whole = module_flops[stage, path]
        rows.append(
            CategoryRow(
                stage=stage,
                module_path=path,
                operator_category=category,
                predicted_ns=sum(member.times.predicted_device_ns for member in members),
                flops=_flops(cost),
                bytes=cost.bytes_total,
                share_of_module_flops=_flops(cost) / whole if whole else None,
            )
        )
    return rows


def _keeps_device_busy(cost: Cost) -> bool:
    """Whether the device has anything to do: views and loops keep only the host busy."""
    return bool(_flops(cost) or cost.bytes_total)


def _flops(cost: Cost) -> int:
    flops: int = cost.tensor_flops + cost.vector_flops
    return flops


_costs_of: Final = attrgetter(*COST_COLUMNS)
_times_of: Final = attrgetter(*TIME_COLUMNS)


@attrs.define
class _Sum:
    """Costs and times of several parts, in the order of `COST_COLUMNS` and `TIME_COLUMNS`."""

    costs: list[int] = attrs.field(factory=lambda: [0] * len(COST_COLUMNS))
    times: list[int] = attrs.field(factory=lambda: [0] * len(TIME_COLUMNS))
    by_cause: defaultdict[Cause, float] = attrs.field(factory=lambda: defaultdict(float))
    peak_bytes: int = 0

    def add(self, part: TimedPart) -> None:
        """Take in the times of a part."""
        self.times = list(map(add, self.times, _times_of(part.times)))
        for cause, nanoseconds in part.by_cause.items():
            self.by_cause[cause] += nanoseconds

    def add_operation(self, predicted: PredictedOperation) -> None:
        """Take in an operation."""
        self.add(predicted)
        self.costs = list(map(add, self.costs, _costs_of(predicted.operation.cost)))
        self.peak_bytes = max(self.peak_bytes, predicted.operation.activation_peak_bytes)

    def include(self, other: _Sum) -> None:
        """Take in another sum."""
        self.costs = list(map(add, self.costs, other.costs))
        self.times = list(map(add, self.times, other.times))
        for cause, nanoseconds in other.by_cause.items():
            self.by_cause[cause] += nanoseconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    def columns(self, device: Calibration) -> dict[str, Any]:
        """Columns of `CostRow`."""
        times = dict(zip(TIME_COLUMNS, self.times, strict=True))
        is_beyond = 2 * times["extrapolated_ns"] > times["predicted_device_ns"]
        return {
            **dict(zip(COST_COLUMNS, self.costs, strict=True)),
            **times,
            "bound": _largest(self.by_cause),
            "source": "extrapolated" if device.source == "calibrated" and is_beyond else device.source,
            "activation_peak_bytes": self.peak_bytes,
        }


def _check_conserved(prediction: Prediction) -> None:
    """Check that the modules' own costs, summed up the tree, give everything that was evaluated."""
    nothing = np.zeros(len(COST_COLUMNS), dtype=np.int64)
    own: dict[str, Counts] = {}
    for (_, path), done in prediction.sums.items():
        own[path] = own.get(path, nothing) + np.array(done.costs, dtype=np.int64)
    root = subtree_totals(prediction.work.tree, own, nothing)[""].tolist()
    costs = (_costs_of(done.operation.cost) for done in prediction.operations)
    everything = [sum(column) for column in zip(*costs, strict=True)]
    if root != everything:
        raise DsocrTraceError(f"the module tree sums up to {root}, its operators to {everything}")
