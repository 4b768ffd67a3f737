"""The main job: from a workload to a finished run directory."""

from __future__ import annotations

import datetime as dt
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from analytic.config import DEFAULT_VARIANT
from analytic.errors import DsocrTraceError, InputError
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.workload import Workload, load_workload
from dsocr_trace.machine.environment import (
    calibration_for,
    check_dtype,
    device_properties,
    git_commit,
    other_device_note,
    versions,
)
from dsocr_trace.recordings.stage2 import run_stage2
from dsocr_trace.report.html import report_html
from dsocr_trace.report.markdown import report_markdown
from dsocr_trace.runs.gap import gap_table
from dsocr_trace.runs.invariants import check_run
from dsocr_trace.runs.ledger import attribution_table, memory_table, operators_table
from dsocr_trace.runs.manifest import manifest
from dsocr_trace.runs.pages import first_walls, pages_table, with_scaled
from dsocr_trace.runs.predictions import PredictedRun, nothing_predicted, predict_pages
from dsocr_trace.runs.store import RunWriter
from dsocr_trace.runs.unmapped import unmapped_classes, unmapped_note, unmapped_paths
from hooks.errors import TraceError
from stage_runners.devices import require_memory, resolve_device, resolve_dtype
from stage_runners.inputs import build_inputs, workload_for_page
from stage_runners.loading import (
    BUILTIN,
    check_loadable,
    default_attention,
    default_dtype,
    load_model,
    model_config,
    own_code_failure,
    parameter_count,
)
from stage_runners.pages import Page, load_pages, synthetic_page
from stage_runners.stage1 import DEFAULT_PROFILED_STEPS, TRACED, SourcedInputs, Stage1Options, run_stage1

if TYPE_CHECKING:
    from torch import nn

    from analytic.config import ModelConfig
    from analytic.timing.calibration import Calibration
    from dsocr_trace.recordings.stage2 import Stage2
    from stage_runners.measurement import Measurement
    from stage_runners.stage1 import Progress


@attrs.frozen
class RunOptions:
    """What the user asked for; names as on the command line."""

    workload: str
    device: str = "auto"
    model: str = BUILTIN
    variant: str | None = None
    attention: str | None = None
    images: tuple[Path, ...] = ()
    dtype: str | None = None
    max_new_tokens: int | None = None
    hardware: str | None = None
    output: Path = Path("results")
    run_id: str | None = None
    repeat: int = 1
    seed: int = 0
    profile_steps: int | None = DEFAULT_PROFILED_STEPS
    nvtx: bool = False
    trust_remote_code: bool = False
    stage: str = "1"
    keep_capture: bool | None = None


@attrs.frozen(eq=False)
class Job:
    """The options, resolved and checked; nothing is loaded yet.

    Attributes
    ----------
    pages
        Each page with the workload that its size makes.
    calibration
        What the times are predicted from.
    """

    options: RunOptions
    workload: Workload
    pages: tuple[tuple[Page, Workload], ...]
    device: torch.device
    attention: str
    config: ModelConfig
    variant: str | None
    dtype: torch.dtype
    calibration: Calibration
    started_at: dt.datetime

    @property
    def dtype_name(self) -> str:
        """Full name of `dtype`."""
        return str(self.dtype).removeprefix("torch.")


def run(options: RunOptions, progress: Progress) -> Path:
    """Trace, profile, predict, join and write one run.

    Parameters
    ----------
    options
        What to run.
    progress
        Called as the work goes on.

    Returns
    -------
    pathlib.Path
        The finished run's directory.

    Raises
    ------
    InputError
        If an option cannot be used.
    DsocrTraceError, hooks.errors.TraceError
        If the job fails. Nothing is left behind then.
    """
    job = prepare(options)
    run_id = options.run_id or f"{job.workload.id}-{job.device.type}-{job.started_at:%Y%m%d-%H%M%S}"
    writer = RunWriter(options.output, run_id)
    try:
        epoch_ns = time.perf_counter_ns()
        measurement, predicted, notes = _stage1(job, progress)
        stage2 = None if options.stage == "1" else run_stage2(job, measurement, writer.folder, progress)
        write_run(writer, job, _since(measurement, epoch_ns), predicted, notes, stage2=stage2)
        return writer.publish()
    finally:
        writer.discard()


