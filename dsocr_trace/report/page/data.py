"""Tables of a run turned into what the page shows. Numbers keep their base units; the page converts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from dsocr_trace.report.page.callgraph import folded_calls
from dsocr_trace.runs.ledger import rolled_up
from dsocr_trace.runs.pages import TOTAL
from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

#: More rows than this would make the page heavy; the largest are kept, and the page says how many are missing.
MOST_ROWS: Final = {"modules": 8_000, "kernels": 2_000}

_KIND: Final = ["stage", "kind", "module_class"]
_NUMBER: Final = r"\.\d+(?=\.|$)"
_EXPERT: Final = r"^(?P<layer>.+)\.experts\.(?P<expert>\d+)$"


def page_data(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """All that the page's charts and tables show.

    Parameters
    ----------
    manifest
        The run's manifest.
    tables
        The run's tables by name; ``kernels`` with ``scaled_ns``.

    Returns
    -------
    dict
        ``hardware``: the ceilings; ``tables``: per name a dict of columns, each a list; ``left_out``: per name how many
        rows the page does not hold.
    """
    modules = module_rows(tables["attribution"], tables["predictions"])
    kernels = kernel_rows(tables["kernels"])
    frames = {
        "modules": _largest(modules, "scaled_total_ns", MOST_ROWS["modules"]),
        "kinds": kind_rows(modules),
        "operators": operator_rows(tables["operators"]),
        "kernels": _largest(kernels, "scaled_ns", MOST_ROWS["kernels"]),
        "unclassified": unclassified_rows(tables["attribution"], manifest["unclassified"]),
        "calls": folded_calls(tables["callgraph"]),
        "experts": expert_rows(tables["modules"], tables["attribution"]),
        "memory": memory_rows(tables["memory"]),
        "stages": stage_totals(tables["pages"]),
    }
    whole = {"modules": len(modules), "kernels": len(kernels)}
    return {
        "hardware": manifest["hardware"],
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


def module_rows(attribution: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per (stage, module): the ledger's figures, with FLOPs and bytes also summed over the modules below."""
    rows = attribution[attribution["module_path"] != UNCLASSIFIED].reset_index(drop=True)
    bound = predictions.set_index(["stage", "module_path"])["bound"]
    rows = rows.assign(
        flops=rows["tensor_flops"] + rows["vector_flops"],
        bytes=rows["bytes_total"],
        bound=bound.reindex(pd.MultiIndex.from_frame(rows[["stage", "module_path"]])).to_numpy(),
    )
    for name in ("flops", "bytes"):
        known = rows.assign(own=rows[name].fillna(0).astype("int64"))
        rows[f"{name}_with_children"] = rolled_up(known, "own").where(rows["predicted_total_ns"].notna())
    return rows[
        [
            "stage",
            "module_path",
            "module_class",
            "parent_path",
            "calls",
            "event_count",
            "scaled_self_ns",
            "scaled_total_ns",
            "wall_total_ns",
            "predicted_self_ns",
            "predicted_total_ns",
            "flops",
            "flops_with_children",
            "bytes",
            "bytes_with_children",
            "bound",
        ]
    ]


def kind_rows(modules: pd.DataFrame) -> pd.DataFrame:
    """One row per stage and kind of module: own figures of all instances, and how far they are from the prediction.

    A kind is a path whose numbers are taken for alike, ``layers.*.mlp``. ``excess_ns`` is measured time beyond the
    predicted; ``intensity`` is FLOPs per byte; ``bound`` is what most of the predicted time is bound by. Kinds that did
    nothing themselves are left out.
    """
    modules = modules.assign(kind=modules["module_path"].str.replace(_NUMBER, ".*", regex=True))
    sums = ["calls", "event_count", "scaled_self_ns", "predicted_self_ns", "flops", "bytes"]
    groups = modules.groupby(_KIND, sort=False)
    rows = groups[sums].sum(min_count=1).join(groups.size().rename("modules")).reset_index()
    weight = modules.groupby([*_KIND, "bound"])["predicted_self_ns"].sum().reset_index()
    main = weight.sort_values("predicted_self_ns").drop_duplicates(_KIND, keep="last")
    rows = rows.merge(main[[*_KIND, "bound"]], on=_KIND, how="left")
    seconds = rows["scaled_self_ns"].where(rows["scaled_self_ns"] > 0) / 1e9
    rows = rows.assign(
        # Where nothing is predicted the column holds nothing at all, and has no number's type by itself.
        excess_ns=(rows["scaled_self_ns"] - rows["predicted_self_ns"]).astype("float64").clip(lower=0),
        intensity=rows["flops"] / rows["bytes"].where(rows["bytes"] > 0),
        achieved_flops_per_s=rows["flops"] / seconds,
        achieved_bytes_per_s=rows["bytes"] / seconds,
    )
    return rows[rows["scaled_self_ns"] > 0].sort_values("scaled_self_ns", ascending=False)


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
    """Calls of each expert of each layer, by stage; experts are the modules named by a number below ``experts``."""
    parts = modules["module_path"].str.extract(_EXPERT)
    experts = parts.assign(module_path=modules["module_path"]).dropna()
    calls = attribution.loc[attribution["module_path"].isin(experts["module_path"]), ["stage", "module_path", "calls"]]
    stages = calls.loc[calls["calls"] > 0, "stage"].drop_duplicates()
    rows = experts.merge(stages, how="cross").merge(calls, on=["stage", "module_path"], how="left")
    return rows.assign(expert=rows["expert"].astype("int64"), calls=rows["calls"].fillna(0).astype("int64"))[
        ["stage", "layer", "expert", "calls"]
    ]


def memory_rows(memory: pd.DataFrame) -> pd.DataFrame:
    """One row per stage: weights of its modules, the largest activation of one, and growth of the cache, in bytes."""
    how = {name: "max" if "peak" in name else "sum" for name in memory if name.endswith("_bytes")}
    groups = memory.groupby("stage", sort=False)
    rows = {name: groups[name].max() if kind == "max" else groups[name].sum(min_count=1) for name, kind in how.items()}
    return pd.DataFrame(rows).reset_index()


def stage_totals(pages: pd.DataFrame) -> pd.DataFrame:
    """One row per stage, all pages together; ``gap_ns`` is wall time without work on the device."""
    rows = pages.loc[
        pages["page"] == TOTAL,
        ["stage", "forwards", "profiled_forwards", "wall_ns", "scaled_ns", "predicted_ns", "tensor_flops"],
    ]
    return rows.assign(gap_ns=rows["wall_ns"] - rows["scaled_ns"])
