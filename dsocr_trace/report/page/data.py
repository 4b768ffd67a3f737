"""Tables of a run turned into what the page shows. Numbers keep their base units; the page converts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from dsocr_trace.report.kinds import GAP_PARTS
from dsocr_trace.report.page.callgraph import folded_calls
from dsocr_trace.runs.pages import TOTAL
from dsocr_trace.runs.schemas import STAGE2_TABLES
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

#: More rows than this would make the page heavy; the largest are kept, and the page says how many are missing.
MOST_ROWS: Final = {"modules": 8_000, "kernels": 2_000}

#: An expert, or a module inside of one.
_EXPERT: Final = r"^(?P<layer>.+)\.experts\.(?P<expert>\d+)(?:\..+)?$"


def page_data(
    manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], modules: pd.DataFrame, kinds: pd.DataFrame
) -> dict[str, Any]:
    """All that the page's charts and tables show.

    Parameters
    ----------
    manifest
        The run's manifest.
    tables
        The run's tables by name; ``kernels`` with ``scaled_ns``.
    modules, kinds
        From `dsocr_trace.report.kinds`.

    Returns
    -------
    dict
        ``roofs``: the ceilings of the device; ``predicted``: where predicted times are from; ``tables``: per name a
        dict of columns, each a list; ``left_out``: per name how many rows the page does not hold.
    """
    kernels = kernel_rows(tables["kernels"])
    frames = {
        "modules": _largest(modules.drop(columns=list(GAP_PARTS)), "scaled_total_ns", MOST_ROWS["modules"]),
        "kinds": kinds,
        "operators": operator_rows(tables["operators"]),
        "kernels": _largest(kernels, "scaled_ns", MOST_ROWS["kernels"]),
        "unclassified": unclassified_rows(tables["attribution"], manifest["unclassified"]),
        "calls": folded_calls(tables["callgraph"]),
        "experts": expert_rows(tables["modules"], tables["attribution"]),
        "gap": gap_rows(tables["gap"]),
        "memory": memory_rows(tables["memory"]),
        "stages": stage_totals(tables["pages"]),
        **{name: tables[name] for name in STAGE2_TABLES if name in tables},
    }
    whole = {"modules": len(modules), "kernels": len(kernels)}
    return {
        "roofs": roofs(manifest),
        "predicted": main_source(tables["predictions"]),
        "tables": {name: columns(frame) for name, frame in frames.items()},
        "left_out": {name: count - len(frames[name]) for name, count in whole.items()},
    }


def columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """A table as lists of plain values, whole numbers whole, None where there is no value."""
    return {name: [_plain(value) for value in frame[name].tolist()] for name in frame}


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    # A column with gaps holds its whole numbers as floats.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _largest(rows: pd.DataFrame, column: str, most: int) -> pd.DataFrame:
    """The largest rows, in their own order. A module is never larger than the one that holds it, which comes first."""
    return rows.loc[rows[column].nlargest(most, keep="first").index.sort_values()]


def operator_rows(operators: pd.DataFrame) -> pd.DataFrame:
    """One row per (stage, operator category)."""
    sums = ["event_count", "scaled_ns", "predicted_ns", "flops", "bytes"]
    rows = operators.groupby(["stage", "operator_category"], as_index=False)[sums].sum(min_count=1)
    return rows.sort_values("scaled_ns", ascending=False)


def kernel_rows(kernels: pd.DataFrame) -> pd.DataFrame:
    """One row per event name, with stage, kind, category and family: how often in the profiled forwards, how long."""
    key = ["stage", "name", "kind", "operator_category", "kernel_family"]
    rows = kernels.groupby(key, as_index=False, dropna=False).agg(
        event_count=("duration_ns", "size"), measured_ns=("duration_ns", "sum"), scaled_ns=("scaled_ns", "sum")
    )
    rows["scaled_ns"] = rows["scaled_ns"].round().astype("int64")
    return rows.assign(mean_ns=rows["measured_ns"] / rows["event_count"]).sort_values(
        "scaled_ns", ascending=False, ignore_index=True
    )


def scaled_events(kernels: pd.DataFrame, pages: pd.DataFrame) -> pd.DataFrame:
    """Add ``scaled_ns`` (float) to stored events: each one's share of its page's whole stage."""
    single = pages[pages["page"] != TOTAL].set_index(["page_number", "stage"])
    factors = single["forwards"] / single["profiled_forwards"].where(single["profiled_forwards"] > 0)
    factor = factors.reindex(pd.MultiIndex.from_frame(kernels[["page", "stage"]])).fillna(1.0)
    return kernels.assign(scaled_ns=kernels["duration_ns"] * factor.to_numpy())


def unclassified_rows(attribution: pd.DataFrame, meanings: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per (stage, reason) of the events of no module, with the share of the stage's time."""
    rows = attribution[attribution["module_path"] == UNCLASSIFIED]
    reason = rows["unclassified_reason"]
    return rows.assign(meaning=[meanings[name]["means"] for name in reason])[
        [
            "stage",
            "unclassified_reason",
            "event_count",
            "measured_self_ns",
            "scaled_self_ns",
            "share_of_time",
            "meaning",
        ]
    ]


