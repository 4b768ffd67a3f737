"""Records of a run turned into the rows of a report. Numbers keep their base units; rendering converts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import pandas as pd

from hooks.attribution import UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES: Final = ("vision", "prefill", "decode")


@attrs.frozen
class StageRow:
    """One stage, over all pages.

    Attributes
    ----------
    wall_ns
        Without a profiler.
    measured_ns
        Device time of the profiled forwards.
    scaled_ns
        The same, scaled to all forwards of the stage.
    predicted_ns, predicted_device_ns
        To set beside `wall_ns` and beside `scaled_ns`.
    mfu
        Model FLOP utilisation: matrix FLOPs over what the hardware entry's peak does in the wall time.
    """

    stage: str
    wall_ns: int
    measured_ns: int
    scaled_ns: int
    predicted_ns: int | None
    predicted_device_ns: int | None
    tensor_flops: int | None
    calls: int
    event_count: int
    mfu: float | None


def stage_rows(manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[StageRow]:
    """Stages in the order in which they run."""
    attribution, pages = tables["attribution"], tables["pages"]
    totals = pages[pages["page"] == "total"].set_index("stage")
    peak = manifest["hardware"]["tensor_flops_per_s"]
    rows = []
    for stage in STAGES:
        mine = attribution[attribution["stage"] == stage]
        wall, flops = int(totals.loc[stage, "wall_ns"]), _whole(totals.loc[stage, "tensor_flops"])
        rows.append(
            StageRow(
                stage=stage,
                wall_ns=wall,
                measured_ns=int(mine["measured_self_ns"].sum()),
                scaled_ns=int(mine["scaled_self_ns"].sum()),
                predicted_ns=_whole(totals.loc[stage, "predicted_ns"]),
                predicted_device_ns=_whole(totals.loc[stage, "predicted_device_ns"]),
                tensor_flops=flops,
                calls=int(mine["calls"].sum()),
                event_count=int(mine["event_count"].sum()),
                mfu=None if flops is None or not wall else flops * 1e9 / (wall * peak),
            )
        )
    return rows


def _whole(value: float | None) -> int | None:
    return None if value is None or pd.isna(value) else int(value)


@attrs.frozen
class CostRow:
    """Something that took time: a module, a module class, an operator category or an event name."""

    stage: str
    name: str
    kind: str
    count: int
    scaled_ns: int
    share: float
    predicted_ns: int | None


def top_modules(attribution: pd.DataFrame, limit: int) -> list[CostRow]:
    """Modules by their own time, scaled to the whole stage."""
    named = attribution[attribution["module_path"] != UNCLASSIFIED]
    return _top(named, limit, whole=int(attribution["scaled_self_ns"].sum()), name="module_path", kind="module_class")


def top_classes(attribution: pd.DataFrame, limit: int) -> list[CostRow]:
    """Module classes by the own time of all their instances."""
    named = attribution[attribution["module_path"] != UNCLASSIFIED]
    summed = named.groupby(["stage", "module_class"], as_index=False)[
        ["calls", "scaled_self_ns", "predicted_self_ns"]
    ].sum(min_count=1)
    instances = named[named["calls"] > 0].groupby(["stage", "module_class"]).size()
    keys = summed.set_index(["stage", "module_class"]).index
    summed["instances"] = instances.reindex(keys).fillna(0).astype(int).astype(str).to_numpy() + " instances"
    whole = int(attribution["scaled_self_ns"].sum())
    return _top(summed, limit, whole=whole, name="module_class", kind="instances")


def _top(rows: pd.DataFrame, limit: int, *, whole: int, name: str, kind: str) -> list[CostRow]:
    largest = rows.nlargest(limit, "scaled_self_ns")
    return [
        CostRow(
            stage=row["stage"],
            name=row[name] or "(root)",
            kind=row[kind],
            count=int(row["calls"]),
            scaled_ns=int(row["scaled_self_ns"]),
            share=row["scaled_self_ns"] / whole,
            predicted_ns=_whole(row["predicted_self_ns"]),
        )
        for _, row in largest.iterrows()
    ]


def top_operators(operators: pd.DataFrame, limit: int) -> list[CostRow]:
    """Operator categories by stage."""
    summed = operators.groupby(["stage", "operator_category"], as_index=False)[
        ["event_count", "scaled_ns", "predicted_ns"]
    ].sum(min_count=1)
    whole = int(summed["scaled_ns"].sum())
    return [
        CostRow(
            stage=row["stage"],
            name=row["operator_category"],
            kind="category",
            count=int(row["event_count"]),
            scaled_ns=int(row["scaled_ns"]),
            share=row["scaled_ns"] / whole,
            predicted_ns=_whole(row["predicted_ns"]),
        )
        for _, row in summed.nlargest(limit, "scaled_ns").iterrows()
    ]


def top_events(kernels: pd.DataFrame, limit: int) -> list[CostRow]:
    """Kernels (on a CPU: ATen operators, self time) by name and stage; events carry ``scaled_ns``."""
    groups = kernels.groupby(["stage", "name", "kind"])["scaled_ns"].agg(["sum", "size"]).reset_index()
    whole = groups["sum"].sum()
    return [
        CostRow(
            stage=row["stage"],
            name=row["name"],
            kind=row["kind"],
            count=int(row["size"]),
            scaled_ns=round(row["sum"]),
            share=row["sum"] / whole,
            predicted_ns=None,
        )
        for _, row in groups.nlargest(limit, "sum").iterrows()
    ]


def memory_by_stage(memory: pd.DataFrame) -> list[tuple[str, int, int, int]]:
    """Predicted (stage, weights of the called modules, largest activation of one module, cache written), bytes."""
    groups = memory.groupby("stage", sort=False)
    return [
        (
            str(stage),
            int(rows["predicted_weight_bytes"].sum()),
            int(rows["predicted_activation_peak_bytes"].max()),
            int(rows["predicted_kv_cache_bytes"].sum()),
        )
        for stage, rows in groups
    ]


def summary(run_dir: str, manifest: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The machine-readable summary of a run."""
    return {
        "run_dir": run_dir,
        "coverage": manifest["coverage"]["all"],
        "overhead_ratio": manifest["overhead"]["ratio"],
        "stages": {
            row.stage: attrs.asdict(row, filter=lambda field, _: field.name != "stage")
            for row in stage_rows(manifest, tables)
        },
        "unclassified": {
            reason: {"count": entry["count"], "ns": entry["ns"]} for reason, entry in manifest["unclassified"].items()
        },
        "tokens": manifest["pages"][0]["tokens"],
        "pages": [{"name": page["name"], "tokens": page["tokens"]} for page in manifest["pages"]],
    }
