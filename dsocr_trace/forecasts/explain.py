"""Why a number is what it is: every operator of one module, with its formula, its arguments and its time."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from analytic.cost import Cost, Dtype
from analytic.errors import InputError
from analytic.model import STAGES
from analytic.operators import host_loop, to_host, view
from analytic.predict import subtree_totals
from dsocr_trace.forecasts.arithmetic import Arithmetic, CallTime
from dsocr_trace.report.formulas import of_call, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from analytic.families.base import ModuleNode
    from analytic.hardware import Hardware
    from analytic.model import Operation, Stage
    from analytic.operators import Operator
    from analytic.predict import ModuleRow, PredictedOperation
    from dsocr_trace.forecasts.forecast import Forecast

#: How the root is written, whose path is empty.
ROOT: Final = "(root)"


@attrs.frozen
class OperatorLine:
    """Calls of one operator that differ in nothing but what grows from forward to forward.

    Attributes
    ----------
    name
        What the module calls the operation.
    operator
        Operator that it runs.
    arguments
        Sizes by parameter; an array has one entry per call.
    calls
        How often it ran.
    cost
        Sum over the calls, in plain ints.
    """

    name: str
    operator: Operator
    arguments: dict[str, Any]
    calls: int
    cost: Cost

    @property
    def formulas(self) -> dict[str, str]:
        """Formula of each number that is not zero, as text, for one call."""
        return {quantity: plain(found) for quantity, found in of_call(self.operator, self.arguments).items()}


@attrs.frozen
class TimedLine:
    """An operator's calls with their time.

    Attributes
    ----------
    line
        The calls.
    times
        Time of one of them; where they grow, of the first and of the last one. Empty where only the host has work.
    """

    line: OperatorLine
    times: tuple[CallTime, ...]


@attrs.frozen
class Peaks:
    """What the datasheet's roofline of an operation was computed with, and where the figures are from."""

    tensor_flops_per_s: float
    tensor_source: str
    vector_flops_per_s: float
    vector_source: str
    memory_bytes_per_s: float
    memory_source: str


@attrs.frozen
class OperationExplanation:
    """One operation of a module: its calls, and their time together.

    Attributes
    ----------
    predicted
        Cost and times of all calls.
    lines
        Calls of the operators that it runs.
    peaks
        What its `datasheet_ns` was computed with.
    launches
        How many launches the model counts: what was measured as one is one.
    sources
        Where the times of its calls are from: ``calibrated``, ``extrapolated``, ``roof`` without samples; without a
        calibration, where the device's entry has its figures from.
    """

    predicted: PredictedOperation
    lines: tuple[TimedLine, ...]
    peaks: Peaks
    launches: int
    sources: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """Time on the device over the roof; None where the device has nothing to do."""
        times = self.predicted.times
        return times.predicted_device_ns / times.roof_ns if times.roof_ns else None


@attrs.frozen
class HostPart:
    """What a module keeps the host busy with.

    Attributes
    ----------
    what
        In words.
    count
        How often.
    each_ns
        Time of one; None where they differ.
    total_ns
        Time of all.
    """

    what: str
    count: int
    each_ns: float | None
    total_ns: int


@attrs.frozen
class StageExplanation:
    """What a module runs in one stage.

    Attributes
    ----------
    row
        Sums, as in the prediction's table.
    operations
        In the order of their first run.
    host
        Parts of the row's ``predicted_host_ns``, which add up to it.
    """

    row: ModuleRow
    operations: tuple[OperationExplanation, ...]
    host: tuple[HostPart, ...]

    @property
    def stage(self) -> Stage:
        """Which stage."""
        return self.row.stage


@attrs.frozen
class Below:
    """A child module and its wall time, all modules below it included."""

    module_path: str
    predicted_ns: int


@attrs.frozen
class Explanation:
    """Everything that is predicted of one module.

    Attributes
    ----------
    node
        The module.
    stages
        Stages that call it.
    below
        Its children that take time, the longest first.
    """

    node: ModuleNode
    stages: tuple[StageExplanation, ...]
    below: tuple[Below, ...]


def explain(forecast: Forecast, module_path: str, stages: Sequence[Stage] = STAGES) -> Explanation:
    """Explain what is predicted of a module.

    Parameters
    ----------
    forecast
        Of which workload, on which device.
    module_path
        Dotted name; empty or ``(root)`` for the root.
    stages
        Stages to explain.

    Raises
    ------
    InputError
        If the model has no such module.
    """
    node = find_module(forecast.prediction.work.tree, module_path)
    rows = [row for row in forecast.module_rows if row.module_path == node.module_path and row.stage in stages]
    arithmetic = Arithmetic(forecast.device)
    found = tuple(_stage(forecast, row, arithmetic) for row in rows)
    return Explanation(node, found, tuple(_below(forecast, node, stages)))


