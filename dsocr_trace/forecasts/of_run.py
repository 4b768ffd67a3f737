"""The prediction of a finished run, evaluated again from what the run stores. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from analytic.config import variant_config
from analytic.cost import COST_COLUMNS
from analytic.errors import InputError
from analytic.families.registry import read_checkpoint
from analytic.hardware import Figure, Hardware
from analytic.layers.base import Policy
from analytic.model import Model, deepseek_ocr
from analytic.predict import TIME_COLUMNS, predict
from analytic.routing import Routing
from analytic.timing.datasheet import from_datasheet
from analytic.whatif import Scenario
from analytic.workload import Workload
from dsocr_trace.forecasts.forecast import Forecast
from dsocr_trace.machine.calibrations import load_calibration
from dsocr_trace.machine.devices import load_device
from dsocr_trace.runs.many import other_version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from analytic.predict import ModuleRow
    from analytic.routing import Counts
    from analytic.timing.calibration import Calibration
    from dsocr_trace.runs.store import Run

_EXPERT: Final = "RoutedExpert"
_FROM_PREDICTIONS: Final = (
    "prefill: the tokens of each expert are the measured ones, read back from the run's predictions table"
)
_FROM_CALLS: Final = "decode: the tokens of each expert are the measured ones, read back from the experts' calls"
_GONE: Final = (
    "the run's calibration is not found any more ({why}), so times are from the hardware entry that the run stores; "
    "for others give a calibration with --hardware"
)
_BALANCED: Final = "{stage}: the run does not store the tokens of each expert, so balanced routing stands for them here"


@attrs.frozen
class Measured:
    """What the events of one module took, itself, in one stage of one page.

    Attributes
    ----------
    event_count
        Events of the profiled forwards.
    measured_ns
        Their summed duration.
    scaled_ns
        The same, scaled to all forwards of the stage.
    """

    event_count: int
    measured_ns: int
    scaled_ns: int


@attrs.frozen(eq=False)
class RunForecast:
    """What is predicted of one page of a run.

    Attributes
    ----------
    run
        The run.
    page
        Number of the page, from 0.
    forecast
        Its prediction.
    is_again
        Whether it is for the device that the run was predicted for, from the same figures.
    notes
        Where its routing is from, and its times if not from where the run's were.
    """

    run: Run
    page: int
    forecast: Forecast
    is_again: bool
    notes: tuple[str, ...]

    def measured(self, module_path: str, stage: str) -> Measured:
        """What was measured of a module itself."""
        kernels = self.run.kernels
        here = (kernels["module_path"] == module_path) & kernels["unclassified_reason"].isna()
        mine = kernels[here & (kernels["stage"] == stage) & (kernels["page"] == self.page)]
        pages = self.run.pages
        (row,) = pages[(pages["page_number"] == self.page) & (pages["stage"] == stage)].to_dict("records")
        took, profiled = int(mine["duration_ns"].sum()), int(row["profiled_forwards"])
        scaled = round(took * int(row["forwards"]) / profiled) if profiled else took
        return Measured(len(mine), took, scaled)

    def differences(self, row: ModuleRow) -> list[str] | None:
        """Columns in which a row is not what the run's own table says; None where that one sums several pages."""
        if len(self.run.manifest["pages"]) > 1:
            return None
        table = self.run.predictions
        here = (table["module_path"] == row.module_path) & (table["stage"] == row.stage)
        stored = table[here].to_dict("records")
        columns = ["calls", *COST_COLUMNS, *(TIME_COLUMNS if self.is_again else ())]
        return [name for name in columns if not stored or int(stored[0][name]) != getattr(row, name)]


def run_forecast(run: Run, *, page: int | None = None, hardware: str | None = None) -> RunForecast:
    """Predict one page of a run again, with its measured routing as far as the run stores it.

    Parameters
    ----------
    run
        The run.
    page
        Number of the page, from 0; may be left out where there is only one.
    hardware
        Device to predict for: an entry, its file, or a calibration; that of the run if not given.

    Raises
    ------
    InputError
        If the run is of another schema version, has no such page or no prediction, or its model or device cannot be
        found again.
    """
    problem = other_version(run)
    if problem:
        raise InputError(problem)
    if run.predictions.empty:
        raise InputError(f"nothing is predicted in run {run.path}, so there is nothing to explain; see its notes")
    number = _page_number(run, page)
    model, workload = _model(run), _workload(run.manifest, number)
    policy = Policy(dtype=run.manifest["dtype"], attention=run.manifest["attention"])
    device, gone = _stored_device(run) if hardware is None else (load_device(hardware), ())
    routing, notes = _routing(run, model, workload, number)
    prediction = predict(model, workload, device=device, policy=policy, routing=routing)
    forecast = Forecast(Scenario(workload, policy), device, prediction)
    return RunForecast(run, number, forecast, _is_of(run, device), (*gone, *notes))


def _page_number(run: Run, page: int | None) -> int:
    last = len(run.manifest["pages"]) - 1
    if page is None and last:
        raise InputError(f"run {run.path} has {last + 1} pages; choose one from 0 to {last} with --page")
    if page is not None and page > last:
        raise InputError(f"run {run.path} has no page {page}; choose one from 0 to {last} with --page")
    return page or 0


