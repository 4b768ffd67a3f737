"""What a backtest predicts, from the calibration of the device alone. Needs no torch, and sees no run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pandas as pd

from analytic.predict import module_rows, predict
from analytic.timing.workload import SAMPLING

if TYPE_CHECKING:
    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.routing import Plan, Routing
    from analytic.timing.calibration import Calibration
    from analytic.workload import Workload

#: What the parts of the model build on each other, each from the one before:
#: ceilings of the datasheet; ceilings of the calibration; the operators' own curves; and the host around them.
LEVELS: Final = ("datasheet_ns", "roof_ns", "device_ns", "predicted_ns")
#: The last of them again, told what the routers chose.
ROUTED: Final = "routed_ns"
KEY: Final = ["stage", "module_path", "module_class"]


def predict_trial(
    model: Model,
    workload: Workload,
    calibration: Calibration,
    policy: Policy,
    *,
    routing: Routing | Plan = "balanced",
) -> pd.DataFrame:
    """Predict what every module spends itself.

    Parameters
    ----------
    model
        Which model.
    workload
        Page, prompt and number of new tokens.
    calibration
        The device as it was measured.
    policy
        How the model runs.
    routing
        Tokens per expert. The router's choices are not known before a run.

    Returns
    -------
    pandas.DataFrame
        One row per stage and module that is called: `KEY`, `LEVELS`, and `extrapolated_ns`, the device's time beyond
        the calibrated sizes; all in whole ns.
    """
    classes = {node.module_path: node.module_class for node in model.tree}
    prediction = predict(model, workload, device=calibration, policy=policy, routing=routing)
    own = [(row.stage, row.module_path, row) for row in module_rows(prediction)]
    outside = [(stage, SAMPLING, part.times) for stage, part in prediction.sampling.items()]
    rows = [
        {
            "stage": stage,
            "module_path": path,
            "module_class": classes.get(path, path),
            "datasheet_ns": times.datasheet_ns,
            "roof_ns": times.roof_ns,
            "device_ns": times.predicted_device_ns,
            "predicted_ns": times.predicted_ns,
            "extrapolated_ns": times.extrapolated_ns,
        }
        for stage, path, times in (*own, *outside)
    ]
    return pd.DataFrame(rows)
