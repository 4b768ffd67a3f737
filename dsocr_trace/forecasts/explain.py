"""Why a number is what it is: every operator of one module, with its formula, its arguments and its time."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from analytic.cost import Cost, Dtype
from analytic.errors import InputError
from analytic.model import STAGES
from analytic.predict import module_rows, subtree_totals
from dsocr_trace.report.formulas import of_call, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from analytic.families.base import ModuleNode
    from analytic.hardware import Hardware
    from analytic.model import Operation, Stage
    from analytic.operators import Operator
    from analytic.predict import ModuleRow, PredictedOperation, Prediction

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
class Ceilings:
    """What an operation's time was computed with, and where the figures are from."""

    tensor_flops_per_s: float
    tensor_source: str
    vector_flops_per_s: float
    vector_source: str
    memory_bytes_per_s: float
    memory_source: str


@attrs.frozen
class OperationExplanation:
    """One operation of a module: its calls, and their time together."""

    predicted: PredictedOperation
    lines: tuple[OperatorLine, ...]
    ceilings: Ceilings


@attrs.frozen
class StageExplanation:
    """What a module runs in one stage.

    Attributes
    ----------
    row
        Sums, as in the prediction's table.
    operations
        In the order of their first run.
    """

    row: ModuleRow
    operations: tuple[OperationExplanation, ...]

    @property
    def stage(self) -> Stage:
        """Which stage."""
        return self.row.stage


@attrs.frozen
class Below:
    """A child module and its time, all modules below it included."""

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


def explain(prediction: Prediction, module_path: str, stages: Sequence[Stage] = STAGES) -> Explanation:
    """Explain what is predicted of a module.

    Parameters
    ----------
    prediction
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
    node = find_module(prediction.work.tree, module_path)
    found = []
    for row in module_rows(prediction):
        if row.module_path == node.module_path and row.stage in stages:
            mine = [
                predicted
                for predicted in prediction.operations
                if predicted.operation.module_path == node.module_path and predicted.operation.stage == row.stage
            ]
            found.append(StageExplanation(row, tuple(_operation(each, prediction.hardware) for each in mine)))
    return Explanation(node, tuple(found), tuple(_below(prediction, node, stages)))


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


def _operation(predicted: PredictedOperation, hardware: Hardware) -> OperationExplanation:
    dtype = predicted.operation.compute_dtype
    tensor, vector = hardware.tensor_flops_per_s[dtype], hardware.vector_flops_per_s[dtype]
    memory = hardware.memory_bytes_per_s
    ceilings = Ceilings(tensor.value, tensor.source, vector.value, vector.source, memory.value, memory.source)
    return OperationExplanation(predicted, tuple(operator_lines(predicted.operation)), ceilings)


def _below(prediction: Prediction, node: ModuleNode, stages: Sequence[Stage]) -> list[Below]:
    own: dict[str, int] = {}
    for row in module_rows(prediction):
        if row.stage in stages:
            own[row.module_path] = own.get(row.module_path, 0) + row.predicted_ns
    totals = subtree_totals(prediction.work.tree, own, 0)
    children = [child.module_path for child in prediction.work.tree if child.parent_path == node.module_path]
    return sorted(
        (Below(path, totals[path]) for path in children if totals[path]), key=lambda child: -child.predicted_ns
    )
