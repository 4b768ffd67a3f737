"""``dsocr-trace sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsocr_trace.commands.common import debug_option, reported


@click.command()
@click.argument("kind", type=click.Choice(["vision", "sequence", "decode", "profiles"]))
@click.option(
    "--hardware",
    required=True,
    multiple=True,
    metavar="NAME|FILE.toml",
    help="For what; see `dsocr-trace list hardware`; may be given several times.",
)
@click.option(
    "--workload", metavar="ID|FILE.toml", help="What does not vary.  [default: dsocr-standard-v1; not with profiles]"
)
@click.option("--variant", metavar="ID", help="Size of the model.  [default: of the workload]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workload, such as text_tokens=100 or dtype=fp32; may be given several times.",
)
@click.option(
    "--batch",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Pages at once; may be given several times.  [default: a few, depending on the sweep]",
)
@click.option(
    "--ttft-ms", type=float, default=1000.0, show_default=True, metavar="MS", help="Target for the first token."
)
@click.option(
    "--tpot-ms", type=float, default=50.0, show_default=True, metavar="MS", help="Target for each further token."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to write.  [default: results/sweep-KIND-HARDWARE]",
)
@click.option("--force", is_flag=True, help="Replace the directory of an earlier sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@debug_option
def sweep(*, output: Path | None, force: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Lower bounds for a range of workloads on one or several devices: tables, pictures, and a page that reads them.

    vision varies crop grids and view sizes, sequence the prompt's length, decode the number of new tokens, profiles
    takes every built-in workload; all of them vary the batch size. Times are rooflines of datasheets; predict says what
    one workload takes.
    """
    with reported(debug=debug):
        import json  # noqa: PLC0415

        from dsocr_trace.forecasts.sweep import sweep_words  # noqa: PLC0415
        from dsocr_trace.report.sweep import check_output, default_output, print_sweep, summary, write_sweep  # noqa: PLC0415

        if output is not None:
            check_output(output, force=force)
        found = sweep_words(**options)
        path = output or default_output(found)
        write_sweep(found, path, force=force)
        if as_json:
            click.echo(json.dumps({"output": str(path)} | summary(found)))
        else:
            print_sweep(found, path)