def prepare(options: RunOptions) -> Job:
    """Resolve the options and refuse what cannot work, before anything heavy is loaded.

    Raises
    ------
    InputError, DsocrTraceError
        If an option cannot be used, or memory is short.
    """
    workload = load_workload(options.workload)
    if workload.batch_size != 1:
        raise InputError(
            f"workload {workload.id} has batch_size {workload.batch_size}, a run takes one page at a time; "
            "choose a workload with batch_size 1 with --workload"
        )
    if options.max_new_tokens is not None:
        workload = attrs.evolve(workload, max_new_tokens=options.max_new_tokens)
    variant = None if options.model != BUILTIN else options.variant or workload.variant or DEFAULT_VARIANT
    attention = options.attention or default_attention(trust_remote_code=options.trust_remote_code)
    check_loadable(
        options.model,
        variant=options.variant,
        attention=attention,
        trust_remote_code=options.trust_remote_code,
    )
    config = model_config(options.model, variant=variant or DEFAULT_VARIANT)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype) if options.dtype else default_dtype(config)
    loaded = load_pages(options.images) if options.images else [synthetic_page(workload, seed=options.seed)]
    job = Job(
        options=options,
        workload=workload,
        pages=tuple((page, workload_for_page(workload, page)) for page in loaded),
        device=device,
        attention=attention,
        config=config,
        variant=variant,
        dtype=dtype,
        calibration=calibration_for(options.hardware, device),
        started_at=dt.datetime.now(dt.UTC),
    )
    check_dtype(job.calibration, job.dtype_name)
    parameters = parameter_count(config)
    for page, page_workload in job.pages:
        # Also refuses pages that the model would not see, and prompts that are too long.
        build_inputs(page, page_workload, config.decoder, seed=options.seed)
        require_memory(config, page_workload, parameters=parameters, dtype=dtype, device=device)
    return job


def load_job(job: Job) -> tuple[nn.Module, list[SourcedInputs]]:
    """Load the model and make the inputs of every page."""
    model = load_model(
        job.options.model,
        variant=job.variant or DEFAULT_VARIANT,
        dtype=job.dtype,
        device=job.device,
        attention=job.attention,
        seed=job.options.seed,
        trust_remote_code=job.options.trust_remote_code,
    )
    return model, [_inputs(job, page, workload) for page, workload in job.pages]


def _stage1(job: Job, progress: Progress) -> tuple[Measurement, PredictedRun, list[str]]:
    """Measure and predict. Nothing holds the model afterwards: Stage 2 loads its own."""
    progress("load model", 0, 1)
    model, inputs = load_job(job)
    measurement = _measured(job, model, inputs, progress)
    progress("predict and join", 0, 1)
    return measurement, *_predict(job, model, measurement)


def _inputs(job: Job, page: Page, workload: Workload) -> SourcedInputs:
    inputs = build_inputs(page, workload, job.config.decoder, seed=job.options.seed)
    return SourcedInputs(page.name, page.source, inputs.to(job.device, job.dtype))


def _measured(job: Job, model: nn.Module, inputs: list[SourcedInputs], progress: Progress) -> Measurement:
    try:
        return run_stage1(model, inputs, job.config.decoder, _stage1_options(job), progress)
    except torch.OutOfMemoryError as error:
        raise DsocrTraceError(
            f"{job.device} ran out of memory; use a smaller page, fewer --max-new-tokens, or --dtype bf16"
        ) from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        if not job.options.trust_remote_code or isinstance(error, TraceError):
            raise
        raise own_code_failure(error, str(job.device)) from error


