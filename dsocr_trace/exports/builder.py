"""The analytic report of a prediction, and that of a run."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import attrs

from analytic.cost import COST_COLUMNS, MODEL_DTYPES
from analytic.errors import InputError
from analytic.families.registry import families
from analytic.layers.base import Policy
from analytic.predict import TIME_COLUMNS, Times, category_rows
from analytic.workload import Workload
from dsocr_trace.exports.analytic_report import (
    SCHEMA_VERSION,
    AnalyticModelReport,
    Bound,
    CategoryReport,
    CostReport,
    MeasuredReport,
    ModuleReport,
    OperatorReport,
    ReportSummary,
    SamplingReport,
    StageReport,
    TopModule,
    UnclassifiedReport,
    walk,
)
from dsocr_trace.exports.folding import Key, ModuleRecord, SelfValues, fold, summed
from dsocr_trace.exports.subject import (
    HardwareReport,
    ModelReport,
    PageReport,
    PeakReport,
    ViewReport,
    WorkloadReport,
)
from dsocr_trace.forecasts.basis import basis
from dsocr_trace.forecasts.forecast import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from analytic.predict import TimedPart
    from dsocr_trace.forecasts.forecast import Forecast
    from dsocr_trace.runs.store import Run

_TOP: Final = 10
_MEASURED: Final = tuple(field.name for field in attrs.fields(MeasuredReport))
_CATEGORY: Final = tuple(field.name for field in attrs.fields(CategoryReport))
_COSTLESS: Final = dict.fromkeys((*COST_COLUMNS, "activation_peak_bytes"), 0)


def forecast_report(forecast: Forecast) -> AnalyticModelReport:
    """Report of a prediction; nothing in it is measured."""
    scenario, work = forecast.scenario, forecast.prediction.work
    policy, workload = scenario.policy, scenario.workload
    modules = [ModuleRecord(**{name: getattr(node, name) for name in _names(ModuleRecord)}) for node in work.tree]
    root = fold(modules, _predicted_values(forecast))
    return _assembled(
        run_id=None,
        model=ModelReport(
            family=_family(root.module_class),
            architecture=root.module_class,
            variant=workload.variant if forecast.source == BUILTIN else forecast.source,
            **attrs.asdict(policy),
            parameter_count=root.parameter_count,
            weight_bytes=root.parameter_count * MODEL_DTYPES[policy.dtype].bytes,
        ),
        workload=_workload(workload, [(workload.id, workload)]),
        hardware=_hardware(forecast),
        routing_source=work.routing.source,
        root=root,
        sampling=tuple(
            SamplingReport(
                stage=stage,
                predicted_ns=part.times.predicted_ns,
                predicted_device_ns=part.times.predicted_device_ns,
            )
            for stage, part in forecast.prediction.sampling.items()
        ),
        unclassified=(),
        measured_wall_ns=None,
        notes=(*basis(forecast.prediction), *_forecast_notes(root, work.routing.source)),
    )


def run_report(run: Run) -> AnalyticModelReport:
    """Report of a run: what its tables hold, predicted with the measured routing, beside what was measured.

    Raises
    ------
    InputError
        If the run is of another schema version, or predicted nothing.
    """
    from dsocr_trace.runs.many import other_version  # noqa: PLC0415  the report of a prediction does without pandas

    problem = other_version(run)
    if problem:
        raise InputError(problem)
    manifest, rows = run.manifest, _tables(run)
    if not rows["predictions"]:
        raise InputError(
            f"{run.path} holds no predictions, its modules are not those that the formulas know; give another run"
        )
    modules = [ModuleRecord(**{name: row[name] for name in _names(ModuleRecord)}) for row in rows["modules"]]
    root = fold(modules, _run_values(rows))
    workload = Workload(**manifest["workload"])
    totals = [row for row in rows["pages"] if row["page_number"] is None]
    pages = [(page["name"], _page_workload(workload, page)) for page in manifest["pages"]]
    return _assembled(
        run_id=run.path.resolve().name,
        model=ModelReport(
            family=_family(root.module_class),
            architecture=root.module_class,
            variant=manifest["variant"] or manifest["model"],
            **attrs.asdict(Policy(dtype=manifest["dtype"], attention=manifest["attention"])),
            parameter_count=root.parameter_count,
            weight_bytes=sum(row["weight_bytes"] for row in rows["modules"]),
        ),
        workload=_workload(workload, pages),
        hardware=_run_hardware(manifest),
        routing_source=manifest["expert_routing"]["source"],
        root=root,
        sampling=tuple(_run_sampling(root, totals)),
        unclassified=tuple(_unclassified(rows["attribution"])),
        measured_wall_ns=sum(row["wall_ns"] for row in totals),
        notes=(*manifest["notes"], *manifest["prediction"]["notes"], *_run_notes(totals)),
    )


def _assembled(
    *,
    run_id: str | None,
    model: ModelReport,
    workload: WorkloadReport,
    root: ModuleReport,
    sampling: tuple[SamplingReport, ...],
    unclassified: tuple[UnclassifiedReport, ...],
    measured_wall_ns: int | None,
    notes: tuple[str, ...],
    **parts: Any,
) -> AnalyticModelReport:
    """Add what follows from the parts: the id and the summary."""
    parts |= {"model": model, "workload": workload, "root": root, "sampling": sampling, "unclassified": unclassified}
    plain = {name: attrs.asdict(part) if attrs.has(type(part)) else part for name, part in parts.items()}
    content = json.dumps(plain, sort_keys=True, default=attrs.asdict).encode()
    report_id = f"amr-{hashlib.sha256(content).hexdigest()[:12]}"
    whole: list[CostReport | SamplingReport] = [*(entry.total for entry in root.stages), *sampling]
    predicted_ns = sum(part.predicted_ns for part in whole)
    measured_device_ns = _measured_device_ns(root, unclassified)
    summary = ReportSummary(
        report_id=report_id,
        model_variant=model.variant,
        workload_profile_id=workload.id,
        predicted_total_time_ms=predicted_ns / 1e6,
        measured_total_time_ms=None if measured_wall_ns is None else measured_wall_ns / 1e6,
        predicted_vs_measured_ratio=predicted_ns / measured_wall_ns if measured_wall_ns else None,
        predicted_device_time_ms=sum(part.predicted_device_ns for part in whole) / 1e6,
        measured_device_time_ms=None if measured_device_ns is None else measured_device_ns / 1e6,
        top_modules=_top_modules(root, predicted_ns),
        notes=notes,
    )
    return AnalyticModelReport(
        schema_version=SCHEMA_VERSION, report_id=report_id, run_id=run_id, summary=summary, **parts
    )


def _names(kind: type[attrs.AttrsInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(kind))


def _family(architecture: str) -> str:
    """Name of the family that has this root class."""
    return next((name for name, family in families().items() if architecture in family.architectures), "other")


def _measured_device_ns(root: ModuleReport, unclassified: Sequence[UnclassifiedReport]) -> int | None:
    """Device time of all modules and of none, scaled to all forwards; None where nothing was measured."""
    found = [entry.measured.scaled_total_ns for entry in root.stages if entry.measured]
    return sum(found) + sum(row.scaled_ns for row in unclassified) if found else None


def _top_modules(root: ModuleReport, whole_ns: int) -> tuple[TopModule, ...]:
    entries = [(module, entry) for module in walk(root) for entry in module.stages if entry.own.predicted_ns]
    entries.sort(key=lambda pair: -pair[1].own.predicted_ns)
    return tuple(_top_module(module, entry, whole_ns) for module, entry in entries[:_TOP])


def _top_module(module: ModuleReport, entry: StageReport, whole_ns: int) -> TopModule:
    own = entry.own
    return TopModule(
        module_id=module.module_id,
        name=module.module_class,
        stage=entry.stage,
        share_of_model_time=own.predicted_ns / whole_ns,
        total_time_ms=own.predicted_ns / 1e6,
        total_flops_tflops=(own.tensor_flops + own.vector_flops) / 1e12,
        memory_activations_gb=own.activation_peak_bytes / 1e9,
    )


def _workload(workload: Workload, pages: Iterable[tuple[str, Workload]]) -> WorkloadReport:
    return WorkloadReport(
        **attrs.asdict(workload, recurse=False),
        crop_grid=workload.grid,
        image_tokens=workload.image_tokens,
        seq_len=workload.seq_len,
        pages=tuple(_page(name, page) for name, page in pages),
    )


def _page(name: str, page: Workload) -> PageReport:
    return PageReport(
        name=name,
        page_width=page.page_width,
        page_height=page.page_height,
        crop_grid=page.grid,
        image_tokens=page.image_tokens,
        seq_len=page.seq_len,
        new_tokens=page.max_new_tokens,
        views=tuple(
            ViewReport(
                kind=view.kind,
                count=view.count,
                size_px=view.size,
                repetition="none" if view.count == 1 else "parfor",
            )
            for view in page.views
        ),
    )


def _page_workload(workload: Workload, page: dict[str, Any]) -> Workload:
    """The workload that a page of a run was."""
    width, height = page["page_px"]
    return attrs.evolve(workload, page_width=width, page_height=height, max_new_tokens=len(page["tokens"]))


def _hardware(forecast: Forecast) -> HardwareReport:
    device, hardware, peaks = forecast.device, forecast.device.hardware, []
    for dtype in sorted({predicted.operation.compute_dtype for predicted in forecast.prediction.operations}):
        for name in ("tensor_flops_per_s", "vector_flops_per_s"):
            figure = getattr(hardware, name)[dtype]
            peaks.append(PeakReport(name=name, dtype=dtype, value=float(figure.value), source=figure.source))
    memory = hardware.memory_bytes_per_s
    peaks.append(PeakReport(name="memory_bytes_per_s", dtype=None, value=float(memory.value), source=memory.source))
    return HardwareReport(
        name=hardware.name,
        device=device.device,
        provenance=hardware.provenance,
        source=device.source,
        measured_at=device.measured_at,
        peaks=tuple(peaks),
    )


def _run_hardware(manifest: dict[str, Any]) -> HardwareReport:
    hardware, dtypes = manifest["hardware"], {"tensor_flops_per_s": manifest["dtype"], "memory_bytes_per_s": None}
    return HardwareReport(
        name=hardware["name"],
        provenance=hardware["provenance"],
        **{name: manifest["prediction"][name] for name in ("device", "source", "measured_at")},
        peaks=tuple(
            PeakReport(name=name, dtype=dtype, value=float(hardware[name]), source=None)
            for name, dtype in dtypes.items()
        ),
    )


def _forecast_notes(root: ModuleReport, routing_source: str) -> Iterator[str]:
    yield f"tokens per expert follow the plan {routing_source}; a model without experts has none"
    if not any(entry.stage == "vision" for entry in root.stages):
        yield "the model sees no pages: its prompt is as long as the workload's, and there is no vision stage"


def _predicted_values(forecast: Forecast) -> SelfValues:
    operators: dict[Key, list[OperatorReport]] = defaultdict(list)
    for predicted in forecast.prediction.operations:
        operation = predicted.operation
        operators[operation.stage, operation.module_path].append(
            OperatorReport(
                name=operation.name,
                operator_category=operation.operator_category,
                compute_dtype=operation.compute_dtype,
                calls=operation.calls,
                cost=_cost(
                    predicted,
                    **operation.cost.columns(),
                    activation_peak_bytes=operation.activation_peak_bytes,
                ),
            )
        )
    costs: dict[Key, CostReport] = {
        key: summed([_cost(called, **_COSTLESS), *(row.cost for row in operators[key])])
        for key, called in forecast.prediction.module_calls.items()
    }
    categories: dict[Key, list[CategoryReport]] = defaultdict(list)
    for row in category_rows(forecast.prediction):
        known = attrs.asdict(row) | dict.fromkeys(("event_count", "measured_ns", "scaled_ns"))
        known["predicted_device_ns"] = row.predicted_ns
        categories[row.stage, row.module_path].append(CategoryReport(**{name: known[name] for name in _CATEGORY}))
    return SelfValues(
        calls={(str(stage), path): calls for (stage, path), calls in forecast.prediction.work.calls.items()},
        costs=costs,
        categories=categories,
        operators=operators,
        measured={},
    )


def _cost(part: TimedPart, **costs: int) -> CostReport:
    return _timed_cost(part.times, part.bound, costs)


def _timed_cost(times: Times, bound: Bound | None, costs: Mapping[str, int]) -> CostReport:
    return CostReport(
        **costs,
        **attrs.asdict(times),
        predicted_ns_by_bound={bound: times.predicted_ns} if bound else {},
        bound=bound,
    )


def _tables(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables that a report is made of; whole numbers stay whole."""
    import pyarrow as pa  # noqa: PLC0415  the report of a prediction does without
    import pyarrow.parquet as pq  # noqa: PLC0415

    names = ("modules", "predictions", "memory", "operators", "attribution", "pages")
    try:
        return {name: pq.read_table(run.path / f"{name}.parquet").to_pylist() for name in names}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"run {run.path} is incomplete: {error}; give another run") from error


