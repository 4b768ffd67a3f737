"""``dsocr-trace calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from dsocr_trace.commands.common import debug_option, reported

if TYPE_CHECKING:
    from analytic.timing.calibration import Calibration

#: Where calibrations go unless --output says otherwise.
_FOLDER: Final = Path("calibrations")


@click.command()
@click.option("--device", required=True, metavar="cpu|cuda:N", help="What to measure.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["bf16", "fp32"]),
    multiple=True,
    default=("bf16",),
    help="For models of this type; may be given several times.  [default: bf16]",
)
@click.option(
    "--hardware", metavar="NAME|FILE.toml", help="Entry with its datasheet's figures.  [default: by the device's name]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.parquet",
    help="Where to write.  [default: calibrations/, named after device and time]",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@debug_option
def calibrate(
    *,
    device: str,
    dtypes: tuple[str, ...],
    hardware: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure a device: operators at many sizes, ceilings, and what the host spends; takes about a minute."""
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.machine.calibrations import check_writable, left_out, save_calibration, summary  # noqa: PLC0415
        from dsocr_trace.report.calibration import print_calibration  # noqa: PLC0415

        if output is not None:
            check_writable(output, force=force)
        found = _measure(device, dtypes, hardware)
        path = save_calibration(found, output or _default_path(found), force=force)
        errors = left_out(found)
        if as_json:
            click.echo(json.dumps(summary(path, found, errors)))
        else:
            print_calibration(path, found, errors)


def _measure(device: str, dtypes: tuple[str, ...], hardware: str | None) -> Calibration:
    import attrs  # noqa: PLC0415

    from analytic.cost import dtype_name  # noqa: PLC0415
    from dsocr_trace.machine.environment import (  # noqa: PLC0415
        device_properties,
        git_commit,
        hardware_for,
        versions,
    )
    from dsocr_trace.report.terminal import ProgressDisplay  # noqa: PLC0415
    from stage_runners.calibration import calibrate as measure  # noqa: PLC0415
    from stage_runners.devices import resolve_device  # noqa: PLC0415

    where = resolve_device(device)
    entry, properties = hardware_for(hardware, where), device_properties(where)
    names = [dtype_name(name) for name in dict.fromkeys(dtypes)]
    with ProgressDisplay() as progress:
        found = measure(where, names, hardware=entry, name=properties["name"], progress=progress)
    machine = {"device": properties, "versions": versions(), "commit": git_commit()}
    return attrs.evolve(found, state=machine | dict(found.state))


def _default_path(calibration: Calibration) -> Path:
    import datetime as dt  # noqa: PLC0415
    import re  # noqa: PLC0415

    _FOLDER.mkdir(exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", calibration.device.lower()).strip("-")
    measured_at = dt.datetime.fromisoformat(str(calibration.measured_at))
    return _FOLDER / f"{device}-{measured_at:%Y%m%d-%H%M%S}.parquet"