def _stage1_options(job: Job) -> Stage1Options:
    return Stage1Options(
        profiled_steps=job.options.profile_steps,
        repeats=job.options.repeat,
        stop_at_eos=job.options.model != BUILTIN,
        nvtx=job.options.nvtx,
    )


def _since(measurement: Measurement, epoch_ns: int) -> Measurement:
    """The measurement with its times counted from the run's start."""

    def shifted(table: pa.Table, *columns: str) -> pa.Table:
        for name in columns:
            moved = pc.subtract(table[name], epoch_ns)
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), moved)
        return table

    return attrs.evolve(
        measurement,
        calls=shifted(measurement.calls, "start_ns", "end_ns"),
        kernels=shifted(measurement.kernels, "start_ns", "launch_ns"),
    )


def _predict(job: Job, model: nn.Module, measurement: Measurement) -> tuple[PredictedRun, list[str]]:
    """Predict if the model has all modules that the formulas are for."""
    analytic_model = deepseek_ocr(job.config)
    live = {path: type(module).__name__ for path, module in model.named_modules()}
    layers = analytic_model.family.mapped(job.config, live)
    unknown = [node.module_path for node in analytic_model.tree if node.module_path not in live]
    if unknown:
        note = f"nothing is predicted: the model lacks {len(unknown)} of the expected modules, such as {unknown[0]!r}"
        return nothing_predicted(layers), [note]
    policy = Policy(dtype=job.dtype_name, attention=job.attention)
    pages, calibration = measurement.pages, job.calibration
    return predict_pages(analytic_model, pages, calibration=calibration, policy=policy, layers=layers), []


def write_run(
    writer: RunWriter,
    job: Job,
    measurement: Measurement,
    predicted: PredictedRun,
    notes: list[str],
    *,
    stage2: Stage2 | None = None,
) -> None:
    """Join everything into the run's tables, check the invariants, and write."""
    modules = measurement.modules.to_pandas()
    modules["analytic_layer"] = modules["module_path"].map(predicted.layers)
    kernels, all_calls = measurement.kernels.to_pandas(), measurement.calls.to_pandas()
    calls = all_calls[all_calls["pass"] == TRACED]
    scaled = with_scaled(kernels, measurement.pages)
    attribution = attribution_table(modules, calls, scaled, predicted.modules)
    tables = {
        "modules": modules,
        "callgraph": measurement.callgraph,
        "calls": measurement.calls,
        "kernels": measurement.kernels,
        "predictions": predicted.modules,
        "attribution": attribution,
        "operators": operators_table(scaled, predicted.categories, unmapped_paths(modules)),
        "memory": memory_table(modules, predicted.modules, predicted.weights, measurement.memory),
        "pages": pages_table(measurement.pages, scaled, predicted.stages),
        "gap": gap_table(attribution, calls, predicted.modules, predicted.sampling, first_walls(measurement.pages)),
    }
    conserved = check_run(tables | {"kernels": kernels}, predicted.model_flops() if len(predicted.stages) else None)
    tables |= stage2.tables if stage2 else {}
    for name, rows in tables.items():
        writer.table(name, rows)
    unmapped = unmapped_classes(modules, attribution)
    device = device_properties(job.device)
    content = manifest(
        job,
        measurement,
        attribution,
        unmapped=unmapped,
        conserved=conserved,
        notes=[
            *measurement.notes,
            *notes,
            *unmapped_note(unmapped),
            *other_device_note(job.calibration, device),
            *(stage2.notes if stage2 else ()),
        ],
        command=sys.argv,
        environment={
            "versions": versions(),
            "git_commit": git_commit(),
            "device": device,
        },
    ) | {"stage2": stage2.summary if stage2 else None}
    writer.manifest(content)
    frames = {name: _frame(rows) for name, rows in tables.items()} | {"kernels": scaled}
    writer.text("report.md", report_markdown(content, frames))
    writer.text("report.html", report_html(content, frames))


def _frame(rows: pd.DataFrame | pa.Table) -> pd.DataFrame:
    return rows if isinstance(rows, pd.DataFrame) else rows.to_pandas()
