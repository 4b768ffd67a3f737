"""``dsocr-trace doctor``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    metavar="DIR",
    help="Where runs would be written.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Also let Nsight Systems record one range, some seconds long: proof instead of version numbers.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@debug_option
def doctor(*, output: Path, probe: bool, as_json: bool, debug: bool) -> None:
    """Say what this machine can do, and how to get what is missing; exit with 1 if no run is possible."""
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.machine.doctor import examine, is_ready  # noqa: PLC0415
        from dsocr_trace.report.examination import examination_json, print_examination  # noqa: PLC0415

        checks = examine(output, probe=probe)
        if as_json:
            click.echo(json.dumps(examination_json(checks)))
        else:
            print_examination(checks)
    if not is_ready(checks):
        sys.exit(1)
