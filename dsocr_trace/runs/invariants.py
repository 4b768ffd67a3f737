"""What must hold in every run: nothing measured is lost or counted twice, and the parts add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analytic.errors import DsocrTraceError
from dsocr_trace.runs.gap import PREDICTED_PARTS
from dsocr_trace.runs.pages import TOTAL
from hooks.attribution import REASONS, UNCLASSIFIED

if TYPE_CHECKING:
    from collections.abc import Mapping


class BrokenInvariantError(DsocrTraceError):
    """The run contradicts itself, so it is not written."""


def check_run(tables: Mapping[str, pd.DataFrame], model_flops: Mapping[str, int] | None) -> dict[str, dict[str, int]]:
    """Check the invariants of a run.

    Parameters
    ----------
    tables
        The run's tables by name: ``attribution``, ``kernels``, ``gap`` and ``pages``.
    model_flops
        Tensor and vector FLOPs of each predicted stage, summed over the whole model in one go; None where nothing
        is predicted.

    Returns
    -------
    dict
        For each stage the conserved sums: ``events``, ``event_ns``, and ``flops`` where predicted.

    Raises
    ------
    BrokenInvariantError
        If one does not hold; names it and the first place.
    """
    attribution, kernels = tables["attribution"], tables["kernels"]
    sums = check_conservation(attribution, kernels)
    check_totals(attribution)
    check_gap(tables["gap"], attribution, tables["pages"])
    for stage, flops in (model_flops or {}).items():
        mine = attribution[attribution["stage"] == stage]
        found = int(mine["tensor_flops"].fillna(0).sum() + mine["vector_flops"].fillna(0).sum())
        if found != flops:
            raise BrokenInvariantError(f"stage {stage}: the modules' FLOPs sum to {found}, the model's are {flops}")
        sums.setdefault(stage, {})["flops"] = flops
    return sums


def _check_one_place(kernels: pd.DataFrame) -> None:
    has_call, reason = kernels["call_id"].notna(), kernels["unclassified_reason"]
    wrong = kernels[has_call == reason.notna()]
    if len(wrong):
        raise BrokenInvariantError(
            f"{len(wrong)} events have both a call and an unclassified reason, or neither; "
            f"the first is event {wrong['event_id'].iloc[0]}"
        )
    unknown = set(reason.dropna().unique()) - REASONS.keys()
    if unknown:
        raise BrokenInvariantError(f"unknown unclassified reason {min(unknown)!r}")


def check_conservation(attribution: pd.DataFrame, kernels: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Check that each event has one place, and that the ledger adds up to them; gives the sums of each stage.

    Raises
    ------
    BrokenInvariantError
        If not.
    """
    _check_one_place(kernels)
    sums = {}
    for stage in sorted({*attribution["stage"], *kernels["stage"]}):
        rows, events = attribution[attribution["stage"] == stage], kernels[kernels["stage"] == stage]
        for what, found, measured in (
            ("ns", int(rows["measured_self_ns"].sum()), int(events["duration_ns"].sum())),
            ("events", int(rows["event_count"].sum()), len(events)),
        ):
            if found != measured:
                raise BrokenInvariantError(f"stage {stage}: the ledger holds {found} {what}, measured were {measured}")
        sums[stage] = {"events": len(events), "event_ns": int(events["duration_ns"].sum())}
    return sums


def check_totals(attribution: pd.DataFrame) -> None:
    """Check that each module's total is its own time and its children's totals.

    Raises
    ------
    BrokenInvariantError
        If not.
    """
    named = attribution[attribution["module_path"] != UNCLASSIFIED]
    children = named.groupby(["stage", "parent_path"])["measured_total_ns"].sum()
    keys = pd.MultiIndex.from_frame(named[["stage", "module_path"]])
    below = children.reindex(keys).fillna(0).to_numpy()
    wrong = named[named["measured_total_ns"] != named["measured_self_ns"] + below]
    if len(wrong):
        first = wrong.iloc[0]
        raise BrokenInvariantError(
            f"stage {first['stage']}: the total of module {first['module_path']!r} is "
            f"{first['measured_total_ns']} ns, its own time and its children's totals are another sum"
        )
    # Roots hold everything, so no row hangs from a parent that has none.
    roots = int(named.loc[named["parent_path"].isna(), "measured_total_ns"].sum())
    if roots != int(named["measured_self_ns"].sum()):
        raise BrokenInvariantError("the root's total is not the sum of all modules' own time")


def check_gap(gap: pd.DataFrame, attribution: pd.DataFrame, pages: pd.DataFrame) -> None:
    """Check that the parts of each module's time add up, and that they are the ledger's and the stages' times.

    Raises
    ------
    BrokenInvariantError
        If not.
    """
    sums = {
        "predicted_device_ns": gap[list(PREDICTED_PARTS)].sum(axis="columns", skipna=False),
        "measured_ns": gap["predicted_device_ns"] + gap["unexplained_ns"],
        "wall_self_ns": gap["measured_ns"] + gap["host_gap_ns"],
    }
    for name, parts in sums.items():
        # Where nothing is predicted there are no parts.
        wrong = gap[parts.notna() & (parts != gap[name])]
        if len(wrong):
            first = wrong.iloc[0]
            raise BrokenInvariantError(
                f"stage {first['stage']}: the parts of {name} of {first['module_path']!r} sum to another number"
            )
    totals = pages[pages["page"] == TOTAL].set_index("stage")["predicted_device_ns"]
    for stage, rows in gap.groupby("stage"):
        ledger = attribution[attribution["stage"] == stage]
        expected = {"measured_ns": ledger["scaled_self_ns"].sum(), "predicted_device_ns": totals.get(stage, 0)}
        for name, whole in expected.items():
            found = rows[name].sum()
            if found != whole and pd.notna(whole):
                raise BrokenInvariantError(f"stage {stage}: the gap holds {found} of {name}, the stage has {whole}")
