"""A calibration in a process of its own, as `dsocr-trace calibrate` has it.

It changes how the C library treats memory, and leaves a heap that keeps what a run would give back.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from analytic.errors import DsocrTraceError
from analytic.timing.calibration import Calibration
from stage_runners.calibration.session import calibrate

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from stage_runners.calibration.measure import Progress


def calibrate_apart(*arguments: Any, progress: Progress, **options: Any) -> Calibration:
    """Measure a device in another process.

    Parameters
    ----------
    arguments, options
        Of `calibrate`.
    progress
        Told of phases.

    Raises
    ------
    DsocrTraceError
        If that process ends without a result; and what `calibrate` raises.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_calibrate, args=(there, arguments, options), daemon=True)
    process.start()
    there.close()
    try:
        while True:
            told = here.recv()
            if isinstance(told, Calibration):
                return told
            if isinstance(told, Exception):
                raise told
            progress(*told)
    except EOFError as error:
        process.join()
        raise DsocrTraceError(f"the calibration ended with exit code {process.exitcode}; run it again") from error
    finally:
        process.terminate()
        process.join()


def _calibrate(there: Connection, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        there.send(calibrate(*arguments, **options, progress=lambda *phase: there.send(phase)))
    except Exception as error:  # noqa: BLE001  the other process raises it
        there.send(error)
