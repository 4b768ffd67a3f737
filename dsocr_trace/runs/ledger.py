"""The join: for every module and stage what was measured beside what was predicted, and the rest by reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analytic.families.base import OTHER
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from stage_runners.measurement import MeasuredMemory

_KEY = ["stage", "module_path"]


def attribution_table(
    modules: pd.DataFrame,
    calls: pd.DataFrame,
    kernels: pd.DataFrame,
    predictions: pd.DataFrame,
) -> pd.DataFrame:
    """Join measurement and prediction by (stage, module), and add the events of no module by reason.

    Parameters
    ----------
    modules
        The module tree (`dsocr_trace.runs.schemas.MODULES`).
    calls
        Calls of one traced generation per page (`hooks.tables.CALLS`).
    kernels
        Attributed events (`hooks.tables.KERNELS`), with ``scaled_ns``: each event's time scaled to its whole stage.
    predictions
        Predicted self values (`dsocr_trace.runs.schemas.PREDICTIONS`), possibly empty.

    Returns
    -------
    pandas.DataFrame
        Columns of `dsocr_trace.runs.schemas.ATTRIBUTION`. A module has a row in each stage in which it, or a module
        below it, was called, measured or predicted. For a module whose ``analytic_layer`` is `OTHER` nothing is
        predicted; what is predicted below it counts for the modules above it.
    """
    named = kernels[kernels["unclassified_reason"].isna()]
    rows = _keys(modules, calls, named, predictions)
    rows = rows.join(_measured(named), on=_KEY).join(_called(calls), on=_KEY).join(_predicted(predictions), on=_KEY)
    counts = ["calls", "event_count", "measured_self_ns", "scaled_self_ns", "wall_total_ns"]
    rows[counts] = rows[counts].fillna(0).astype("int64")
    if len(predictions):
        sums = ["predicted_self_ns", "tensor_flops", "vector_flops", "bytes_total"]
        rows[sums] = rows[sums].fillna(0).astype("int64")
    for quantity in ("measured", "scaled", "predicted"):
        rows[f"{quantity}_total_ns"] = rolled_up(rows, f"{quantity}_self_ns")
    predicted = ["predicted_self_ns", "predicted_total_ns", "tensor_flops", "vector_flops", "bytes_total"]
    rows[predicted] = rows[predicted].where(rows["analytic_layer"] != OTHER)
    rows = pd.concat([rows, _unclassified(kernels)], ignore_index=True)
    return _with_rates(rows)


def _keys(modules: pd.DataFrame, *tables: pd.DataFrame) -> pd.DataFrame:
    """(stage, module) pairs that any table mentions, with all their ancestors, in the order of the module tree."""
    below = modules.dropna(subset="parent_path")
    parent = dict(zip(below["module_path"], below["parent_path"], strict=True))
    wanted: dict[str, set[str]] = {}
    for table in tables:
        for stage, paths in table.groupby("stage")["module_path"]:
            wanted.setdefault(str(stage), set()).update(paths.unique())
    frames = []
    for stage, paths in wanted.items():
        mine = modules[modules["module_path"].isin(paths | _ancestors(paths, parent))]
        frames.append(mine.assign(stage=stage))
    columns = ["stage", "module_path", "module_class", "analytic_layer", "parent_path", "depth"]
    if not frames:
        return modules.iloc[:0].assign(stage="")[columns]
    return pd.concat(frames, ignore_index=True)[columns]


def _ancestors(paths: set[str], parent: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        above = parent.get(path)
        while above is not None and above not in found:
            found.add(above)
            above = parent.get(above)
    return found


def _measured(named: pd.DataFrame) -> pd.DataFrame:
    return _summed(named, _KEY).rename(columns={"measured_ns": "measured_self_ns", "scaled_ns": "scaled_self_ns"})


def _summed(kernels: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """Count the events of each group and add up their times."""
    sums = kernels.groupby(key).agg(
        event_count=("duration_ns", "size"), measured_ns=("duration_ns", "sum"), scaled_ns=("scaled_ns", "sum")
    )
    return sums.round({"scaled_ns": 0}).astype("int64")


def _called(calls: pd.DataFrame) -> pd.DataFrame:
    return (
        calls.assign(wall=calls["end_ns"] - calls["start_ns"])
        .groupby(_KEY)["wall"]
        .agg(wall_total_ns="sum", calls="size")
    )


def _predicted(predictions: pd.DataFrame) -> pd.DataFrame:
    frame = predictions.set_index(_KEY)
    return pd.DataFrame(
        {
            "predicted_self_ns": frame["predicted_device_ns"],
            "tensor_flops": frame["tensor_flops"],
            "vector_flops": frame["vector_flops"],
            "bytes_total": frame["bytes_read"] + frame["bytes_written"],
        }
    )


def rolled_up(rows: pd.DataFrame, column: str) -> pd.Series:
    """Self values of `column` plus those of all modules below, within each stage."""
    totals = rows[column].copy()
    place = pd.Series(rows.index, index=pd.MultiIndex.from_frame(rows[_KEY]))
    for depth in range(max(rows["depth"], default=0), 0, -1):
        level = rows.index[rows["depth"] == depth]
        parents = place.reindex(pd.MultiIndex.from_frame(rows.loc[level, ["stage", "parent_path"]]))
        added = totals.loc[level].groupby(parents.to_numpy()).sum()
        totals.loc[added.index] += added
    return totals


def _unclassified(kernels: pd.DataFrame) -> pd.DataFrame:
    """One row per (stage, reason) of the events that belong to no module."""
    rest = kernels[kernels["unclassified_reason"].notna()]
    rows = _summed(rest, ["stage", "unclassified_reason"]).reset_index()
    times = {
        f"{quantity}_{extent}_ns": rows[f"{quantity}_ns"]
        for quantity in ("measured", "scaled")
        for extent in ("self", "total")
    }
    return rows.assign(module_path=UNCLASSIFIED, depth=0, calls=0, **times).drop(columns=["measured_ns", "scaled_ns"])


def _with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    scaled = rows["scaled_self_ns"].where(rows["scaled_self_ns"] > 0)
    whole = rows.groupby("stage")["measured_self_ns"].transform("sum")
    return rows.assign(
        ratio_predicted_to_measured=rows["predicted_self_ns"] / scaled,
        achieved_flops_per_s=(rows["tensor_flops"] + rows["vector_flops"]) * 1e9 / scaled,
        achieved_bytes_per_s=rows["bytes_total"] * 1e9 / scaled,
        share_of_time=rows["measured_self_ns"] / whole.where(whole > 0),
    )


def operators_table(kernels: pd.DataFrame, predicted: pd.DataFrame, unmapped: Collection[str] = ()) -> pd.DataFrame:
    """Measured and predicted work of each module by operator category.

    A module that is predicted as work of one category, such as a norm, keeps it here for all its events: on the device
    it may be a handful of elementwise operators.

    Parameters
    ----------
    kernels
        Attributed events with ``scaled_ns``.
    predicted
        Predicted (stage, module_path, operator_category) with predicted_ns (the device's time), flops, bytes; possibly
        empty.
    unmapped
        Paths of modules for which nothing is predicted.
    """
    key = [*_KEY, "operator_category"]
    measured = _summed(_with_predicted_categories(kernels, predicted), key)
    rows = measured.reset_index().merge(predicted, on=key, how="outer")
    counts = ["event_count", "measured_ns", "scaled_ns"]
    rows[counts] = rows[counts].fillna(0).astype("int64")
    if len(predicted):
        sums = ["predicted_ns", "flops", "bytes"]
        is_known = ~rows["module_path"].isin({UNCLASSIFIED, *unmapped})
        rows.loc[is_known, sums] = rows.loc[is_known, sums].fillna(0)
    of_module = rows.groupby(_KEY)["flops"].transform("sum")
    rows["share_of_module_flops"] = rows["flops"] / of_module.where(of_module > 0)
    return rows


def _with_predicted_categories(kernels: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    sole = predicted.drop_duplicates(_KEY, keep=False).set_index(_KEY)["operator_category"]
    own = sole.reindex(pd.MultiIndex.from_frame(kernels[_KEY])).to_numpy()
    category = kernels["operator_category"].where(pd.isna(own), own)
    return kernels.assign(operator_category=category)


def memory_table(
    modules: pd.DataFrame, predictions: pd.DataFrame, weights: Mapping[str, int], measured: MeasuredMemory
) -> pd.DataFrame:
    """Predicted memory of each predicted (stage, module), beside what was measured.

    Parameters
    ----------
    modules
        The live model's modules.
    predictions
        Predicted self values (`dsocr_trace.runs.schemas.PREDICTIONS`), with ``activation_peak_bytes``.
    weights
        Predicted bytes of the parameters that each module path owns: held once, however often they are read.
    measured
        Cache and activations; a module without an activation peak has an empty one, without cache growth has none.
    """
    live = modules.set_index("module_path")["weight_bytes"]
    keys = pd.Series(list(zip(predictions["stage"], predictions["module_path"], strict=True)), predictions.index)
    return pd.DataFrame(
        {
            "stage": predictions["stage"],
            "module_path": predictions["module_path"],
            "predicted_weight_bytes": predictions["module_path"].map(dict(weights)),
            "measured_weight_bytes": predictions["module_path"].map(live),
            "predicted_activation_peak_bytes": predictions["activation_peak_bytes"],
            "measured_activation_peak_bytes": keys.map(measured.activation_peak_bytes),
            "predicted_kv_cache_bytes": predictions["kv_cache_bytes"],
            "measured_kv_cache_bytes": keys.map(measured.cache_growth_bytes).fillna(0),
        }
    )
