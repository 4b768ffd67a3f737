"""What ``--hardware`` names: a device by its datasheet, or one that was calibrated. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analytic.hardware import load_hardware
from analytic.timing.datasheet import from_datasheet

if TYPE_CHECKING:
    from analytic.timing.calibration import Calibration


def load_device(name_or_path: str) -> Calibration:
    """Load what is known of a device's speed.

    Parameters
    ----------
    name_or_path
        Hardware entry, its ``.toml`` file, or a calibration's ``.parquet`` file.

    Raises
    ------
    InputError
        If there is no such entry or file, or the file cannot be used.
    """
    if Path(name_or_path).suffix == ".parquet":
        from dsocr_trace.machine.calibrations import load_calibration  # noqa: PLC0415  Arrow takes its time to load

        return load_calibration(Path(name_or_path))
    return from_datasheet(load_hardware(name_or_path))
