"""Modules, and kinds of modules with what is between their time and the device's ceilings: what each could give."""

from __future__ import annotations

from typing import Final

import pandas as pd

from dsocr_trace.runs.ledger import rolled_up
from hooks.attribution import UNCLASSIFIED

_KEY: Final = ["stage", "module_path"]
_KIND: Final = ["stage", "kind", "module_class"]
_NUMBER: Final = r"\.\d+(?=\.|$)"
#: Columns of the run's gap table that are added up.
GAP_PARTS: Final = [
    "datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns", "unexplained_ns", "host_gap_ns", "wall_self_ns",
]  # fmt: skip
_WORK: Final = ["flops", "bytes"]
#: What stands between the ceilings of the device and the time of a module.
ABOVE_ROOF: Final = {
    "launch_ns": "launches",
    "shape_ns": "shapes",
    "unexplained_ns": "unexplained",
    "idle_ns": "host gap",
}


def module_rows(attribution: pd.DataFrame, predictions: pd.DataFrame, gap: pd.DataFrame) -> pd.DataFrame:
    """One row per (stage, module) of the ledger, with FLOPs, bytes and host time also summed over the modules below.

    Parameters
    ----------
    attribution, predictions, gap
        The run's tables; `gap` without rows if the run has none.
    """
    rows = attribution[attribution["module_path"] != UNCLASSIFIED].reset_index(drop=True)
    keys = pd.MultiIndex.from_frame(rows[_KEY])
    predicted = predictions.set_index(_KEY)[["predicted_ns", "bound", "source"]].reindex(keys)
    rows = rows.assign(
        flops=rows["tensor_flops"] + rows["vector_flops"],
        bytes=rows["bytes_total"],
        predicted_wall_ns=predicted["predicted_ns"].to_numpy(),
        bound=predicted["bound"].to_numpy(),
        source=predicted["source"].to_numpy(),
        **dict(gap.set_index(_KEY)[GAP_PARTS].astype("float64").reindex(keys).reset_index(drop=True).items()),
    )
    known = rows["predicted_total_ns"].notna()
    for name, column, where in (
        ("flops", "flops", known),
        ("bytes", "bytes", known),
        ("wall", "wall_self_ns", rows["wall_self_ns"].notna()),
    ):
        whole = rows.assign(own=rows[column].fillna(0).astype("int64"))
        rows[f"{name}_with_children"] = rolled_up(whole, "own").where(where)
    return rows[
        [
            *_KEY,
            "module_class",
            "parent_path",
            "calls",
            "event_count",
            "scaled_self_ns",
            "scaled_total_ns",
            "wall_total_ns",
            "wall_with_children",
            "predicted_self_ns",
            "predicted_total_ns",
            "predicted_wall_ns",
            "flops",
            "flops_with_children",
            "bytes",
            "bytes_with_children",
            "bound",
            "source",
            *GAP_PARTS,
        ]
    ]


def kind_rows(modules: pd.DataFrame, gap: pd.DataFrame) -> pd.DataFrame:
    """One row per stage and kind of module: own figures of all instances, and what they could give.

    A kind is a path whose numbers are taken for alike, ``layers.*.mlp``; what is outside of modules is one more. Kinds
    that took no time themselves are left out.

    Parameters
    ----------
    modules
        From `module_rows`.
    gap
        The run's table; without rows if it has none.

    Returns
    -------
    pandas.DataFrame
        Besides sums of the columns of `modules`: ``modules``, how many; ``bound``, what most of the predicted time
        waits for; ``roof_ns``, its work at the ceilings of the device (without a gap table the prediction);
        ``idle_ns``, its share of the time in which the device had nothing to do; ``excess_ns``, device time above the
        roof and that share: the most that it could give; ``intensity``, FLOPs per byte; and the rates achieved.
    """
    modules = modules.assign(kind=modules["module_path"].str.replace(_NUMBER, ".*", regex=True))
    sums = ["calls", "event_count", "scaled_self_ns", "predicted_self_ns", *_WORK, *GAP_PARTS]
    groups = modules.groupby(_KIND, sort=False)
    rows = groups[sums].sum(min_count=1).join(groups.size().rename("modules")).reset_index()
    weight = modules.groupby([*_KIND, "bound"])["predicted_wall_ns"].sum().reset_index()
    main = weight.sort_values("predicted_wall_ns").drop_duplicates(_KIND, keep="last")
    rows = rows.merge(main[[*_KIND, "bound"]], on=_KIND, how="left")
    rows = pd.concat([rows, _outside(gap)], ignore_index=True)
    seconds = rows["scaled_self_ns"].where(rows["scaled_self_ns"] > 0) / 1e9
    roof = (rows["datasheet_ns"] + rows["ceilings_ns"]).fillna(rows["predicted_self_ns"])
    rows = rows.assign(
        # Where nothing is predicted the columns hold nothing at all, and have no number's type by themselves.
        roof_ns=roof.astype("float64"),
        idle_ns=_idle(rows),
        intensity=rows["flops"] / rows["bytes"].where(rows["bytes"] > 0),
        achieved_flops_per_s=rows["flops"] / seconds,
        achieved_bytes_per_s=rows["bytes"] / seconds,
    )
    above = (rows["scaled_self_ns"] - rows["roof_ns"]).clip(lower=0)
    rows = rows.assign(excess_ns=above + rows["idle_ns"].fillna(0))
    took = (rows["scaled_self_ns"] > 0) | (rows["idle_ns"] > 0)
    return rows[took].sort_values("scaled_self_ns", ascending=False, kind="stable")


def _outside(gap: pd.DataFrame) -> pd.DataFrame:
    """What is outside of modules as one more kind of each stage."""
    rows = gap[gap["module_path"] == UNCLASSIFIED]
    return pd.DataFrame(
        {
            "stage": rows["stage"],
            "kind": UNCLASSIFIED,
            "module_class": "outside every module",
            "modules": 1,
            "scaled_self_ns": rows["measured_ns"],
            "predicted_self_ns": rows["predicted_device_ns"],
            **{name: rows[name] for name in GAP_PARTS},
        }
    )


def _idle(kinds: pd.DataFrame) -> pd.Series:
    """Share out the time in which the device had nothing to do.

    That is what is left of a stage's wall time. A call that waits for the device also takes host time; so the host time
    beyond each kind's device time only says in which proportion.
    """
    beyond = kinds["host_gap_ns"].clip(lower=0)
    groups = kinds["stage"]
    idle = kinds["host_gap_ns"].groupby(groups).transform("sum").clip(lower=0)
    whole = beyond.groupby(groups).transform("sum")
    return beyond * idle / whole.where(whole > 0)


def targets(kinds: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Kinds that could give most, with ``cause``, the largest of `ABOVE_ROOF`; empty where nothing is known."""
    rows = kinds.dropna(subset="excess_ns").nlargest(limit, "excess_ns")
    parts = rows[list(ABOVE_ROOF)].astype("float64")
    largest = parts.where(parts > 0).dropna(how="all").idxmax(axis=1).map(ABOVE_ROOF)
    return rows.assign(cause=largest.reindex(rows.index))
