"""Prediction without a run: what a workload should cost on a device. Needs no torch."""

from __future__ import annotations

import contextlib
import gc
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from analytic.config import variant_config
from analytic.errors import InputError
from analytic.families.registry import read_checkpoint
from analytic.layers.base import Policy
from analytic.model import Model, deepseek_ocr
from analytic.predict import CostRow, Prediction, category_rows, module_rows, stage_rows
from analytic.predict import predict as predict_workload
from analytic.whatif import Scenario, apply_settings
from analytic.workload import load_workload
from dsocr_trace.backtests.evidence import Evidence, load_evidence
from dsocr_trace.forecasts.basis import basis
from dsocr_trace.machine.devices import load_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

    from analytic.predict import ModuleRow, StageRow
    from analytic.timing.calibration import Calibration

#: The model whose dimensions are built in.
BUILTIN: Final = "builtin"

#: Columns of the machine-readable output.
COLUMNS: Final = (
    "calls",
    "tensor_flops",
    "vector_flops",
    "bytes_read",
    "bytes_written",
    "weight_bytes",
    "kv_cache_bytes",
    "predicted_ns",
    "predicted_device_ns",
    "predicted_host_ns",
    "bound",
    "source",
)


@attrs.frozen(eq=False, slots=False)
class Forecast:
    """A prediction, as pandas frames.

    Attributes
    ----------
    scenario
        What was predicted.
    device
        For which device.
    prediction
        Every operator with its cost and time.
    source
        ``"builtin"``, or the directory whose ``config.json`` gave the dimensions.
    evidence
        A backtest of the device, if one was given.
    """

    scenario: Scenario
    device: Calibration
    prediction: Prediction
    source: str = BUILTIN
    evidence: Evidence | None = None

    @cached_property
    def stage_rows(self) -> list[StageRow]:
        """Sums over the model, one row per stage."""
        with without_collection():
            return stage_rows(self.prediction)

    @cached_property
    def module_rows(self) -> list[ModuleRow]:
        """Self values, one row per stage and module."""
        with without_collection():
            return module_rows(self.prediction)

    @property
    def wall_ns(self) -> int:
        """From the first view to the last token."""
        return sum(row.predicted_wall_ns for row in self.stage_rows)

    @property
    def busy_ns(self) -> int:
        """Of that, the device's work."""
        return sum(row.predicted_busy_ns for row in self.stage_rows)

    @property
    def decode_step_ns(self) -> float | None:
        """Mean time of a decode forward, its token included; None where there is none."""
        forwards = len(self.prediction.work.kv_lengths)
        (decode,) = (row for row in self.stage_rows if row.stage == "decode")
        return decode.predicted_wall_ns / forwards if forwards else None

    @cached_property
    def stages(self) -> pd.DataFrame:
        """`stage_rows` as a frame."""
        return _frame(self.stage_rows)

    @cached_property
    def modules(self) -> pd.DataFrame:
        """`module_rows` as a frame."""
        return _frame(self.module_rows)

    @cached_property
    def operators(self) -> pd.DataFrame:
        """Self values, one row per stage, module and operator category."""
        return _frame(category_rows(self.prediction))

    def summary(self) -> dict[str, Any]:
        """Stages and modules in plain numbers, for ``--json``."""
        workload = self.scenario.workload
        return {
            "workload": attrs.asdict(workload) | {"crop_grid": workload.grid, "seq_len": workload.seq_len},
            "model": self.source,
            **attrs.asdict(self.scenario.policy),
            "hardware": self.device.hardware.name,
            "device": self.device.device,
            "source": self.device.source,
            "notes": list(basis(self.prediction)),
            "routing": self.prediction.work.routing.source,
            "predicted_wall_ns": self.wall_ns,
            "predicted_busy_ns": self.busy_ns,
            "decode_step_ns": self.decode_step_ns,
            "interval": self._interval(),
            "stages": {
                row.stage: _columns(row)
                | {"predicted_wall_ns": row.predicted_wall_ns, "predicted_busy_ns": row.predicted_busy_ns}
                for row in self.stage_rows
            },
            "modules": [
                {"stage": row.stage, "module_path": row.module_path, **_columns(row)} for row in self.module_rows
            ],
        }

    def _interval(self) -> dict[str, Any] | None:
        if self.evidence is None:
            return None
        low, high = self.expected_ns(self.evidence)
        return attrs.asdict(self.evidence) | {"low_ns": low, "high_ns": high}

    def expected_ns(self, evidence: Evidence) -> tuple[int, int]:
        """Between which times the whole lies, if the backtest holds for it."""
        return round(self.wall_ns * evidence.low), round(self.wall_ns * evidence.high)