def _model(run: Run) -> Model:
    variant = run.manifest["variant"]
    if variant is not None:
        return deepseek_ocr(variant_config(variant))
    return Model(*read_checkpoint(Path(run.manifest["model"])))


def _workload(manifest: dict[str, Any], page: int) -> Workload:
    """The workload with the size of the page and the tokens that came out."""
    found = manifest["pages"][page]
    width, height = found["page_px"]
    return attrs.evolve(
        Workload(**manifest["workload"]), page_width=width, page_height=height, max_new_tokens=len(found["tokens"])
    )


def _stored_device(run: Run) -> tuple[Calibration, tuple[str, ...]]:
    """What the run was predicted from, or its hardware entry with a note where that is gone."""
    told = run.manifest["prediction"]
    entry = from_datasheet(_hardware(run.manifest["hardware"]["figures"]))
    if told["source"] != "calibrated":
        return entry, ()
    try:
        found = load_calibration(Path(told["file"]))
    except InputError as error:
        return entry, (_GONE.format(why=str(error).partition(";")[0]),)
    if _is_of(run, found):
        return found, ()
    return entry, (_GONE.format(why=f"{told['file']} was measured {found.measured_at}, not {told['measured_at']}"),)


def _is_of(run: Run, device: Calibration) -> bool:
    """Whether the run was predicted from this."""
    told = run.manifest["prediction"]
    same_hardware = device.hardware == _hardware(run.manifest["hardware"]["figures"])
    return same_hardware and all(getattr(device, name) == told[name] for name in ("device", "source", "measured_at"))


def _hardware(stored: dict[str, Any]) -> Hardware:
    """The hardware entry, as the manifest holds it."""
    fields = {name: _figures(value) for name, value in stored.items()}
    return Hardware(**fields | {"device_names": tuple(fields["device_names"])})


def _figures(stored: Any) -> Any:
    """A figure, the figures of each dtype, or what is neither."""
    if not isinstance(stored, dict):
        return stored
    return Figure(**stored) if "source" in stored else {name: Figure(**each) for name, each in stored.items()}


def _routing(run: Run, model: Model, workload: Workload, page: int) -> tuple[Routing, tuple[str, ...]]:
    """Routing of one page, and where each stage's is from."""
    sizes, forwards = model.config.experts, range(1, workload.max_new_tokens)
    shape = {"tokens": workload.seq_len, "batch_size": workload.batch_size}
    routing = Routing.planned("balanced", sizes, forwards=forwards, **shape)
    notes = []
    found: dict[str, dict[int, Counts] | None] = {
        "prefill": _prefill_counts(run, model) if len(run.manifest["pages"]) == 1 else None,
        "decode": _decode_counts(run, model, page, len(forwards)),
    }
    for stage, counts in found.items():
        measured = None if counts is None else attrs.evolve(routing, **{stage: counts}, source="measured")
        try:
            if measured:
                measured.check(sizes, forwards=len(forwards), **shape)
        except InputError:
            measured = None
        routing = measured or routing
        notes.append(_note(stage, known=measured is not None))
    return routing, tuple(notes) if sizes.layers else ()


def _note(stage: str, *, known: bool) -> str:
    if not known:
        return _BALANCED.format(stage=stage)
    return _FROM_PREDICTIONS if stage == "prefill" else _FROM_CALLS


def _experts(model: Model) -> Iterator[tuple[str, int, int]]:
    """Path, layer and number of every routed expert."""
    for node in model.tree:
        if node.analytic_layer == _EXPERT:
            words = node.module_path.split(".")
            yield node.module_path, int(words[2]), int(words[-1])


def _prefill_counts(run: Run, model: Model) -> dict[int, Counts]:
    """Tokens of each expert: its gate projection's FLOPs over those of one token."""
    table = run.predictions[run.predictions["stage"] == "prefill"].set_index("module_path")["tensor_flops"]
    shapes = {node.module_path: node.parameters for node in model.tree}
    counts = _zeros(model, 1)
    for path, layer, number in _experts(model):
        gate = f"{path}.gate_proj"
        of_one = 2 * math.prod(shapes[gate]["weight"])
        counts[layer][0, number] = int(table.get(gate, 0)) // of_one
    return counts


def _decode_counts(run: Run, model: Model, page: int, forwards: int) -> dict[int, Counts]:
    """Tokens of each expert: with one page at a time, an expert that is called in a step has one token in it."""
    table = run.calls
    mine = table[table["pass"].eq("traced") & (table["page"] == page) & (table["stage"] == "decode")]
    counts = _zeros(model, forwards)
    where = {path: (layer, number) for path, layer, number in _experts(model)}
    called = mine[mine["module_path"].isin(where.keys())]
    for path, step in zip(called["module_path"], called["step"], strict=True):
        layer, number = where[path]
        counts[layer][step - 1, number] += 1
    return counts


def _zeros(model: Model, forwards: int) -> dict[int, Counts]:
    sizes = model.config.experts
    return {layer: np.zeros((forwards, sizes.experts), dtype=np.int64) for layer in sizes.layers}