def _run_values(rows: dict[str, list[dict[str, Any]]]) -> SelfValues:
    peaks = {_key(row): row["predicted_activation_peak_bytes"] for row in rows["memory"]}
    ledger = [row for row in rows["attribution"] if row["unclassified_reason"] is None]
    categories: dict[Key, list[CategoryReport]] = defaultdict(list)
    for row in rows["operators"]:
        found = row | {name: row[name] or 0 for name in ("flops", "bytes")}
        found["predicted_device_ns"] = row["predicted_ns"] or 0
        categories[_key(row)].append(CategoryReport(**{name: found[name] for name in _CATEGORY}))
    return SelfValues(
        calls={_key(row): row["calls"] for row in ledger},
        costs={_key(row): _run_cost(row, peaks[_key(row)]) for row in rows["predictions"]},
        categories=categories,
        operators={},
        measured={_key(row): MeasuredReport(**{name: row[name] for name in _MEASURED}) for row in ledger},
    )


def _run_cost(row: dict[str, Any], activation_peak_bytes: int) -> CostReport:
    costs = {name: row[name] for name in COST_COLUMNS} | {"activation_peak_bytes": activation_peak_bytes}
    return _timed_cost(Times(**{name: row[name] for name in TIME_COLUMNS}), row["bound"], costs)


