"""Predicted cost of the pages that were measured, as frames in the shape of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import pandas as pd

from analytic.cost import COST_COLUMNS, MODEL_DTYPES
from analytic.families.base import OTHER
from analytic.predict import TIME_COLUMNS, category_rows, module_rows, predict, stage_rows
from analytic.routing import Routing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from analytic.layers.base import Policy
    from analytic.model import Model
    from analytic.predict import Prediction
    from analytic.timing.calibration import Calibration
    from stage_runners.measurement import PageMeasurement, RoutingCounts

_SUMS = ["calls", *COST_COLUMNS, *TIME_COLUMNS]


@attrs.frozen(eq=False)
class PredictedRun:
    """What the analytic engine says about all pages of a run together.

    Attributes
    ----------
    modules
        Self values per (stage, module): `dsocr_trace.runs.schemas.PREDICTIONS`.
    categories
        Self values per (stage, module, operator category): predicted_ns (the device's time), flops, bytes.
    stages
        For each page and stage the sums over the model.
    sampling
        Times of the choice of tokens, outside every module: `analytic.predict.TIME_COLUMNS` by stage.
    layers
        Analytic layer of each module path, or ``other``.
    weights
        Bytes of the parameters that each module path owns itself.
    """

    modules: pd.DataFrame
    categories: pd.DataFrame
    stages: pd.DataFrame
    sampling: pd.DataFrame
    layers: Mapping[str, str]
    weights: dict[str, int]

    def model_flops(self) -> dict[str, int]:
        """FLOPs of the whole model by stage, summed over operators rather than modules."""
        sums = self.stages.groupby("stage")[["tensor_flops", "vector_flops"]].sum().sum(axis=1)
        return {str(stage): int(flops) for stage, flops in sums.items()}


def predict_pages(
    model: Model,
    pages: Sequence[PageMeasurement],
    *,
    calibration: Calibration,
    policy: Policy,
    layers: Mapping[str, str],
) -> PredictedRun:
    """Predict every page with its measured routing and its real length, and add them up.

    Nothing is predicted for modules that no layer stands for.

    Parameters
    ----------
    model
        Which model.
    pages
        What ran.
    calibration
        Device to predict for.
    policy
        How the model ran.
    layers
        Layer that stands for each live module, by path (`analytic.families.base.ModelFamily.mapped`).
    """
    modules, categories, stages, sampling = [], [], [], []
    for number, page in enumerate(pages):
        prediction = predict(
            model,
            page.workload,
            device=calibration,
            policy=policy,
            routing=measured_routing(page.routing),
            new_tokens=len(page.tokens),
        )
        prediction = _of_known(prediction, layers)
        modules.append(pd.DataFrame(attrs.asdict(row) for row in module_rows(prediction)))
        categories.append(pd.DataFrame(attrs.asdict(row) for row in category_rows(prediction)))
        stages.append(pd.DataFrame(attrs.asdict(row) for row in stage_rows(prediction)).assign(page=number))
        sampling += [{"stage": stage, **attrs.asdict(part.times)} for stage, part in prediction.sampling.items()]
    key = ["stage", "module_path"]
    by_time = pd.concat(modules).sort_values("predicted_ns", kind="stable")
    merged = by_time.groupby(key, sort=False).agg(
        dict.fromkeys(_SUMS, "sum") | {"activation_peak_bytes": "max", "bound": "last", "source": "last"}
    )
    by_category = pd.concat(categories).groupby([*key, "operator_category"], sort=False)
    return PredictedRun(
        modules=merged.reset_index(),
        categories=by_category[["predicted_ns", "flops", "bytes"]].sum().reset_index(),
        stages=pd.concat(stages),
        sampling=pd.DataFrame(sampling, columns=["stage", *TIME_COLUMNS]).groupby("stage").sum(),
        layers=layers,
        weights={node.module_path: node.parameter_count * MODEL_DTYPES[policy.dtype].bytes for node in model.tree},
    )


def _of_known(prediction: Prediction, layers: Mapping[str, str]) -> Prediction:
    """The prediction without the modules that no layer stands for."""
    known = {path for path, layer in layers.items() if layer != OTHER}
    calls = {key: count for key, count in prediction.work.calls.items() if key[1] in known}
    return attrs.evolve(
        prediction,
        work=attrs.evolve(prediction.work, calls=calls),
        operations=tuple(row for row in prediction.operations if row.operation.module_path in known),
        module_calls={key: prediction.module_calls[key] for key in calls},
    )


def nothing_predicted(layers: Mapping[str, str]) -> PredictedRun:
    """For a model that lacks modules which the formulas are for; `layers` stand for those that it has."""
    columns = ["stage", "module_path", *_SUMS, "activation_peak_bytes", "bound", "source"]
    return PredictedRun(
        modules=pd.DataFrame(columns=columns),
        categories=pd.DataFrame(
            columns=["stage", "module_path", "operator_category", "predicted_ns", "flops", "bytes"]
        ),
        stages=pd.DataFrame(columns=["page", *columns, "predicted_wall_ns", "predicted_busy_ns"]),
        sampling=pd.DataFrame(columns=TIME_COLUMNS),
        layers=layers,
        weights={},
    )


def measured_routing(counts: RoutingCounts) -> Routing:
    """Routing for the analytic engine, by layer index instead of module path."""

    def by_layer(paths: Iterable[str]) -> dict[int, str]:
        return {int(path.split(".")[2]): path for path in paths}

    return Routing(
        prefill={layer: counts.prefill[path][np.newaxis] for layer, path in by_layer(counts.prefill).items()},
        decode={layer: counts.decode[path] for layer, path in by_layer(counts.decode).items()},
        source="measured",
    )
