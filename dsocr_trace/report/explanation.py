"""What ``explain`` prints: formula, arguments and result of every operator of one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from rich.text import Text

from analytic.cost import Dtype
from analytic.model import STAGES
from dsocr_trace.forecasts.explain import ROOT, explain, summarised
from dsocr_trace.report.console import result_console
from dsocr_trace.report.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from analytic.model import Stage
    from dsocr_trace.forecasts.explain import Explanation, OperationExplanation, OperatorLine, StageExplanation
    from dsocr_trace.forecasts.forecast import Forecast
    from dsocr_trace.forecasts.of_run import RunForecast

#: How many children are listed.
_CHILDREN: Final = 8


@attrs.frozen(eq=False)
class Subject:
    """What is explained.

    Attributes
    ----------
    forecast
        The prediction.
    explanation
        One module of it.
    of_run
        The run that it is the prediction of, if any.
    """

    forecast: Forecast
    explanation: Explanation
    of_run: RunForecast | None = None


def subject(
    forecast: Forecast, module_path: str, stages: Sequence[Stage] = STAGES, of_run: RunForecast | None = None
) -> Subject:
    """Explain one module of a prediction (`dsocr_trace.forecasts.explain.explain`)."""
    return Subject(forecast, explain(forecast.prediction, module_path, stages), of_run)


def explanation_json(told: Subject) -> dict[str, Any]:
    """Everything in plain numbers, for ``--json``."""
    node, policy = told.explanation.node, told.forecast.scenario.policy
    return {
        "module_path": node.module_path,
        "module_class": node.module_class,
        "analytic_layer": node.analytic_layer,
        "workload": told.forecast.scenario.workload.id,
        **attrs.asdict(policy),
        "hardware": told.forecast.hardware.name,
        "routing": told.forecast.prediction.work.routing.source,
        "run": None if told.of_run is None else str(told.of_run.run.path),
        "page": None if told.of_run is None else told.of_run.page,
        "notes": [] if told.of_run is None else list(told.of_run.notes),
        "stages": {stage.stage: _stage_json(told, stage) for stage in told.explanation.stages},
        "children": [attrs.asdict(child) for child in told.explanation.below],
    }


def _stage_json(told: Subject, stage: StageExplanation) -> dict[str, Any]:
    row = attrs.asdict(stage.row)
    found = {name: value for name, value in row.items() if name not in {"stage", "module_path"}}
    found["operations"] = [_operation_json(operation) for operation in stage.operations]
    if told.of_run is not None:
        found["measured"] = attrs.asdict(told.of_run.measured(stage.row.module_path, stage.stage))
        found["differs_from_run"] = told.of_run.differences(stage.row)
    return found


def _operation_json(explained: OperationExplanation) -> dict[str, Any]:
    operation = explained.predicted.operation
    return {
        "name": operation.name,
        "operator_category": operation.operator_category,
        "compute_dtype": operation.compute_dtype,
        "predicted_device_ns": explained.predicted.predicted_device_ns,
        "bound": explained.predicted.bound,
        "ceilings": attrs.asdict(explained.ceilings),
        "operators": [
            {
                "operator": line.operator.name,
                "arguments": {name: summarised(value) for name, value in line.arguments.items()},
                "formulas": line.formulas,
                "calls": line.calls,
                **line.cost.columns(),
            }
            for line in explained.lines
        ],
    }


def print_explanation(told: Subject) -> None:
    """Print a module stage by stage, then where its time is below it."""
    console = result_console()
    for line in _lines(told):
        console.print(Text(line), soft_wrap=True)


def _lines(told: Subject) -> Iterator[str]:
    node, forecast = told.explanation.node, told.forecast
    path, policy = node.module_path or ROOT, forecast.scenario.policy
    yield f"{path}: {node.analytic_layer}, which stands for {node.module_class}"
    routing = "" if told.of_run else f", {forecast.prediction.work.routing.source} routing"
    yield (
        f"{forecast.scenario.workload.id} on {forecast.hardware.name}: {policy.dtype}, {policy.attention} attention, "
        f"batch {forecast.scenario.workload.batch_size}{routing}"
    )
    if told.of_run:
        yield f"page {told.of_run.page} of run {told.of_run.run.path}"
        yield from (f"  {note}" for note in told.of_run.notes)
    if not told.explanation.stages:
        yield f"\n{path} is never called here{_where_else(told)}"
    for stage in told.explanation.stages:
        yield from _stage(told, stage)
    yield from _ceilings(told.explanation.stages)
    yield from _below(told.explanation)


def _where_else(told: Subject) -> str:
    calls = told.forecast.prediction.work.calls
    others = [stage for stage in STAGES if (stage, told.explanation.node.module_path) in calls]
    return f"; it is in {' and '.join(others)}" if others else ": no stage runs it, so it costs no time"


def _stage(told: Subject, stage: StageExplanation) -> Iterator[str]:
    row = stage.row
    calls = f"{row.calls:,} {'call' if row.calls == 1 else 'calls'}"
    bound = f", bound by {row.bound}" if row.bound else ""
    yield f"\n{stage.stage}: {calls}, {duration(row.predicted_ns)} of its own{bound}"
    if not stage.operations:
        yield "  It runs no operators itself: all that it costs is below it."
    for operation in stage.operations:
        yield from _operation(operation)
    if stage.operations:
        yield (
            f"  sum: tensor_flops {row.tensor_flops:,}, vector_flops {row.vector_flops:,}, bytes_read "
            f"{row.bytes_read:,}, bytes_written {row.bytes_written:,}, {row.predicted_ns:,} ns"
        )
    if told.of_run is not None:
        yield from _measured(told.of_run, stage)


def _operation(explained: OperationExplanation) -> Iterator[str]:
    operation, predicted = explained.predicted.operation, explained.predicted
    yield f"  {operation.name} ({operation.operator_category})"
    for line in explained.lines:
        yield from _operator(line)
    if not operation.cost.bytes_total and not operation.cost.tensor_flops and not operation.cost.vector_flops:
        yield "    time: none, it does no work on the device"
        return
    time = f"{duration(predicted.predicted_device_ns)}, bound by {predicted.bound}"
    yield f"    time: {time}, at the peaks for {operation.compute_dtype}"


def _operator(line: OperatorLine) -> Iterator[str]:
    arguments = ", ".join(f"{name}={_argument(value)}" for name, value in line.arguments.items())
    many = f" x {line.calls:,}" if line.calls > 1 else ""
    yield f"    {line.operator.name}({arguments}){many}"
    numbers = line.cost.columns()
    for name, formula in line.formulas.items():
        if name in numbers:
            yield f"      {name} = {formula}{'; all calls:' if many else ' ='} {numbers[name]:,}"


def _ceilings(stages: Iterable[StageExplanation]) -> Iterator[str]:
    """Each ceiling once, with its source."""
    operations = [operation for stage in stages for operation in stage.operations]
    if not operations:
        return
    yield "\ntime of a call: max(tensor_flops / tensor peak + vector_flops / vector peak, bytes / bandwidth)"
    lines = []
    for explained in operations:
        dtype, ceilings = explained.predicted.operation.compute_dtype, explained.ceilings
        tensor, vector = ceilings.tensor_flops_per_s, ceilings.vector_flops_per_s
        lines += [
            f"  tensor peak for {dtype}: {quantity(tensor, 'FLOP/s')} ({ceilings.tensor_source})",
            f"  vector peak for {dtype}: {quantity(vector, 'FLOP/s')} ({ceilings.vector_source})",
            f"  bandwidth: {quantity(ceilings.memory_bytes_per_s, 'B/s')} ({ceilings.memory_source})",
        ]
    yield from sorted(dict.fromkeys(lines), key=lambda line: line.startswith("  bandwidth"))


def _argument(value: Any) -> str:
    text = summarised(value)
    return f"{text} (b = {value.bytes})" if isinstance(value, Dtype) else text


def _measured(of_run: RunForecast, stage: StageExplanation) -> Iterator[str]:
    measured = of_run.measured(stage.row.module_path, stage.stage)
    yield (
        f"  measured: {duration(measured.scaled_ns)} of its own (profiled: {duration(measured.measured_ns)} "
        f"in {measured.event_count:,} events; scaled to all forwards)"
    )
    differing = of_run.differences(stage.row)
    if differing is None:
        yield "  The run's predictions table sums its pages, so it is not compared."
    elif differing:
        yield f"  Not as in the run's predictions table: {', '.join(differing)}; the formulas have changed since."
    else:
        yield "  The numbers equal the run's predictions table."


def _below(explanation: Explanation) -> Iterator[str]:
    if explanation.below:
        yield "\nbelow it, each with all that is in it:"
    for child in explanation.below[:_CHILDREN]:
        yield f"  {duration(child.predicted_ns):>8}  {child.module_path}"
    hidden = len(explanation.below) - _CHILDREN
    if hidden > 0:
        yield f"  and {hidden} more"