def _key(row: dict[str, Any]) -> Key:
    return row["stage"], row["module_path"]


def _unclassified(attribution: Iterable[dict[str, Any]]) -> Iterator[UnclassifiedReport]:
    for row in attribution:
        if row["unclassified_reason"] is not None:
            yield UnclassifiedReport(
                stage=row["stage"],
                reason=row["unclassified_reason"],
                event_count=row["event_count"],
                measured_ns=row["measured_self_ns"],
                scaled_ns=row["scaled_self_ns"],
            )


def _run_sampling(root: ModuleReport, totals: Iterable[dict[str, Any]]) -> Iterator[SamplingReport]:
    """What a stage takes by its own prediction, less what its modules take."""
    modules = {entry.stage: entry.total for entry in root.stages}
    for row in totals:
        inside = modules[row["stage"]]
        wall_ns, device_ns = (row[name] - getattr(inside, name) for name in ("predicted_ns", "predicted_device_ns"))
        if wall_ns or device_ns:
            yield SamplingReport(stage=row["stage"], predicted_ns=wall_ns, predicted_device_ns=device_ns)


def _run_notes(totals: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in totals:
        if row["profiled_forwards"] < row["forwards"]:
            profiled = f"{row['profiled_forwards']} of {row['forwards']} forwards"
            yield f"measured device time of {row['stage']} is scaled from {profiled}"
