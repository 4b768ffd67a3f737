"""How far predictions are off, and where: errors, the gap in parts, and the verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import pandas as pd

from dsocr_trace.backtests.predictions import LEVELS, ROUTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.timing.calibration import Calibration
    from stage_runners.estimator import Estimate

#: The bars: in at least this share of the accepted trials the total is within this of measured, at the median within
#: that; and all module classes together, each by its time, within the last.
WITHIN: Final = 0.15
SHARE: Final = 0.90
MEDIAN: Final = 0.07
CLASSES: Final = 0.20
#: A trial is set aside if one of the control's times is further than this from what it was in the calibration.
DRIFT: Final = 0.10

#: What each level adds to the one before it.
PARTS: Final = ("datasheet_ns", "ceilings_ns", "shape_ns", "host_ns")
#: What the modules leave of the total: the tracer's own time, with a minus; on a GPU, the time that the device is idle.
REST: Final = "(rest)"
#: The model again, for what was set aside to be seen.
ALL_TRIALS: Final = "time model, trials set aside included"
_NAMES: Final = {
    "predicted_ns": "time model",
    ROUTED: "time model, told what the routers chose",
    "device_ns": "calibrated operators, no host",
    "roof_ns": "calibrated roofline",
    "datasheet_ns": "datasheet roofline",
}


def drift(reference: Mapping[str, float], control: Mapping[str, float]) -> float:
    """Largest relative change of the control."""
    return max((control[name] / reference[name] - 1 for name in reference), key=abs)


def errors(predicted: pd.Series, measured: pd.Series) -> dict[str, float | int | None]:
    """Errors of predictions, as shares of measured.

    Parameters
    ----------
    predicted, measured
        Times, in the same order; where nothing was measured there is no error.

    Returns
    -------
    dict
        ``count``; ``median``, ``p90`` of the errors without their sign; ``worst`` with it; ``time_weighted``, the
        sum of all differences over the sum of measured; and ``bias``, the same with signs. All None where count is 0.
    """
    there = (measured > 0).to_numpy()
    predicted, measured = predicted.to_numpy(float)[there], measured.to_numpy(float)[there]
    if not measured.size:
        return {"count": 0} | dict.fromkeys(("median", "p90", "worst", "time_weighted", "bias"))
    signed = predicted / measured - 1
    size = np.abs(signed)
    return {
        "count": int(size.size),
        "median": float(np.median(size)),
        "p90": float(np.quantile(size, 0.9)),
        "worst": float(signed[size.argmax()]),
        "time_weighted": float(np.abs(predicted - measured).sum() / measured.sum()),
        "bias": float((predicted - measured).sum() / measured.sum()),
    }


def baselines(trials: pd.DataFrame, estimates: Mapping[str, Mapping[int, Estimate]]) -> pd.DataFrame:
    """Errors of the total, of every level of the model and of PyTorch's estimator: what each part is worth.

    Parameters
    ----------
    trials
        All of them; errors are of the accepted ones.
    estimates
        By mode of the estimator and number of the trial. Where it gave up, the reason stands instead of errors.
    """
    accepted = trials[trials["accepted"]]
    rows = [{"method": name} | errors(accepted[level], accepted["measured_ns"]) for level, name in _NAMES.items()]
    rows.append({"method": ALL_TRIALS} | errors(trials["predicted_ns"], trials["measured_ns"]))
    for mode, found in estimates.items():
        told: dict[str, Any] = {"method": f"RuntimeEstimator, {mode}"}
        told["reason"] = next((each.reason for each in found.values() if each.reason), None)
        if told["reason"] is None:
            predicted = accepted["trial"].map({number: each.total_ns for number, each in found.items()})
            told |= errors(predicted, accepted["measured_ns"])
        rows.append(told)
    return pd.DataFrame(rows)


def by_stage(stages: pd.DataFrame) -> pd.DataFrame:
    """Errors of every stage."""
    return _grouped(stages, "stage")


def by_class(modules: pd.DataFrame) -> pd.DataFrame:
    """Errors of every module class, all its modules of a trial together; what takes most first."""
    summed = modules.groupby(["trial", "module_class"])[["predicted_ns", "measured_ns"]].sum().reset_index()
    return _grouped(summed, "module_class").sort_values("share_of_time", ascending=False, ignore_index=True)


def _grouped(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    everything = rows["measured_ns"].sum()
    found = [
        {column: name, "share_of_time": float(group["measured_ns"].sum() / everything)}
        | errors(group["predicted_ns"], group["measured_ns"])
        for name, group in rows.groupby(column, sort=False)
    ]
    return pd.DataFrame(found, columns=[column, "share_of_time", *errors(pd.Series(), pd.Series())])


def gap(modules: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """From the datasheet to the clock, per module class and for everything.

    Parameters
    ----------
    modules
        Predicted and measured, per trial and module.
    trials
        The same trials as a whole, measured without the tracer.

    Returns
    -------
    pandas.DataFrame
        `PARTS`, which add up to ``predicted_ns``; with ``unexplained_ns`` they are ``measured_ns``, in whole ns. The
        rows of the classes and of `REST` add up to the last one, the total.
    """
    columns = [*LEVELS, "measured_ns"]
    sums = modules.groupby("module_class")[columns].sum().sort_values("measured_ns", ascending=False)
    sums.loc[REST] = trials[columns].sum() - modules[columns].sum()
    sums.loc["total"] = trials[columns].sum()
    sums = sums.astype("int64")
    steps = sums[list(LEVELS)].diff(axis="columns").fillna(sums[[LEVELS[0]]]).astype("int64")
    steps.columns = pd.Index(PARTS)
    unexplained = sums["measured_ns"] - sums["predicted_ns"]
    found = steps.assign(predicted_ns=sums["predicted_ns"], unexplained_ns=unexplained, measured_ns=sums["measured_ns"])
    return found.rename_axis("module_class").reset_index()


@attrs.frozen
class Bar:
    """One thing that is asked of the model.

    Attributes
    ----------
    what
        In words.
    value
        What was reached; None if no trial was accepted.
    bar
        What is asked.
    met
        Whether it was reached.
    """

    what: str
    value: float | None
    bar: float
    met: bool


def bars(trials: pd.DataFrame, modules: pd.DataFrame, level: str = "predicted_ns") -> tuple[Bar, ...]:
    """Hold the accepted trials against the bars.

    Parameters
    ----------
    trials, modules
        Accepted trials only.
    level
        Which prediction.
    """
    total = errors(trials[level], trials["measured_ns"])
    sums = modules.groupby(["trial", "module_class"])[[level, "measured_ns"]].sum()
    weighted = (sums[level] - sums["measured_ns"]).abs().sum() / max(sums["measured_ns"].sum(), 1)
    within = (trials[level] / trials["measured_ns"] - 1).abs() <= WITHIN
    some = len(trials) > 0
    return (
        _bar(f"share of trials whose total is within {WITHIN:.0%}", float(within.mean()) if some else None, SHARE, -1),
        _bar("median error of the total", total["median"], MEDIAN),
        _bar("error of the module classes, weighted by their time", float(weighted) if some else None, CLASSES),
    )


def _bar(what: str, value: float | None, bar: float, sign: int = 1) -> Bar:
    """`sign` is -1 where more is better."""
    return Bar(what, value, bar, met=value is not None and sign * value <= sign * bar)


def interval(trials: pd.DataFrame) -> dict[str, Any] | None:
    """What measured was over predicted in the middle nine tenths of the trials: what a what-if answer may be off by."""
    if trials.empty:
        return None
    low, high = np.quantile(trials["measured_ns"] / trials["predicted_ns"], [0.05, 0.95])
    return {"share": 0.9, "low": float(low), "high": float(high)}


def calibration_shift(before: Calibration, after: Calibration) -> dict[str, float]:
    """How much the second calibration differs from the first, over the samples that both have."""

    def times(calibration: Calibration) -> dict[tuple[str, str], float]:
        return {(each.operator, str(sorted(each.arguments.items()))): each.device_ns for each in calibration.samples}

    first, second = times(before), times(after)
    ratios = [math.log(second[key] / first[key]) for key in first.keys() & second.keys()]
    if not ratios:
        return {"samples": 0, "median": 0.0, "median_size": 0.0}
    return {
        "samples": len(ratios),
        "median": math.expm1(float(np.median(ratios))),
        "median_size": math.expm1(float(np.median(np.abs(ratios)))),
    }
