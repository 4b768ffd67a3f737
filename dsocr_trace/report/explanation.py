"""What ``explain`` prints: formula, arguments and result of every operator of one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from rich.text import Text

from analytic.cost import Dtype
from analytic.model import STAGES
from analytic.operators import OPERATORS
from dsocr_trace.forecasts.basis import basis
from dsocr_trace.forecasts.explain import ROOT, explain, summarised
from dsocr_trace.report.console import result_console
from dsocr_trace.report.formulas import given_arguments
from dsocr_trace.report.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from analytic.model import Stage
    from dsocr_trace.forecasts.arithmetic import CallTime, TimeStep
    from dsocr_trace.forecasts.explain import (
        Explanation,
        HostPart,
        OperationExplanation,
        StageExplanation,
        TimedLine,
    )
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
    return Subject(forecast, explain(forecast, module_path, stages), of_run)


def explanation_json(told: Subject) -> dict[str, Any]:
    """Everything in plain numbers, for ``--json``."""
    node, policy = told.explanation.node, told.forecast.scenario.policy
    return {
        "module_path": node.module_path,
        "module_class": node.module_class,
        "analytic_layer": node.analytic_layer,
        "workload": told.forecast.scenario.workload.id,
        **attrs.asdict(policy),
        "hardware": told.forecast.device.hardware.name,
        "device": told.forecast.device.device,
        "source": told.forecast.device.source,
        "routing": told.forecast.prediction.work.routing.source,
        "run": None if told.of_run is None else str(told.of_run.run.path),
        "page": None if told.of_run is None else told.of_run.page,
        "notes": list(_notes(told)),
        "stages": {stage.stage: _stage_json(told, stage) for stage in told.explanation.stages},
        "children": [attrs.asdict(child) for child in told.explanation.below],
    }


def _notes(told: Subject) -> Iterator[str]:
    """What the times rest on, and of a run, where what else it needs is from."""
    yield from basis(told.forecast.prediction)
    if told.of_run is not None:
        yield from told.of_run.notes


def _stage_json(told: Subject, stage: StageExplanation) -> dict[str, Any]:
    row = attrs.asdict(stage.row)
    found = {name: value for name, value in row.items() if name not in {"stage", "module_path"}}
    found["operations"] = [_operation_json(operation) for operation in stage.operations]
    found["host"] = [attrs.asdict(part) for part in stage.host]
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
        "bound": explained.predicted.bound,
        "sources": list(explained.sources),
        "launches": explained.launches,
        **attrs.asdict(explained.predicted.times),
        "ratio": explained.ratio,
        "ceilings": attrs.asdict(explained.peaks),
        "operators": [_line_json(timed) for timed in explained.lines],
    }


def _line_json(timed: TimedLine) -> dict[str, Any]:
    line = timed.line
    return {
        "operator": line.operator.name,
        "arguments": {name: summarised(value) for name, value in line.arguments.items()},
        "formulas": line.formulas,
        "calls": line.calls,
        **line.cost.columns(),
        "times": [
            {
                "arguments": {name: summarised(value) for name, value in call.arguments.items()},
                "device_ns": call.device_ns,
                "steps": [attrs.asdict(step) for step in call.steps],
            }
            for call in timed.times
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
        f"{forecast.scenario.workload.id} on {forecast.device.device}: {policy.dtype}, {policy.attention} attention, "
        f"batch {forecast.scenario.workload.batch_size}{routing}"
    )
    if told.of_run:
        yield f"page {told.of_run.page} of run {told.of_run.run.path}"
    yield from (f"  {note}" for note in _notes(told))
    if not told.explanation.stages:
        yield f"\n{path} is never called here{_where_else(told)}"
    for stage in told.explanation.stages:
        yield from _stage(told, stage)
    yield from _ceilings(told)
    yield from _below(told.explanation)


def _where_else(told: Subject) -> str:
    calls = told.forecast.prediction.work.calls
    others = [stage for stage in STAGES if (stage, told.explanation.node.module_path) in calls]
    return f"; it is in {' and '.join(others)}" if others else ": no stage runs it, so it costs no time"


def _stage(told: Subject, stage: StageExplanation) -> Iterator[str]:
    row = stage.row
    calls = f"{row.calls:,} {'call' if row.calls == 1 else 'calls'}"
    bound = f", bound by {row.bound}" if row.bound else ""
    yield f"\n{stage.stage}: {calls}, {duration(row.predicted_ns)} of its own on the clock{bound}"
    if not stage.operations:
        yield "  It runs no operators itself: all that it costs but its call is below it."
    for operation in stage.operations:
        yield from _operation(operation)
    parts = "; ".join(_host_part(part) for part in stage.host if part.total_ns)
    yield f"  host: {parts}; together {duration(row.predicted_host_ns)}"
    if stage.operations:
        yield (
            f"  sum: tensor_flops {row.tensor_flops:,}, vector_flops {row.vector_flops:,}, bytes_read "
            f"{row.bytes_read:,}, bytes_written {row.bytes_written:,}; device {row.predicted_device_ns:,} ns, host "
            f"{row.predicted_host_ns:,} ns, on the clock {row.predicted_ns:,} ns"
        )
    if told.of_run is not None:
        yield from _measured(told.of_run, stage)


def _host_part(part: HostPart) -> str:
    each = "" if part.each_ns is None else f" x {duration(part.each_ns)}"
    return f"{part.what} {part.count:,}{each} = {duration(part.total_ns)}"


def _operation(explained: OperationExplanation) -> Iterator[str]:
    operation, times = explained.predicted.operation, explained.predicted.times
    yield f"  {operation.name} ({operation.operator_category})"
    for timed in explained.lines:
        yield from _operator(timed)
    if explained.ratio is None:
        yield f"    time: none on the device, {duration(times.predicted_host_ns)} on the host"
        return
    launches = f"{explained.launches:,} {'launch' if explained.launches == 1 else 'launches'}"
    yield (
        f"    time: {duration(times.predicted_device_ns)} on the device in {launches}, bound by "
        f"{explained.predicted.bound}, {' and '.join(explained.sources)}: {explained.ratio:.3g} x roof "
        f"{duration(times.roof_ns)}; datasheet's roofline {duration(times.datasheet_ns)}"
    )


def _operator(timed: TimedLine) -> Iterator[str]:
    line = timed.line
    arguments = ", ".join(f"{name}={_argument(value)}" for name, value in line.arguments.items())
    many = f" x {line.calls:,}" if line.calls > 1 else ""
    yield f"    {line.operator.name}({arguments}){many}"
    numbers = line.cost.columns()
    for name, formula in line.formulas.items():
        if name in numbers:
            yield f"      {name} = {formula}{'; all calls:' if many else ' ='} {numbers[name]:,}"
    for call in timed.times:
        yield from _call(timed, call)


def _call(timed: TimedLine, call: CallTime) -> Iterator[str]:
    """Time of one call; of one of several, with the sizes that differ."""
    if len(timed.times) > 1:
        growing = (name for name, value in timed.times[0].arguments.items() if value != timed.times[1].arguments[name])
        yield f"      with {', '.join(f'{name}={call.arguments[name]}' for name in growing)}:"
    for step in call.steps:
        if len(call.steps) > 1:
            given = given_arguments(OPERATORS[step.operator], step.arguments)
            arguments = ", ".join(f"{name}={value}" for name, value in given.items())
            yield f"      {step.operator}({arguments}){f' x {step.times}' if step.times > 1 else ''}"
        yield f"        {_terms(step)}"
    if len(call.steps) > 1:
        yield f"      together {duration(call.device_ns)}"


def _terms(step: TimeStep) -> str:
    """``(floor + max(compute, memory)) x ratio + new memory``, with the sizes and ceilings that they are from."""
    terms = []
    if step.peak_flops_per_s is not None:
        rate = quantity(step.peak_flops_per_s, "FLOP/s")
        terms.append(f"{step.tensor_flops:,} FLOP / {rate} = {duration(step.compute_ns)}")
    moved = [
        f"{size:,} B{of} / {quantity(rate, 'B/s')}"
        for size, of, rate in (
            (step.weight_bytes, " of weights", step.weight_bytes_per_s),
            (step.rest_bytes, "", step.rest_bytes_per_s),
        )
        if size
    ]
    if moved:
        terms.append(f"{' + '.join(moved)} = {duration(step.weights_ns + step.rest_ns)}")
    longest = f"max({', '.join(terms)})" if len(terms) > 1 else "".join(terms)
    roof = f"floor {duration(step.floor_ns)} + {longest}"
    scaled = roof if step.source == "roof" else f"({roof}) x {step.ratio:.3g}, {step.source},"
    new = f" + new memory {duration(step.new_memory_ns)}" if step.new_memory_ns else ""
    return f"{scaled}{new} = {duration(step.device_ns)}"


def _ceilings(told: Subject) -> Iterator[str]:
    """The formulas of both roofs, and each figure in them once, with its source."""
    operations = [operation for stage in told.explanation.stages for operation in stage.operations]
    if not operations:
        return
    yield "\ntime of an operator: (floor + max(tensor_flops / product, bytes / copy)) x ratio + new memory"
    device, host = told.forecast.device, told.forecast.device.host
    for dtype in dict.fromkeys(explained.predicted.operation.compute_dtype for explained in operations):
        yield f"  fastest product in {dtype}: {quantity(device.tensor_flops_per_s[dtype], 'FLOP/s')}"
    copies = sorted(device.memory_bytes_per_s.items())
    rates = ", ".join(f"{quantity(size, 'B')} at {quantity(rate, 'B/s')}" for size, rate in copies)
    yield f"  copies, by what they move: {rates}" if len(copies) > 1 else f"  copies: {quantity(copies[0][1], 'B/s')}"
    yield f"  floor: {duration(host.kernel_floor_ns)} for each launch; weights move as in the largest copy"
    if host.fresh_byte_ns:
        large = quantity(host.fresh_from_bytes, "B")
        yield f"  new memory: {host.fresh_byte_ns:.3g} ns per byte of a result of {large} and more"
    yield "datasheet's roofline: max(tensor_flops / tensor peak + vector_flops / vector peak, bytes / bandwidth)"
    lines = []
    for explained in operations:
        dtype, peaks = explained.predicted.operation.compute_dtype, explained.peaks
        tensor, vector = peaks.tensor_flops_per_s, peaks.vector_flops_per_s
        lines += [
            f"  tensor peak for {dtype}: {quantity(tensor, 'FLOP/s')} ({peaks.tensor_source})",
            f"  vector peak for {dtype}: {quantity(vector, 'FLOP/s')} ({peaks.vector_source})",
            f"  bandwidth: {quantity(peaks.memory_bytes_per_s, 'B/s')} ({peaks.memory_source})",
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
