"""How far predictions for a device were off in a backtest, beside a prediction for it. Needs no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import attrs

from analytic.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from analytic.timing.calibration import Calibration

#: The summary in the directory of a backtest.
SUMMARY: Final = "backtest.json"


@attrs.frozen
class Evidence:
    """What a backtest says of predictions for its device.

    Attributes
    ----------
    path
        Its summary.
    device
        Name of the device that ran.
    variant, dtype, attention
        What it ran there.
    verdict
        met, not met, or not judged.
    trials
        How many were accepted.
    share, low, high
        In this share of them, the middle one, measured was `low` to `high` times predicted.
    """

    path: str
    device: str
    variant: str
    dtype: str
    attention: str
    verdict: str
    trials: int
    share: float
    low: float
    high: float

    def check(self, device: Calibration, dtype: str) -> None:
        """Refuse to speak of a prediction that the backtest has nothing to do with.

        Raises
        ------
        InputError
            If the device is another one or is not calibrated, or the dtype is another one.
        """
        if device.source != "calibrated":
            raise InputError(
                f"a backtest speaks of predictions from a calibration, {device.device} is predicted from its peaks; "
                "give a calibration with --hardware FILE.parquet, or leave out --backtest"
            )
        if device.device != self.device:
            raise InputError(
                f"backtest {self.path} is of {self.device}, the prediction for {device.device}; "
                "give another with --backtest, or leave it out"
            )
        if dtype != self.dtype:
            raise InputError(
                f"backtest {self.path} ran in {self.dtype}, the prediction is in {dtype}; "
                "give another with --backtest, or leave it out"
            )


def load_evidence(path: Path) -> Evidence:
    """Read the summary of a backtest.

    Parameters
    ----------
    path
        Directory that ``dsocr-trace backtest`` has written, or the ``backtest.json`` in it.

    Raises
    ------
    InputError
        If there is none, it is not the summary of a backtest, or no trial in it was accepted.
    """
    file = path / SUMMARY if path.is_dir() else path
    again = "give the directory of a backtest with --backtest"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"backtest {file} cannot be read: {error.strerror}; {again}") from error
    except ValueError as error:
        raise InputError(f"{file} is not the summary of a backtest: it is no JSON; {again}") from error
    try:
        if told["interval"] is None:
            raise InputError(
                f"no trial of backtest {file} was accepted, so it says nothing; give another with --backtest"
            )
        return Evidence(
            path=str(file),
            device=told["device"]["name"],
            trials=told["trials_accepted"],
            **told["interval"],
            **{name: told[name] for name in ("variant", "dtype", "attention", "verdict")},
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not the summary of a backtest: fields are missing or unknown; {again}") from error
