"""From a workload and a device to predicted cost and time per module."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np

from analytic.cost import COST_COLUMNS, Cost, total
from analytic.errors import DsocrTraceError
from analytic.model import STAGES, Operation, Stage, Work, operations
from analytic.roofline import Bound, device_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from analytic.families.base import ModuleNode
    from analytic.hardware import Hardware
    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.routing import Counts, Plan, Routing
    from analytic.workload import Workload

Summand = TypeVar("Summand", int, Cost, "Counts")


@attrs.frozen
class PredictedOperation:
    """One operator of one module in one stage, with its time on the device."""

    operation: Operation
    predicted_device_ns: int
    bound: Bound


@attrs.frozen
class Prediction:
    """Predicted cost and time of everything that a workload runs.

    Attributes
    ----------
    hardware
        Device that the times are for.
    work
        Module tree, calls and routing.
    operations
        All operators with their times; `work.operations` without them.
    """

    hardware: Hardware
    work: Work
    operations: tuple[PredictedOperation, ...]


@attrs.frozen(kw_only=True)
class CostRow:
    """Cost and time, in the columns of the prediction tables.

    Attributes
    ----------
    activation_peak_bytes
        Output of the largest single run of an operator.
    predicted_host_ns
        None: only the device's time is modelled.
    bound
        What most of the time is bound by; None where nothing runs.
    source
        Where the ceilings are from.
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
    predicted_device_ns: int
    predicted_host_ns: int | None = None
    predicted_ns: int
    bound: Bound | None
    source: str


@attrs.frozen(kw_only=True)
class ModuleRow(CostRow):
    """What one module runs in its own forward, in one stage."""

    module_path: str


@attrs.frozen(kw_only=True)
class CategoryRow:
    """What one module runs in operators of one category, in one stage.

    Attributes
    ----------
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
    hardware: Hardware,
    policy: Policy,
    routing: Routing | Plan = "balanced",
    new_tokens: int | None = None,
    kv_lengths: Sequence[int] | Counts | None = None,
) -> Prediction:
    """Predict cost and device time of a workload.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    hardware
        Device to predict for.
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
    predicted = []
    for operation in work.operations:
        runs = ((calls, steps.cost) for calls, steps in operation.runs)
        nanoseconds, bound = device_time(runs, hardware, operation.compute_dtype)
        predicted.append(PredictedOperation(operation, nanoseconds, bound))
    prediction = Prediction(hardware, work, tuple(predicted))
    _check_conserved(prediction)
    return prediction


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
    own: dict[tuple[Stage, str], list[PredictedOperation]] = defaultdict(list)
    for predicted in prediction.operations:
        own[predicted.operation.stage, predicted.operation.module_path].append(predicted)
    calls = prediction.work.calls
    keys = [(stage, node.module_path) for stage in STAGES for node in prediction.work.tree]
    return [
        ModuleRow(module_path=key[1], stage=key[0], calls=calls[key], **_columns(own[key], prediction.hardware))
        for key in keys
        if key in calls
    ]


def stage_rows(prediction: Prediction) -> list[CostRow]:
    """One row per stage with everything that runs in it; `calls` counts the calls of all modules."""
    rows = []
    for stage in STAGES:
        inside = [predicted for predicted in prediction.operations if predicted.operation.stage == stage]
        calls = sum(count for (where, _), count in prediction.work.calls.items() if where == stage)
        rows.append(CostRow(stage=stage, calls=calls, **_columns(inside, prediction.hardware)))
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
                predicted_ns=sum(member.predicted_device_ns for member in members),
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


def _columns(members: list[PredictedOperation], hardware: Hardware) -> dict[str, Any]:
    cost = total(member.operation.cost for member in members)
    nanoseconds = {"compute": 0, "memory": 0}
    for member in members:
        nanoseconds[member.bound] += member.predicted_device_ns
    device_ns = sum(nanoseconds.values())
    return {
        **cost.columns(),
        "predicted_device_ns": device_ns,
        "predicted_ns": device_ns,
        "bound": max(nanoseconds, key=nanoseconds.__getitem__) if _keeps_device_busy(cost) else None,
        "source": hardware.provenance,
        "activation_peak_bytes": max((member.operation.activation_peak_bytes for member in members), default=0),
    }


def _check_conserved(prediction: Prediction) -> None:
    """Check that the modules' own costs, summed up the tree, give everything that was evaluated."""
    nothing = np.zeros(len(COST_COLUMNS), dtype=np.int64)
    numbers = [np.array(list(done.operation.cost.columns().values()), dtype=np.int64) for done in prediction.operations]
    own: dict[str, Counts] = {}
    for predicted, columns in zip(prediction.operations, numbers, strict=True):
        path = predicted.operation.module_path
        own[path] = own.get(path, nothing) + columns
    root, everything = subtree_totals(prediction.work.tree, own, nothing)[""], np.sum([nothing, *numbers], axis=0)
    if not np.array_equal(root, everything):
        raise DsocrTraceError(f"the module tree sums up to {root.tolist()}, its operators to {everything.tolist()}")