def _columns(row: CostRow) -> dict[str, int | str | None]:
    return {name: getattr(row, name) for name in COLUMNS}


def _frame(rows: list[Any]) -> pd.DataFrame:
    import pandas as pd  # noqa: PLC0415  a prediction on the command line does without

    return pd.DataFrame(attrs.asdict(row) for row in rows)


def predict(
    workload: str,
    hardware: str,
    *,
    model: str = BUILTIN,
    variant: str | None = None,
    settings: Mapping[str, object] | None = None,
    backtest: str | Path | None = None,
) -> Forecast:
    """Predict a workload on a device, without running it.

    Parameters
    ----------
    workload
        Profile id or TOML file.
    hardware
        Hardware entry, its TOML file, or a calibration.
    model
        ``"builtin"``, or a checkpoint directory of any family that is installed; only its ``config.json`` is read.
        A text model gets a prompt of the workload's length, and has no vision stage.
    variant
        Size of the built-in model; the workload names the default.
    settings
        What-if changes by key (`analytic.whatif.KEYS`), such as ``{"batch_size": 4, "crop_grid": "2x3"}``.
    backtest
        Directory of a backtest of the calibrated device, for an interval beside the answer.

    Raises
    ------
    InputError
        If a name is unknown, a setting impossible, the directory has no usable configuration, the sequence is
        longer than the model's, or the backtest is of something else.
    """
    words = [f"{key}={value}" for key, value in (settings or {}).items()]
    return predict_words(workload, hardware, source=model, variant=variant, settings=words, backtest=backtest)


def predict_words(
    workload: str,
    hardware: str,
    *,
    source: str = BUILTIN,
    variant: str | None,
    settings: Sequence[str],
    backtest: str | Path | None = None,
) -> Forecast:
    """Predict as `predict` does, with what-if changes as ``KEY=VALUE`` words."""
    profile = load_workload(workload)
    if variant is not None:
        profile = attrs.evolve(profile, variant=variant)
    if source == BUILTIN:
        model = deepseek_ocr(variant_config(profile.variant))
    elif variant is None:
        model = Model(*read_checkpoint(Path(source)))
    else:
        raise InputError("--variant names a built-in model, --model a checkpoint directory; give one of them")
    scenario = apply_settings(Scenario(profile, Policy(dtype=model.config.torch_dtype)), settings)
    device = load_device(hardware)
    evidence = None
    if backtest is not None:
        evidence = load_evidence(Path(backtest))
        evidence.check(device, scenario.policy.dtype)
    return attrs.evolve(forecast(model, scenario, device), source=source, evidence=evidence)


def forecast(model: Model, scenario: Scenario, device: Calibration) -> Forecast:
    """Predict a scenario.

    Raises
    ------
    InputError
        If the device has no figure for the type, or the sequence is longer than the model's.
    """
    _check_length(scenario, model.config.max_positions)
    with without_collection():
        prediction = predict_workload(
            model, scenario.workload, device=device, policy=scenario.policy, routing=scenario.routing
        )
    return Forecast(scenario, device, prediction)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Tens of thousands of small objects are made, none in a cycle: looking for cycles takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_length(scenario: Scenario, most: int) -> None:
    workload = scenario.workload
    if workload.positions > most:
        raise InputError(
            f"the sequence grows to {workload.positions} positions ({workload.seq_len} of the prompt), the model has "
            f"{most}; lower it with --set max_new_tokens= or --set seq_len="
        )
