"""Modules that no layer of the analytic model stands for: how many, and how much of the run they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.families.base import OTHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


def unmapped_paths(modules: pd.DataFrame) -> list[str]:
    """Paths of the modules for which nothing is predicted."""
    return list(modules.loc[modules["analytic_layer"] == OTHER, "module_path"])


def unmapped_classes(modules: pd.DataFrame, attribution: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Classes of the modules for which nothing is predicted.

    Parameters
    ----------
    modules
        The module tree (`dsocr_trace.runs.schemas.MODULES`).
    attribution
        The ledger (`dsocr_trace.runs.schemas.ATTRIBUTION`).

    Returns
    -------
    dict
        For each class ``modules``, their number; ``parameter_share``, of the model's parameters; and
        ``measured_share``, of all measured time.
    """
    parameters, measured = modules["parameter_count"].sum(), attribution["measured_self_ns"].sum()
    other = modules[modules["analytic_layer"] == OTHER]
    own_time = attribution.groupby("module_path")["measured_self_ns"].sum()
    return {
        str(name): {
            "modules": len(mine),
            "parameter_share": float(mine["parameter_count"].sum() / parameters),
            "measured_share": float(own_time.reindex(mine["module_path"]).sum() / measured),
        }
        for name, mine in other.groupby("module_class", sort=False)
    }


def unmapped_note(classes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the reader must know of them; empty if there are none."""
    if not classes:
        return []
    modules, parameters, measured = (
        sum(entry[name] for entry in classes.values()) for name in ("modules", "parameter_share", "measured_share")
    )
    note = (
        f"no formula stands for {modules} modules of {', '.join(classes)} ({OTHER}): "
        f"{parameters:.2%} of the parameters and {measured:.2%} of the measured time are without a prediction"
    )
    return [note]