def expert_rows(modules: pd.DataFrame, attribution: pd.DataFrame) -> pd.DataFrame:
    """Calls and tokens of each expert of each layer, by stage; experts are modules named by a number in ``experts``.

    A prefill calls an expert once for all its tokens. How many these were stands in its predicted FLOPs, since they are
    computed with the routing that was measured: one token takes two for each parameter of a linear layer.
    """
    own = modules.join(modules["module_path"].str.extract(_EXPERT)).dropna(subset="expert")
    parameters = own.loc[own["module_class"] == "Linear"].groupby(["layer", "expert"])["parameter_count"].sum()
    work = attribution.merge(own[["module_path", "layer", "expert", "is_leaf"]], on="module_path")
    keys = ["stage", "layer", "expert"]
    flops = work.groupby(keys)["tensor_flops"].sum(min_count=1)
    calls = work.groupby(keys)["calls"].max()
    stages = calls[calls > 0].index.unique("stage")
    experts = own[["layer", "expert"]].drop_duplicates()
    rows = experts.merge(pd.DataFrame({"stage": stages}), how="cross").set_index(keys)
    rows = rows.assign(calls=calls, flops=flops).fillna({"calls": 0}).reset_index()
    per_token = 2 * parameters.reindex(pd.MultiIndex.from_frame(rows[["layer", "expert"]])).to_numpy()
    # Experts that nothing reached are not in the ledger; where nothing is predicted no expert has FLOPs.
    is_known = rows["flops"].notna().groupby(rows["stage"]).transform("any")
    tokens = (rows["flops"].fillna(0) / per_token).round().where(is_known)
    return rows.assign(expert=rows["expert"].astype("int64"), calls=rows["calls"].astype("int64"), tokens=tokens)[
        ["stage", "layer", "expert", "calls", "tokens"]
    ]


def memory_rows(memory: pd.DataFrame) -> pd.DataFrame:
    """One row per stage: weights of its modules, the largest activation of one, and growth of the cache, in bytes."""
    how = {name: "max" if "peak" in name else "sum" for name in memory if name.endswith("_bytes")}
    groups = memory.groupby("stage", sort=False)
    rows = {name: groups[name].max() if kind == "max" else groups[name].sum(min_count=1) for name, kind in how.items()}
    return pd.DataFrame(rows).reset_index()


def stage_totals(pages: pd.DataFrame) -> pd.DataFrame:
    """One row per stage, all pages together; ``idle_ns`` is wall time without work on the device."""
    times = ["wall_ns", "scaled_ns", "predicted_ns", "predicted_device_ns"]
    rows = pages.loc[pages["page"] == TOTAL, ["stage", "forwards", "profiled_forwards", *times, "tensor_flops"]]
    return rows.assign(idle_ns=rows["wall_ns"] - rows["scaled_ns"])


def gap_rows(gap: pd.DataFrame) -> pd.DataFrame:
    """One row per stage: everything between the datasheet and the clock."""
    sums = [*GAP_PARTS, "predicted_device_ns", "measured_ns"]
    return gap.groupby("stage", sort=False)[sums].sum(min_count=1).reset_index()


def main_source(predictions: pd.DataFrame) -> str | None:
    """Where most of the predicted time is from; None where nothing is predicted."""
    shares = source_shares(predictions)
    return max(shares, key=shares.__getitem__, default=None)


def source_shares(predictions: pd.DataFrame) -> dict[str, float]:
    """Share of the predicted device time by what it is from (`predictions.source`)."""
    times = predictions.groupby("source")["predicted_device_ns"].sum()
    return {str(source): float(ns / times.sum()) for source, ns in times.items() if ns}


def roofs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ceilings that points of a roofline stand below, each with what it is from; the highest first."""
    hardware, prediction = manifest["hardware"], manifest.get("prediction", {})
    found = [(hardware["name"], hardware["provenance"], hardware)]
    if "tensor_flops_per_s" in prediction and prediction["source"] == "calibrated":
        found.append((prediction["device"], "calibrated", prediction))
    ceilings = ("tensor_flops_per_s", "memory_bytes_per_s")
    return [
        {"name": name, "source": source} | {ceiling: figures[ceiling] for ceiling in ceilings}
        for name, source, figures in found
    ]
