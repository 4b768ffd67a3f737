"""Where the operators run in a model: every call at one workload, by layer, and the heaviest of each."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.cost import FP32, MODEL_DTYPES
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr, operations
from analytic.operators import OPERATORS
from analytic.workload import load_workload
from dsocr_trace.forecasts.explain import OperatorLine, operator_lines
from dsocr_trace.report.formulas import parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from analytic.cost import Cost
    from analytic.families.base import ModuleNode
    from analytic.layers.base import Layer
    from analytic.model import Model, Operation, Stage, Work
    from analytic.operators import Operator

#: What the numbers of the reference are for.
WORKLOAD: Final = "dsocr-standard-v1"


@attrs.frozen
class WorkedCall:
    """The heaviest call of an operator.

    Attributes
    ----------
    operation
        In which module and stage; None for an example that no module runs.
    attention
        How the decoder attends.
    arguments
        Sizes by parameter, all of them single numbers.
    """

    operator: Operator
    operation: Operation | None
    attention: str
    arguments: dict[str, Any]

    @property
    def cost(self) -> Cost:
        """Cost of the call."""
        return self.operator(**self.arguments).cost

    @property
    def backward_cost(self) -> Cost:
        """Cost of its backward pass."""
        return self.operator.backward_cost(**self.arguments)


@attrs.frozen(eq=False, slots=False)
class Usage:
    """A model at one workload.

    Attributes
    ----------
    model
        Which model.
    works
        All that runs, by how the decoder attends; the first is the usual one.
    """

    model: Model
    works: dict[str, Work]

    @property
    def work(self) -> Work:
        """What runs with the usual attention."""
        return next(iter(self.works.values()))

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Layer of each module."""
        return dict(_walk(self.model.family.build(self.model.config), ""))

    @cached_property
    def nodes(self) -> dict[str, ModuleNode]:
        """Modules by path."""
        return {node.module_path: node for node in self.work.tree}

    @cached_property
    def own(self) -> dict[tuple[Stage, str], list[Operation]]:
        """Operations by stage and module."""
        found: dict[tuple[Stage, str], list[Operation]] = defaultdict(list)
        for operation in self.work.operations:
            found[operation.stage, operation.module_path].append(operation)
        return found

    @cached_property
    def lines(self) -> dict[str, list[tuple[str, Operation, OperatorLine]]]:
        """For each operator its calls, with the attention and the operation that they are from."""
        found: dict[str, list[tuple[str, Operation, OperatorLine]]] = defaultdict(list)
        for attention, work in self.works.items():
            for operation in work.operations:
                for line in operator_lines(operation):
                    found[line.operator.name].append((attention, operation, line))
        return found

    def worked(self, operator: Operator) -> WorkedCall:
        """The heaviest call of an operator: most FLOPs, then most bytes; a small example where no module runs it."""
        calls = self.lines.get(operator.name, [])
        calls = [call for call in calls if call[0] == calls[0][0]]
        found = [WorkedCall(operator, operation, how, _heaviest(line)) for how, operation, line in calls]
        if not found:
            return WorkedCall(operator, None, next(iter(self.works)), _example(operator))
        return max(found, key=lambda call: (call.cost.tensor_flops, call.cost.vector_flops, call.cost.bytes_total))

    def example(self, layer: str) -> ModuleNode:
        """The module of a layer that does most itself; the first one where none does anything."""
        weight: dict[str, int] = defaultdict(int)
        for operation in self.work.operations:
            cost = operation.cost
            weight[operation.module_path] += cost.tensor_flops + cost.vector_flops + cost.bytes_total
        modules = [node for node in self.work.tree if node.analytic_layer == layer]
        return max(modules, key=lambda node: weight[node.module_path])


def standard_usage() -> Usage:
    """The base variant at the standard workload, in its own dtype, with fused and with eager attention."""
    config = variant_config(DEFAULT_VARIANT)
    model, workload = deepseek_ocr(config), load_workload(WORKLOAD)
    policies = [Policy(config.torch_dtype, attention) for attention in ("sdpa", "eager")]
    return Usage(model, {policy.attention: operations(model, workload, policy=policy) for policy in policies})


def composites() -> dict[str, list[str]]:
    """For each operator the operators that run it as one of their parts."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, operator in OPERATORS.items():
        for part in dict.fromkeys(call.operator.name for call in parts(operator)):
            found[part].append(name)
    return found


def _walk(layer: Layer, path: str) -> Iterator[tuple[str, Layer]]:
    yield path, layer
    for name, child in layer.children():
        yield from _walk(child, f"{path}.{name}" if path else name)


def _heaviest(line: OperatorLine) -> dict[str, Any]:
    """Arguments of the heaviest of the calls."""
    cost = line.operator(**line.arguments).cost
    weight = np.atleast_1d(np.asarray(cost.tensor_flops + cost.vector_flops + cost.bytes_total))
    place = int(weight.argmax())
    return {name: int(size[place]) if isinstance(size, np.ndarray) else size for name, size in line.arguments.items()}


def _example(operator: Operator) -> dict[str, Any]:
    """Small arguments: 64 of everything that has no default."""
    found: dict[str, Any] = {}
    for name, given in operator.signature.parameters.items():
        if given.annotation == "Dtype":
            found[name] = FP32 if name == "target" else MODEL_DTYPES["bfloat16"]
        else:
            found[name] = 64 if given.default is given.empty else given.default
    return found