def find_module(tree: Sequence[ModuleNode], module_path: str) -> ModuleNode:
    """The module of that name.

    Raises
    ------
    InputError
        If there is none; names the nearest.
    """
    path = "" if module_path == ROOT else module_path
    by_path = {node.module_path: node for node in tree}
    if path not in by_path:
        nearest = difflib.get_close_matches(path, by_path, n=3, cutoff=0.0)
        raise InputError(
            f"no module {module_path!r}; the nearest names are {', '.join(each or ROOT for each in nearest)}"
        )
    return by_path[path]


def operator_lines(operation: Operation) -> Iterator[OperatorLine]:
    """Calls of the operators that an operation runs, those of equal sizes together."""
    lines: dict[tuple[Any, ...], OperatorLine] = {}
    for runs, steps in operation.runs:
        for call in steps.calls:
            cost = (call.operator(*call.args, **call.kwargs).cost * call.times).over(runs)
            line = OperatorLine(operation.name, call.operator, call.arguments, runs * call.times, cost)
            key = (call.operator, *map(_hashable, call.arguments.values()))
            if key in lines:
                known = lines[key]
                line = attrs.evolve(known, calls=known.calls + line.calls, cost=known.cost + line.cost)
            lines[key] = line
    yield from lines.values()


def _hashable(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


def summarised(value: Any) -> str:
    """One argument as text: an array as ``first..last``, a dtype by its name."""
    if isinstance(value, Dtype):
        return value.name
    if isinstance(value, np.ndarray):
        return str(value[0]) if (value == value[0]).all() else f"{value[0]}..{value[-1]}"
    return str(value)


def _stage(forecast: Forecast, row: ModuleRow, arithmetic: Arithmetic) -> StageExplanation:
    mine = [
        predicted
        for predicted in forecast.prediction.operations
        if (predicted.operation.stage, predicted.operation.module_path) == (row.stage, row.module_path)
    ]
    operations = tuple(_operation(predicted, forecast, arithmetic) for predicted in mine)
    return StageExplanation(row, operations, tuple(_host(forecast, row, operations)))


def _operation(predicted: PredictedOperation, forecast: Forecast, arithmetic: Arithmetic) -> OperationExplanation:
    operation = predicted.operation
    lines = tuple(
        TimedLine(line, arithmetic.times(line.operator, line.arguments, operation.stage))
        for line in operator_lines(operation)
    )
    steps = (step for timed in lines for time in timed.times for step in time.steps)
    device = forecast.device
    return OperationExplanation(
        predicted=predicted,
        lines=lines,
        peaks=_peaks(device.hardware, operation.compute_dtype),
        launches=round(predicted.times.floor_ns / device.host.kernel_floor_ns),
        sources=tuple(dict.fromkeys(step.source if device.source == "calibrated" else device.source for step in steps)),
    )


def _peaks(hardware: Hardware, dtype: str) -> Peaks:
    tensor, vector = hardware.tensor_flops_per_s[dtype], hardware.vector_flops_per_s[dtype]
    memory = hardware.memory_bytes_per_s
    return Peaks(tensor.value, tensor.source, vector.value, vector.source, memory.value, memory.source)


def _host(forecast: Forecast, row: ModuleRow, operations: Sequence[OperationExplanation]) -> Iterator[HostPart]:
    """Calls of the module itself, then its operators by what they ask of the host."""
    host = forecast.device.host
    called = forecast.prediction.module_calls[row.stage, row.module_path].times.predicted_host_ns
    yield HostPart("calls of the module", row.calls, host.module_call_ns, called)
    launches = ("launches", None)
    kinds = {
        view: ("views", host.dispatch_ns),
        host_loop: ("turns of loops", host.loop_turn_ns),
        to_host: ("read-backs", host.synchronise_ns),
    }
    counts: Counter[tuple[str, float | None]] = Counter()
    totals: Counter[tuple[str, float | None]] = Counter()
    for explained in operations:
        # What launches anything is a launch, with the views around it.
        operators = {timed.line.operator for timed in explained.lines}
        kind = kinds.get(operators.pop(), launches) if len(operators) == 1 else launches
        turns = (timed.line.calls * timed.line.arguments.get("turns", 1) for timed in explained.lines)
        counts[kind] += explained.launches if kind == launches else sum(turns)
        totals[kind] += explained.predicted.times.predicted_host_ns
    for (what, each_ns), total_ns in totals.items():
        yield HostPart(what, counts[what, each_ns], each_ns, total_ns)


def _below(forecast: Forecast, node: ModuleNode, stages: Sequence[Stage]) -> list[Below]:
    own: dict[str, int] = {}
    for row in forecast.module_rows:
        if row.stage in stages:
            own[row.module_path] = own.get(row.module_path, 0) + row.predicted_ns
    tree = forecast.prediction.work.tree
    totals = subtree_totals(tree, own, 0)
    children = [child.module_path for child in tree if child.parent_path == node.module_path]
    return sorted(
        (Below(path, totals[path]) for path in children if totals[path]), key=lambda child: -child.predicted_ns
    )
