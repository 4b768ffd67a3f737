"""Where the time goes between the datasheet and the clock, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pandas as pd

from hooks.attribution import UNCLASSIFIED
from hooks.tables import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Predicted, each on top of those before it; together the predicted device time.
PREDICTED_PARTS: Final = ("datasheet_ns", "ceilings_ns", "launch_ns", "shape_ns")

_KEY: Final = ["stage", "module_path"]
_PREDICTED: Final = ["datasheet_ns", "roof_ns", "floor_ns", "predicted_device_ns"]


def gap_table(
    attribution: pd.DataFrame,
    calls: pd.DataFrame,
    predictions: pd.DataFrame,
    sampling: pd.DataFrame,
    walls: Mapping[str, int],
) -> pd.DataFrame:
    """Split the time of every module into what explains it.

    Parameters
    ----------
    attribution
        The ledger (`dsocr_trace.runs.ledger.attribution_table`).
    calls
        Calls of one traced generation per page (`hooks.tables.CALLS`).
    predictions
        Predicted self values (`dsocr_trace.runs.schemas.PREDICTIONS`), possibly empty.
    sampling
        Predicted times of the choice of tokens, by stage.
    walls
        Wall time of each stage in the generations of `calls`, in ns.

    Returns
    -------
    pandas.DataFrame
        Columns of `dsocr_trace.runs.schemas.GAP`. The predicted ones are null where nothing is predicted. The rows of a
        stage add up to its wall time.
    """
    modules = _of_modules(attribution, calls, predictions)
    rows = pd.concat([modules, _outside(attribution, sampling, walls, modules)], ignore_index=True)
    return rows.assign(
        ceilings_ns=rows["roof_ns"] - rows["floor_ns"] - rows["datasheet_ns"],
        launch_ns=rows["floor_ns"],
        shape_ns=rows["predicted_device_ns"] - rows["roof_ns"],
        unexplained_ns=rows["measured_ns"] - rows["predicted_device_ns"],
        host_gap_ns=rows["wall_self_ns"] - rows["measured_ns"],
    )


def _of_modules(attribution: pd.DataFrame, calls: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    named = attribution[attribution["module_path"] != UNCLASSIFIED]
    keys = pd.MultiIndex.from_frame(named[_KEY])
    # What is called but runs nothing is predicted to take no time; what no layer stands for is not predicted.
    is_predicted = pd.Series(named["predicted_self_ns"].notna().to_numpy(), keys)
    predicted = predictions.set_index(_KEY)[_PREDICTED].astype("float64").reindex(keys).fillna(0)
    walls = own_walls(calls).groupby([calls[name] for name in _KEY]).sum()
    rows = predicted.where(is_predicted, axis="index").assign(
        measured_ns=named["scaled_self_ns"].to_numpy(), wall_self_ns=walls.reindex(keys).fillna(0)
    )
    return rows.reset_index()


def own_walls(calls: pd.DataFrame) -> pd.Series:
    """Wall time of each call without the calls inside it, in ns."""
    wall = calls["end_ns"] - calls["start_ns"]
    inside = wall.groupby(calls["parent_call_id"]).sum()
    return wall - calls["call_id"].map(inside).fillna(0).astype("int64")


def _outside(
    attribution: pd.DataFrame, sampling: pd.DataFrame, walls: Mapping[str, int], modules: pd.DataFrame
) -> pd.DataFrame:
    """One row per stage for what is outside of modules."""
    stages = pd.Index([stage for stage in STAGES if stage in set(attribution["stage"])], name="stage")
    rest = attribution[attribution["module_path"] == UNCLASSIFIED]
    measured = rest.groupby("stage")["scaled_self_ns"].sum().reindex(stages).fillna(0)
    inside = modules.groupby("stage")["wall_self_ns"].sum().reindex(stages).fillna(0)
    predicted = sampling.reindex(index=stages, columns=_PREDICTED).astype("float64")
    if len(sampling):  # always, where anything is predicted
        predicted = predicted.fillna(0)
    return predicted.assign(
        module_path=UNCLASSIFIED, measured_ns=measured, wall_self_ns=pd.Series(walls).reindex(stages).fillna(0) - inside
    ).reset_index()
