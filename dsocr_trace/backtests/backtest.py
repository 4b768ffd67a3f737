"""Backtest: calibrate, predict, run, calibrate again, and say how far the predictions are off."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa

from analytic.config import variant_config
from analytic.cost import dtype_name
from analytic.errors import InputError
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.timing.workload import SAMPLING
from dsocr_trace.backtests.errors import DRIFT, baselines, by_class, by_stage, drift, gap
from dsocr_trace.backtests.predictions import KEY, LEVELS, ROUTED, predict_trial
from dsocr_trace.backtests.trials import plan_trials
from dsocr_trace.machine.calibrations import load_calibration, save_calibration
from dsocr_trace.machine.environment import device_properties, git_commit, hardware_for, versions
from dsocr_trace.runs.predictions import measured_routing
from dsocr_trace.runs.store import FolderWriter
from stage_runners.backtest import run_trials
from stage_runners.calibration.apart import calibrate_apart
from stage_runners.calibration.measure import Limits
from stage_runners.devices import require_memory, resolve_device, resolve_dtype
from stage_runners.estimator import MODES, Estimate, estimate
from stage_runners.inputs import build_inputs
from stage_runners.loading import load_model, parameter_count
from stage_runners.pages import synthetic_page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from analytic.config import ModelConfig
    from analytic.hardware import Hardware
    from analytic.model import Model
    from analytic.timing.calibration import Calibration
    from stage_runners.backtest import MeasuredTrial, Trial
    from stage_runners.stage1 import Progress

#: What a quick calibration may take: enough to see that everything works, not to judge the model.
_QUICK_LIMITS: Final = Limits(look_s=4, total_s=10, call_s=0.01, large_call_s=0.02)
_CONTROLS: Final = ("product_ns", "row_ns", "copy_ns")


def _columns(text: Sequence[str] = (), whole: Sequence[str] = (), real: Sequence[str] = ()) -> list[pa.Field]:
    kinds = ((text, pa.string()), (whole, pa.int64()), (real, pa.float64()))
    return [pa.field(name, kind) for names, kind in kinds for name in names]


_ROUTED_DEVICE: Final = "routed_device_ns"
_MEASURED: Final = ("measured_ns", "traced_ns")
_ERRORS: Final = _columns(whole=["count"], real=["median", "p90", "worst", "time_weighted", "bias"])
SCHEMAS: Final = {
    "trials": pa.schema(
        [
            *_columns(text=["workload", "crop_grid"]),
            *_columns(whole=["trial", "order", "seed", "base_size_px", "image_size_px", "seq_len"]),
            *_columns(whole=["max_new_tokens", "batch_size"]),
            *_columns(whole=[*LEVELS, ROUTED, "predicted_after_ns", "extrapolated_ns", *_MEASURED, *_CONTROLS]),
            *_columns(real=["error", "drift"]),
            pa.field("accepted", pa.bool_()),
        ]
    ),
    "stages": pa.schema(_columns(["stage"], ["trial", *LEVELS, ROUTED, *_MEASURED])),
    "modules": pa.schema(_columns(KEY, ["trial", *LEVELS, ROUTED, "extrapolated_ns", "measured_ns"])),
    "stage_errors": pa.schema([*_columns(["stage"], real=["share_of_time"]), *_ERRORS]),
    "class_errors": pa.schema([*_columns(["module_class"], real=["share_of_time"]), *_ERRORS]),
    "gap": pa.schema(
        _columns(
            ["module_class"],
            ["datasheet_ns", "ceilings_ns", "shape_ns", "host_ns", "predicted_ns", "unexplained_ns", "measured_ns"],
        )
    ),
    "baselines": pa.schema([*_columns(["method"]), *_ERRORS, *_columns(["reason"])]),
}


@attrs.frozen
class BacktestOptions:
    """What the user asked for; names as on the command line."""

    device: str
    output: Path | None = None
    trials: int | None = None
    calibration: Path | None = None
    variant: str = "deepseek-ocr-v1-base"
    dtype: str = "bf16"
    seed: int = 0
    quick: bool = False


@attrs.frozen(eq=False)
class Setup:
    """The options, resolved and checked."""

    options: BacktestOptions
    device: torch.device
    config: ModelConfig
    policy: Policy
    hardware: Hardware
    trials: tuple[Trial, ...]
    given: Calibration | None
    started_at: dt.datetime

    @property
    def model(self) -> Model:
        """The model for the formulas."""
        return deepseek_ocr(self.config)


@attrs.frozen(eq=False)
class Backtest:
    """A finished backtest.

    Attributes
    ----------
    setup
        What ran.
    before, after
        Calibrations: predictions are from the first. There is no second one if the first was given as a file.
    reference
        The control in the first calibration, in ns.
    tables
        By name, with the columns of `SCHEMAS`.
    properties
        Device, versions and commit.
    """

    setup: Setup
    before: Calibration
    after: Calibration | None
    reference: Mapping[str, float]
    tables: dict[str, pd.DataFrame]
    properties: dict[str, Any]

    @property
    def accepted(self) -> pd.DataFrame:
        """Trials during which the machine was as at the calibration."""
        trials = self.tables["trials"]
        return trials[trials["accepted"]]

    @property
    def accepted_modules(self) -> pd.DataFrame:
        """Modules of these trials."""
        modules = self.tables["modules"]
        return modules[modules["trial"].isin(self.accepted["trial"])]


def prepare(options: BacktestOptions) -> Setup:
    """Resolve the options and refuse what cannot work, before anything is measured.

    Raises
    ------
    InputError, DsocrTraceError
        If an option cannot be used, or memory is short.
    """
    device, dtype = resolve_device(options.device), dtype_name(options.dtype)
    config = variant_config(options.variant)
    trials = plan_trials(options.trials, seed=options.seed, quick=options.quick)
    parameters = parameter_count(config)
    for trial in trials:
        require_memory(config, trial.workload, parameters=parameters, dtype=resolve_dtype(options.dtype), device=device)
    if options.output is not None and options.output.exists():
        raise InputError(f"{options.output} exists and is left as it is; choose another with --output")
    given = None if options.calibration is None else load_calibration(options.calibration)
    if given is not None:
        _check_fits(given, device, dtype)
    return Setup(
        options=options,
        device=device,
        config=config,
        policy=Policy(dtype=dtype),
        hardware=hardware_for(None, device) if given is None else given.hardware,
        trials=tuple(trials),
        given=given,
        started_at=dt.datetime.now(dt.UTC),
    )


def _check_fits(calibration: Calibration, device: torch.device, dtype: str) -> None:
    if calibration.kind != device.type:
        raise InputError(
            f"the calibration is of a {calibration.kind} device, the backtest runs on {device}; "
            "give another with --calibration, or leave it out"
        )
    if dtype not in calibration.tensor_flops_per_s:
        choices = ", ".join(calibration.tensor_flops_per_s)
        raise InputError(f"the calibration has no {dtype}, only {choices}; choose another with --dtype")
    if dtype not in calibration.state.get("control_ns", {}):
        raise InputError(
            "the calibration does not say how the control ran, so that nothing tells whether the machine has changed; "
            "measure another with dsocr-trace calibrate, or leave out --calibration"
        )


def backtest(options: BacktestOptions, progress: Progress) -> tuple[Backtest, FolderWriter]:
    """Run a backtest.

    Parameters
    ----------
    options
        What to run.
    progress
        Called as the work goes on.

    Returns
    -------
    tuple of Backtest and FolderWriter
        What came out, and the directory in the making, which holds tables and calibrations.

    Raises
    ------
    InputError, DsocrTraceError
        If an option cannot be used, or the directory cannot be written to.
    """
    setup = prepare(options)
    writer = FolderWriter(options.output or _default_output(setup), SCHEMAS)
    try:
        found = _measured(setup, progress)
        for name, rows in found.tables.items():
            writer.table(name, rows)
        for name, calibration in (("before", found.before), ("after", found.after)):
            if calibration is not None:
                save_calibration(calibration, writer.folder / f"calibration-{name}.parquet")
    except BaseException:
        writer.discard()
        raise
    return found, writer


def _default_output(setup: Setup) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", device_properties(setup.device)["name"].lower()).strip("-")
    return Path("results") / f"backtest-{device}-{setup.started_at:%Y%m%d-%H%M%S}"


def _measured(setup: Setup, progress: Progress) -> Backtest:
    """The model is loaded once, and nothing is run before it is predicted."""
    progress("load model", 0, 1)
    model = load_model(
        "builtin",
        variant=setup.options.variant,
        dtype=setup.options.dtype,
        device=setup.device,
        seed=setup.options.seed,
    )
    properties = {"device": device_properties(setup.device), "versions": versions(), "commit": git_commit()}
    before = setup.given or _calibrated(setup, properties, progress)
    reference = before.state["control_ns"][setup.policy.dtype]
    predicted = predictions(setup, before)
    measured = list(run_trials(model, setup.trials, setup.config.decoder, progress))
    after = None if setup.given else _calibrated(setup, properties, progress)
    routed = {one.trial.number: _routed(setup, before, one) for one in measured}
    predicted = {number: rows.merge(routed[number], on=KEY, how="outer") for number, rows in predicted.items()}
    tables = joined(setup, measured, predicted, reference)
    if after is not None:
        again = predictions(setup, after)
        tables["trials"]["predicted_after_ns"] = [
            again[trial]["predicted_ns"].sum() for trial in tables["trials"]["trial"]
        ]
    tables |= analysed(tables, estimated(model, setup))
    return Backtest(setup, before, after, reference, tables, properties)


def _calibrated(setup: Setup, properties: dict[str, Any], progress: Progress) -> Calibration:
    found = calibrate_apart(
        setup.device,
        [setup.policy.dtype],
        hardware=setup.hardware,
        name=properties["device"]["name"],
        progress=progress,
        limits=_QUICK_LIMITS if setup.options.quick else None,
    )
    return attrs.evolve(found, state=properties | dict(found.state))


def predictions(setup: Setup, calibration: Calibration) -> dict[int, pd.DataFrame]:
    """Predict every trial, by its number; trials of the same workload share a prediction."""
    by_workload = {
        workload: predict_trial(setup.model, workload, calibration, setup.policy)
        for workload in dict.fromkeys(trial.workload for trial in setup.trials)
    }
    return {trial.number: by_workload[trial.workload] for trial in setup.trials}


def _routed(setup: Setup, calibration: Calibration, one: MeasuredTrial) -> pd.DataFrame:
    """The prediction again, told what the routers chose: they, too, are something that a prediction does not know."""
    routing = measured_routing(one.routing)
    rows = predict_trial(setup.model, one.trial.workload, calibration, setup.policy, routing=routing)
    return rows[[*KEY, "predicted_ns", "device_ns"]].rename(
        columns={"predicted_ns": ROUTED, "device_ns": _ROUTED_DEVICE}
    )


def joined(
    setup: Setup, measured: Sequence[MeasuredTrial], predicted: dict[int, pd.DataFrame], reference: Mapping[str, float]
) -> dict[str, pd.DataFrame]:
    """Predicted beside measured: the tables trials, stages and modules."""
    classes = {node.module_path: node.module_class for node in setup.model.tree} | {SAMPLING: SAMPLING}
    modules = pd.concat([_modules(one, predicted[one.trial.number], classes) for one in measured], ignore_index=True)
    stages = pd.concat([_stages(one, modules) for one in measured], ignore_index=True)
    trials = pd.DataFrame([_trial(one, reference) for one in measured]).assign(order=range(len(measured)))
    sums = stages.groupby("trial")[[*LEVELS, ROUTED, *_MEASURED]].sum()
    sums["extrapolated_ns"] = modules.groupby("trial")["extrapolated_ns"].sum()
    trials = trials.join(sums, on="trial")
    trials["error"] = trials["predicted_ns"] / trials["measured_ns"] - 1
    trials["accepted"] = trials["drift"].abs() <= DRIFT
    if setup.device.type == "cuda":
        # Modules were measured on the device, so they are compared with what they take there.
        modules[["predicted_ns", ROUTED]] = modules[["device_ns", _ROUTED_DEVICE]]
    return {"trials": trials, "stages": stages, "modules": modules}


def _modules(one: MeasuredTrial, predicted: pd.DataFrame, classes: dict[str, str]) -> pd.DataFrame:
    own = dict(one.own_ns) | {(stage, SAMPLING): nanoseconds for stage, nanoseconds in one.between_ns.items()}
    measured = pd.DataFrame(
        [(stage, path, classes.get(path, path), nanoseconds) for (stage, path), nanoseconds in own.items()],
        columns=[*KEY, "measured_ns"],
    )
    # The router calls other experts than the plan: each side may have modules that the other has not.
    rows = predicted.merge(measured, on=KEY, how="outer").assign(trial=one.trial.number)
    whole = [*LEVELS, ROUTED, _ROUTED_DEVICE, "extrapolated_ns", "measured_ns"]
    return rows.assign(**rows[whole].fillna(0).astype(np.int64))


def _stages(one: MeasuredTrial, modules: pd.DataFrame) -> pd.DataFrame:
    mine = modules[modules["trial"] == one.trial.number]
    sums = mine.groupby("stage")[[*LEVELS, ROUTED]].sum().reset_index()
    for column, repeat in zip(_MEASURED, (one.plain, one.traced), strict=True):
        walls = {"vision": repeat.vision_ns, "prefill": repeat.prefill_ns, "decode": sum(repeat.decode_ns)}
        sums[column] = sums["stage"].map(walls)
    return sums.assign(trial=one.trial.number)


def _trial(one: MeasuredTrial, reference: Mapping[str, float]) -> dict[str, Any]:
    workload = one.trial.workload
    return {
        "trial": one.trial.number,
        "workload": workload.id,
        "seed": one.trial.seed,
        "crop_grid": "x".join(map(str, workload.grid)) if workload.grid else "none",
        "base_size_px": workload.base_size,
        "image_size_px": workload.image_size,
        "seq_len": workload.seq_len,
        "max_new_tokens": workload.max_new_tokens,
        "batch_size": workload.batch_size,
        "drift": drift(reference, one.control),
        **{f"{name}_ns": round(nanoseconds) for name, nanoseconds in one.control.items()},
    }


def estimated(model: nn.Module, setup: Setup) -> dict[str, dict[int, Estimate]]:
    """What PyTorch's own estimator says of the trials, by mode and number of the trial; it ends where it gives up."""
    found: dict[str, dict[int, Estimate]] = {}
    for mode in MODES:
        found[mode] = {}
        for trial in setup.trials:
            page = synthetic_page(trial.workload, seed=trial.seed)
            inputs = build_inputs(page, trial.workload, setup.config.decoder, seed=trial.seed)
            moved = inputs.to(setup.device, next(model.parameters()).dtype)
            found[mode][trial.number] = estimate(model, moved, mode)
            if found[mode][trial.number].total_ns is None:
                break
    return found


def analysed(tables: dict[str, pd.DataFrame], estimates: dict[str, dict[int, Estimate]]) -> dict[str, pd.DataFrame]:
    """Errors of the accepted trials: the other tables."""
    accepted = tables["trials"][tables["trials"]["accepted"]]
    stages, modules = (rows[rows["trial"].isin(accepted["trial"])] for rows in (tables["stages"], tables["modules"]))
    return {
        "stage_errors": by_stage(stages),
        "class_errors": by_class(modules),
        "gap": gap(modules, accepted),
        "baselines": baselines(tables["trials"], estimates),
    }
