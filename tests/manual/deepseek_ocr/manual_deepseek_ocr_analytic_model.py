"""Walk the analytic model: every module's operators with sizes and costs, the sums, and torch's own FLOP counter.

The tiny model by default, the full-size one with --full; only the comparison with the counter needs torch, and it runs
on the meta device, which computes shapes and no values.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from artifacts import STANDARD, TINY, command, folder, parser, show

import dsocr_trace
from analytic.cost import COST_COLUMNS, Dtype
from dsocr_trace.exports.analytic_report import walk
from dsocr_trace.exports.builder import forecast_report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from analytic.model import Operation
    from dsocr_trace.exports.analytic_report import AnalyticModelReport, OperatorReport
    from dsocr_trace.forecasts.forecast import Forecast

LOOK_AT = """
  layers.md, one section per module, equal neighbours in one
    - Hierarchy: vision encoders, projector, decoder layers and head, as in the published code.
    - Each operator's sizes are those of the layer: widths, heads, tokens, window sizes.
    - FLOPs follow from the sizes: a linear layer has 2 x rows x in x out.
    - Categories: nothing is in the wrong one, and nothing that matters is missing.
  verification.json
    - holds is true: every module's matrix FLOPs are those that torch counts.
    - Modules without reference have no matrix FLOPs; their formulas are in layers.md.
  The sums above
    - The root's totals equal the sums over all operators, stage by stage.
"""


def main() -> int:
    """Describe, check the sums, verify."""
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="full-size model and standard workload")
    options.add_argument("--targets", nargs="*", default=["core", "end2end-vision"], help="what to verify")
    given = options.parse_args()
    where = folder(given)
    forecast = dsocr_trace.predict(STANDARD if given.full else TINY, given.hardware)
    report = forecast_report(forecast)
    dsocr_trace.save_report(report, where / "report.json", force=True)
    (where / "layers.md").write_text("\n".join(_layers(report, forecast)) + "\n", encoding="utf-8")
    good = _sums_hold(report, forecast)
    good = _verified(where / "verification.json", report.model.variant, given.targets) and good
    show(where, LOOK_AT)
    return 0 if good else 1


def _layers(report: AnalyticModelReport, forecast: Forecast) -> Iterator[str]:
    """Every module with its operators, as Markdown."""
    sizes = {
        (operation.stage, operation.module_path, operation.name): _sizes(operation)
        for operation in forecast.prediction.work.operations
    }
    yield f"# {report.model.variant}, {report.workload.id}, {report.hardware.name}"
    for module in walk(report.root):
        times = "once" if module.instances == 1 else f"{module.instances} times, {module.repetition.kind} in its list"
        yield f"\n## `{module.module_id or '(root)'}`\n"
        yield f"{module.module_class}, modelled by {module.analytic_layer}; {times}"
        yield f"\n{module.parameter_count:,} parameters"
        for entry in module.stages:
            yield f"\n{entry.stage}: {entry.calls:,} calls, {entry.total.predicted_ns:,} ns with the modules below\n"
            for operator in entry.operators:
                key = (entry.stage, _first_path(module.module_id), operator.name)
                yield from _operator(operator, sizes.get(key, "not in the first instance"))


def _operator(operator: OperatorReport, sizes: str) -> Iterator[str]:
    cost = operator.cost
    flops = f"{cost.tensor_flops:,} tensor FLOP, {cost.vector_flops:,} vector FLOP"
    traffic = f"{cost.bytes_read:,} B read, {cost.bytes_written:,} B written"
    yield f"- {operator.name} ({operator.operator_category}, {operator.compute_dtype}), {operator.calls:,} calls"
    yield f"    - first: `{sizes}`"
    yield f"    - all: {flops}, {traffic}, {cost.predicted_ns:,} ns, bound by {cost.bound or 'nothing'}"


def _sizes(operation: Operation) -> str:
    """What the first run of an operator was called with."""
    _, steps = operation.runs[0]
    return "; ".join(f"{call.operator.name}({_arguments(call.arguments)})" for call in steps.calls)


def _first_path(module_id: str) -> str:
    """Path of the first of the modules that are folded: ``layers.[1-11]`` is ``layers.1`` and so on."""
    return ".".join(name.strip("[]").partition("-")[0] for name in module_id.split("."))


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_size(value)}" for name, value in arguments.items())


def _size(value: Any) -> str:
    if isinstance(value, Dtype):
        return value.name
    if isinstance(value, np.ndarray) and value.size > 1 and value.min() != value.max():
        return f"{value.min()}...{value.max()}"
    return str(value.flat[0] if isinstance(value, np.ndarray) else value)


def _sums_hold(report: AnalyticModelReport, forecast: Forecast) -> bool:
    """Whether the root's totals are the sums over all operators."""
    good = True
    print(f"\n  {'stage':<9}{'quantity':<18}{'root':>24}{'sum over operators':>24}")
    for entry in report.root.stages:
        for column in COST_COLUMNS:
            operations = forecast.prediction.work.operations
            parts = sum(getattr(each.cost, column) for each in operations if each.stage == entry.stage)
            root = getattr(entry.total, column)
            print(f"  {entry.stage:<9}{column:<18}{root:>24,}{parts:>24,}{'' if root == parts else '  DIFFERENT'}")
            good = good and root == parts
    return good


def _verified(path: Path, variant: str, targets: list[str]) -> bool:
    """Whether the formulas agree with torch's counter; what was compared goes into a file."""
    print()
    path.write_text(command("verify", *targets, "--variant", variant, "--json"), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    for target, counts in found["targets"].items():
        print(f"  {target}: {counts['equal']} figures equal, {counts['different']} different")
    return bool(found["holds"])


if __name__ == "__main__":
    sys.exit(main())
